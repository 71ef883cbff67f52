"""The learned reward model: a Hugging Face sequence classifier of one label, with its tokenizer.

Decoders and encoders alike (:mod:`.heads`). Rows are padded on the right, lengths are explicit, and a
score depends on its own text alone. A plain ``AutoModelForSequenceClassification`` reads the same scores from the saved
folder (which has a padding token of its own, since that class finds a decoder's last token by comparing with it).
"""

import copy
import hashlib
import json
import logging
import math
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from reward_models.preferences import Ranking
from reward_models.scorers import heads
from reward_models.scorers.texts import EncodedTexts, encode_for_decoder, encode_for_encoder, in_template
from textenv.data.hub import hub_or_cache
from textenv.data.records import place_of
from textenv.lm import LanguageModel, disable_dropout, length_buckets
from textenv.lm.adapters import adapter_base, adapters, load_adapter, merged_copy, trained_modules
from textenv.lm.chat import placed_chats
from textenv.lm.kernels.layers import speed_up
from textenv.lm.load import (
    check_gaps,
    check_rows,
    load_tokenizer,
    load_with_gaps,
    missing_package,
    own_vectors,
    train_padding,
)
from textenv.registry import registered_sources
from textenv.scoring import note_truncated
from textenv.training.isolation import untouched_globals

_log = logging.getLogger(__name__)


@final
class TransformerRewardModel:
    """Scores texts with a sequence classifier of one label; callable as every reward model."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = "unnamed", batch_size: int = 64
    ) -> None:
        """Wrap a classifier in memory, dropout off. ``batch_size`` bounds memory and does not change scores.

        Raises:
            ValueError: the classifier does not end in one linear output, or a decoder's tokenizer has no EOS token.
        """
        heads.score_head(model)
        self.is_decoder = heads.is_decoder(model)
        """Read at the last token, else pooled by the model itself."""
        if self.is_decoder and tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {name!r} must have an EOS token. Set tokenizer.eos_token and save it.")
        disable_dropout(model)
        if self.is_decoder:
            train_padding(model)
        speed_up(model)
        self.name, self.model, self.tokenizer, self.batch_size = name, model, tokenizer, batch_size
        self.truncated_prompts = 0
        """Prompts cut on the left so far to fit the model with their completion; distinct ones within each call."""
        self.truncated_responses = 0
        """Completions cut at their end so far because they did not fit the model by themselves."""

    @classmethod
    def from_language_model(cls, lm: LanguageModel, *, batch_size: int = 64) -> "TransformerRewardModel":
        """The trunk of ``lm``, copied, under a score head of zeros: every score starts equal.

        A ``<pad>`` token is added when the tokenizer has none, or one that equals EOS.

        Raises:
            ValueError: transformers has no classifier of its family, or a token has no row in its embedding.
        """
        special = {token for token, added in lm.tokenizer.added_tokens_decoder.items() if added.special}
        lm.check_ids([sorted(set(lm.tokenizer.get_vocab().values()) - special)])
        tokenizer = copy.deepcopy(lm.tokenizer)
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id == lm.eos_id:
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
        config = copy.deepcopy(lm.model.config)
        config.num_labels = 1
        config.pad_token_id = None  # until its row exists
        with untouched_globals():
            try:
                model = AutoModelForSequenceClassification.from_config(config, dtype=lm.model.dtype)
            except ValueError:
                rule = "a reward model's trunk must be of a family that transformers has a sequence classifier for"
                raise ValueError(f"{rule}, got {type(lm.model).__name__}. Start from another model.") from None
            model.base_model.load_state_dict(lm.model.base_model.state_dict())
            rows = model.get_input_embeddings().weight.shape[0]
            if len(tokenizer) > rows:
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[rows:] = 0.0  # padding: no token ever attends to it
            heads.score_head(model).weight.zero_()
        model.config.pad_token_id = tokenizer.pad_token_id
        return cls(model.to(lm.device), tokenizer, name=lm.name, batch_size=batch_size)

    @classmethod
    def from_encoder(cls, folder: str | Path, *, device: str = "cpu", seed: int = 0) -> "TransformerRewardModel":
        """A pre-trained encoder (folder or hub id) under a new head whose last layer is zeros: scores start equal.

        What else of the head the folder lacks (a pooler) is drawn with ``seed``.
        """
        with untouched_globals():
            hf_logging.set_verbosity_error()  # it would report that the head is new
            torch.manual_seed(seed)
            model, tokenizer = load_classifier(folder, torch.float32, num_labels=1)
        with torch.no_grad():
            for parameter in heads.score_head(model).parameters():
                parameter.zero_()
        return cls(model.to(device), tokenizer, name=str(folder))

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[str], *, chat: Any = None, **columns: Any
    ) -> list[float]:
        """One score per text; prompts may be chats. ``chat`` holds the messages of prompts that another model's
        template has rendered, None for others; further columns are ignored."""
        return self.scores(self.encode(prompts, completions, chat)).tolist()

    @property
    def score_unit(self) -> float:
        """Log-odds in one unit of score: the model holds ``P(a ≻ b) = σ(score_unit · (s_a − s_b))``. 1 as trained,
        then what normalisation divided by; saved in the config."""
        return heads.score_unit(self.model)

    @property
    def max_tokens(self) -> int | None:
        """Longest text in tokens, special ones included, that the position embeddings allow; None without a limit."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if self.is_decoder or limit is None:
            return limit
        return min(limit - heads.unused_positions(self.model), self.tokenizer.model_max_length)

    @property
    def reading(self) -> str:
        """How this model encodes texts: models of equal ``reading`` may share tokens."""
        tokenizer: Any = self.tokenizer
        parts = (self.is_decoder, self.max_tokens, tokenizer.chat_template, tokenizer.eos_token_id)
        return _sha256(repr(parts), tokenizer.backend_tokenizer.to_str())

    @property
    def identity(self) -> str:
        """A digest of weights, settings and tokenizer (:func:`reward_models.identity.identity_of`)."""
        return _sha256(self.reading, *_contents(self.model))

    @property
    def trunk_identity(self) -> str:
        """A digest of what features of tokens depend on: all weights and settings but those of the last layer."""
        head = {id(parameter) for parameter in heads.score_head(self.model).parameters()}
        names = {name for name, parameter in self.model.named_parameters() if id(parameter) in head}
        return _sha256(str(self.is_decoder), *_contents(self.model, {*names, "score_unit"}))

    def encode(
        self, prompts: Sequence[Any], completions: Sequence[str], chat: Sequence[Any] | None = None
    ) -> EncodedTexts:
        """Tokens as the model reads them (:mod:`.texts`). Over-long prompts lose their left part, and completions
        that are too long by themselves their end; both are counted, and logged once.

        Raises:
            ValueError: a chat prompt has no chat template, or a token no row in the embedding.
        """
        if len(prompts) != len(completions):
            given = f"{len(prompts)} and {len(completions)}"
            raise ValueError(f"prompts and completions must be as many, got {given}. Pair them.")
        if chat is not None and self.tokenizer.chat_template is not None:
            prompts = [prompt if messages is None else messages for prompt, messages in zip(prompts, chat, strict=True)]
        if self.tokenizer.chat_template is None and not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(
                f"a chat prompt needs a chat template, which the tokenizer of reward model {self.name!r} lacks. Set "
                "tokenizer.chat_template before saving it, or give prompts as strings."
            )
        completions = [in_template(self.tokenizer, *text) for text in zip(prompts, completions, strict=True)]
        encode = encode_for_decoder if self.is_decoder else encode_for_encoder
        limit = self.max_tokens
        texts, cut, long = encode(self.tokenizer, prompts, completions, limit)
        check_rows(self.model, self.tokenizer, int(texts.flat.max()) if len(texts.flat) else -1, self.name)
        who = f"Reward model {self.name} (≤ {limit} tokens)"
        if cut and not self.truncated_prompts:
            _log.warning("%s: %d prompt%s cut on the left.", who, cut, "s" * (cut > 1))
        if long and not self.truncated_responses:
            plural = "s" * (len(long) > 1)
            _log.warning("%s: %d response%s cut at the end. The score is that of the rest.", who, len(long), plural)
        self.truncated_prompts += cut
        self.truncated_responses += len(long)
        note_truncated(completions[row] for row in long)
        return texts

    @torch.no_grad()
    def scores(self, texts: EncodedTexts) -> Float[Tensor, " N"]:
        """Scores of tokenised texts, in order, on the CPU; batches are of similar length."""
        out = torch.zeros(len(texts.lengths), dtype=torch.promote_types(self.model.dtype, torch.float32))
        for index in length_buckets(texts.lengths, self.batch_size, max_padding=0.1):
            out[index] = heads.score_rows(self.model, **texts.batch(index, self.model.device)).cpu()
        return out

    @torch.no_grad()
    def scores_of(self, features: Float[Tensor, "N H"]) -> Float[Tensor, " N"]:
        """Scores of texts that this model's trunk has read already (:mod:`.features`), on the CPU."""
        return heads.score_features(self.model, features.to(self.model.device)).cpu()

    def normalize(self, rankings: Sequence[Ranking], scores: Float[Tensor, " n"] | None = None) -> None:
        """Shift and scale the scores: mean 0 over prompts, standard deviation 1 *within* a prompt, on these samples.

        Comparisons leave every prompt an offset that nothing determines, so the spread over all texts is arbitrary and
        would change the meaning of β from seed to seed; the spread within a prompt (pooled, unbiased) is what
        comparisons fix. The scale goes into the head's weight. The shift goes into the head's bias (encoders) or into
        the bias of the trunk's final norm (GPT-2). A model with neither (Llama, Qwen2, …) is only scaled: plain
        transformers would add no constant kept elsewhere. ``center_coef`` draws their mean to 0 in training.

        ``scores`` are those of the model as it is, one response after another, if they are known already.

        Raises:
            ValueError: the scores do not differ within any prompt, or by no more than rounding.
        """
        counts = torch.tensor([len(ranking.responses) for ranking in rankings])
        prompt = torch.arange(len(rankings)).repeat_interleave(counts)
        scores = (self.scores(self.encode_rankings(rankings)) if scores is None else scores).double()
        means = torch.zeros(len(rankings), dtype=torch.float64).index_add(0, prompt, scores) / counts
        deviation = ((scores - means[prompt]).square().sum() / (counts - 1).sum()).sqrt().item()
        if not math.isfinite(deviation):
            rule = f"scores must be finite to be normalised, got deviation {deviation}"
            raise ValueError(f"{rule}. The training diverged: lower the learning rate.")
        if not deviation > 1e-6 * scores.abs().max():
            raise ValueError(
                f"scores must differ within a prompt to be normalised, got deviation {deviation}. "
                "The model has learned nothing: train it first; where training stopped early, evaluate later or raise "
                "early_stopping_patience."
            )
        heads.rescale(self.model, deviation)
        heads.shift(self.model, -means.mean().item() / deviation)

    def encode_rankings(self, rankings: Sequence[Ranking]) -> EncodedTexts:
        """The texts of all rankings, one after another, each from best to worst.

        Raises:
            ValueError: a chat prompt has no chat template, or one that refuses it; names its place.
        """
        prompts = [ranking.prompt for ranking in rankings for _ in ranking.responses]
        with placed_chats(self.tokenizer, [ranking.prompt for ranking in rankings], partial(place_of, rankings)):
            return self.encode(prompts, [response for ranking in rankings for response in ranking.responses])

    def save_pretrained(self, folder: str | Path) -> None:
        """A plain Hugging Face folder: safetensors weights, config and tokenizer, which pads on the right: plain
        transformers scores differently with padding on the left. Adapters are added to the weights."""
        self.tokenizer.padding_side = "right"
        (merged_copy(self.model) if adapters(self.model) else self.model).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_reward_model(
    name: str | Path,
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    batch_size: int = 64,
) -> TransformerRewardModel:
    """Load a folder or hub id. ``trust_remote_code`` stays off; weights come from safetensors.

    A folder may be one that ``peft`` saved: adapters and a head on the model that it names, which is loaded with it.

    Args:
        dtype: of the weights; scores are float32 all the same.
        attn_implementation: transformers' name, like ``"sdpa"``; None takes its default.
        batch_size: texts per forward pass.

    Raises:
        ValueError: the name is no readable sequence classifier with one label.
    """
    model, tokenizer = load_classifier(name, dtype, attn_implementation=attn_implementation)
    return TransformerRewardModel(model.to(device), tokenizer, name=str(name), batch_size=batch_size)


def load_classifier(name: str | Path, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """``(model, tokenizer)`` of a sequence classifier, or a ValueError that says why not."""
    base = adapter_base(name)
    if base is not None:
        return _load_adapter(name, registered_sources("language model").get(base, base), dtype, **options)
    with hub_or_cache(name) as unreachable:
        try:
            options |= {"dtype": dtype, "use_safetensors": True}
            model, missing = load_with_gaps(AutoModelForSequenceClassification, name, **options)
            own_vectors(model)
            tokenizer = load_tokenizer(name)
        except ImportError as error:
            raise missing_package(error, options.get("attn_implementation")) from error
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ValueError(
                f"a reward model must be a registered name, 'module:callable', a folder or a hub id, got "
                f"{str(name)!r}. Loading it as a Hugging Face sequence classifier failed: {error}{unreachable}"
            ) from error
    if model.config.num_labels == 1 and "num_labels" not in options:  # asked for: the head comes from elsewhere
        check_gaps("a reward model", name, missing)
    return model, tokenizer


def _load_adapter(name: str | Path, base: str | Path, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """The same of a folder with adapters and a head, or with adapters on a base that has a head."""
    with untouched_globals():
        hf_logging.set_verbosity_error()  # it would report that the base lacks the head
        plain, tokenizer = load_classifier(base, dtype, num_labels=1, **options)
    model = trained_modules(load_adapter(plain, name))
    new_head = heads.score_head(model).weight.data_ptr() != heads.score_head(plain).weight.data_ptr()
    if not new_head and not (plain.config.architectures or [""])[0].endswith("ForSequenceClassification"):
        rule = "the adapters of a reward model must come with a score head, or be for a model that has one"
        raise ValueError(f"{rule}, got {str(name)!r} for {str(base)!r}. Train them with task_type='SEQ_CLS'.")
    own = (Path(name) / "tokenizer_config.json").is_file()
    return model, load_tokenizer(name) if own else tokenizer


def _contents(model: PreTrainedModel, without: Collection[str] = ()) -> list[Any]:
    """Settings and weights, in a fixed order, ready to be digested; ``without`` those named."""
    hidden = {"_name_or_path", "transformers_version", "architectures", *without}
    settings = {key: value for key, value in model.config.to_dict().items() if key not in hidden}
    out: list[Any] = [json.dumps(settings, sort_keys=True, default=str)]
    for name, tensor in sorted(model.state_dict().items()):
        if name not in without:
            out += [name, str(tensor.dtype), tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()]
    return out


def _sha256(*parts: Any) -> str:
    """Digest of strings and byte buffers; each part's length goes in, so that no two splits collide."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else memoryview(part)
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()
