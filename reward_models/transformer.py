"""The learned reward model: a causal transformer with one linear score head, read at the last token.

The score of (prompt, completion) is ``w · h``, with ``h`` the trunk's output at the EOS that follows the completion.
Rows are padded on the right and the last token is found by explicit length; a causal model never looks at padding, so
a score depends on its own text alone. The model is a Hugging Face sequence classifier with one label, and a plain
``AutoModelForSequenceClassification`` reads the same scores from the saved folder (which has a padding token of its
own, since that class finds the last token by comparing with it).
"""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from reward_models.preferences import Ranking
from textenv.hf_training import Ragged, encode_texts, untouched_globals
from textenv.lm import LanguageModel, disable_dropout, length_buckets
from textenv.lm.load import load_tokenizer

_log = logging.getLogger(__name__)


@final
class TransformerRewardModel:
    """Scores texts with a sequence classifier of one label; callable as every reward model."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = "unnamed", batch_size: int = 64
    ) -> None:
        """Wrap a classifier in memory, dropout off. ``batch_size`` bounds memory and does not change scores.

        Raises:
            ValueError: the classifier has no linear ``score`` head of one label, or the tokenizer no EOS token.
        """
        score_head(model)
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of {name!r} must have an EOS token. Set tokenizer.eos_token before saving it."
            )
        disable_dropout(model)
        self.name, self.model, self.tokenizer, self.batch_size = name, model, tokenizer, batch_size
        self.truncated_prompts = 0
        """Prompts cut on the left so far, because prompt and completion did not fit the model together."""

    @classmethod
    def from_language_model(cls, lm: LanguageModel, *, batch_size: int = 64) -> "TransformerRewardModel":
        """The trunk of ``lm``, copied, under a score head of zeros: every score starts equal.

        A ``<pad>`` token is added when the tokenizer has none, or one that equals EOS.
        """
        tokenizer = copy.deepcopy(lm.tokenizer)
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id == lm.eos_id:
            tokenizer.add_special_tokens({"pad_token": "<pad>"})
        config = copy.deepcopy(lm.model.config)
        config.num_labels = 1
        config.pad_token_id = None  # until its row exists
        with untouched_globals():
            model = AutoModelForSequenceClassification.from_config(config, dtype=lm.model.dtype)
            model.base_model.load_state_dict(lm.model.base_model.state_dict())
            rows = model.get_input_embeddings().weight.shape[0]
            if len(tokenizer) > rows:
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[rows:] = 0.0  # padding: no token ever attends to it
            score_head(model).weight.zero_()
        model.config.pad_token_id = tokenizer.pad_token_id
        return cls(model.to(lm.device), tokenizer, name=lm.name, batch_size=batch_size)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        """One score a text; prompts may be chats. ``columns`` play no part."""
        if len(prompts) != len(completions):
            raise ValueError(f"prompts (={len(prompts)}) and completions (={len(completions)}) must be as many.")
        return self.scores(self.encode(prompts, completions)).tolist()

    @property
    def score_unit(self) -> float:
        """Log-odds in one unit of score: the model holds ``P(a ≻ b) = σ(score_unit · (s_a − s_b))``. 1 as trained,
        then what normalisation divided by; saved in the config."""
        return score_unit(self.model)

    @property
    def max_tokens(self) -> int | None:
        """Longest prompt + completion + EOS that the position embeddings allow; None without a limit."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def encode(self, prompts: Sequence[Any], completions: Sequence[str]) -> Ragged:
        """Prompt tokens + completion tokens + EOS. Over-long prompts lose their left part; a completion is never cut.

        Raises:
            ValueError: a completion is too long by itself.
        """
        prompt_ids, completion_ids = encode_texts(self.tokenizer, prompts, completions, rendered=True)
        limit, cut = self.max_tokens, 0
        eos_id: Any = self.tokenizer.eos_token_id
        texts: list[list[int]] = []
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
            room = None if limit is None else limit - len(completion) - 1
            if room is not None and room < len(prompt):
                if room < 0:
                    raise ValueError(
                        f"a completion must fit the reward model {self.name!r}, with tokens + EOS "
                        f"(={len(completion) + 1}) > limit (={limit}). Shorten it or take another model."
                    )
                prompt, cut = prompt[len(prompt) - room :], cut + 1
            texts.append([*prompt, *completion, eos_id])
        if cut and not self.truncated_prompts:
            _log.warning("Reward model %s (≤ %s tokens): %d prompts were cut on the left.", self.name, limit, cut)
        self.truncated_prompts += cut
        return Ragged(texts)

    @torch.no_grad()
    def scores(self, texts: Ragged) -> Float[Tensor, " N"]:
        """Scores of tokenised texts, in order, on the CPU; batches are of similar length."""
        out = torch.zeros(len(texts.lengths))
        for index in length_buckets(texts.lengths, self.batch_size):
            input_ids, lengths = texts.padded(index)
            out[index] = score_rows(self.model, input_ids.to(self.model.device), lengths).cpu()
        return out

    def normalize(self, rankings: Sequence[Ranking]) -> None:
        """Shift and scale the scores: mean 0 over prompts, standard deviation 1 *within* a prompt, on these samples.

        Comparisons leave every prompt an offset that nothing determines, so the spread over all texts is arbitrary and
        would change the meaning of β from seed to seed; the spread within a prompt (pooled, unbiased) is what
        comparisons fix. The scale goes into the head's weight. The shift goes into the bias of the trunk's final norm,
        where it has one (GPT-2); elsewhere into ``config.score_offset``, a constant that plain transformers does not
        add and that no comparison within the model can see.

        Raises:
            ValueError: the scores do not differ within any prompt.
        """
        counts = torch.tensor([len(ranking.responses) for ranking in rankings])
        prompt = torch.arange(len(rankings)).repeat_interleave(counts)
        scores = self.scores(self.encode_rankings(rankings)).double()
        means = torch.zeros(len(rankings), dtype=torch.float64).index_add(0, prompt, scores) / counts
        deviation = ((scores - means[prompt]).square().sum() / (counts - 1).sum()).sqrt().item()
        if not deviation > 0:
            raise ValueError(
                f"scores must differ within a prompt to be normalised, with deviation (={deviation}). "
                "Train the model first."
            )
        with torch.no_grad():
            score_head(self.model).weight.div_(deviation)
        self.model.config.score_offset = score_offset(self.model) / deviation
        self.model.config.score_unit = self.score_unit * deviation
        self._shift(-means.mean().item() / deviation)

    def encode_rankings(self, rankings: Sequence[Ranking]) -> Ragged:
        """The texts of all rankings, one after another, each from best to worst."""
        prompts = [ranking.prompt for ranking in rankings for _ in ranking.responses]
        return self.encode(prompts, [response for ranking in rankings for response in ranking.responses])

    def save_pretrained(self, folder: str | Path) -> None:
        """A plain Hugging Face folder: safetensors weights, config and tokenizer."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def _shift(self, by: float) -> None:
        """Add a constant to every score: ``w · (h + by · w / (w · w)) = w · h + by``."""
        probe = torch.tensor([[self.tokenizer.eos_token_id]], device=self.model.device)
        length = torch.ones(1, dtype=torch.int64)
        before = score_rows(self.model, probe, length)
        weight = score_head(self.model).weight[0].double()
        norms = [module for module in self.model.base_model.modules() if isinstance(module, nn.LayerNorm)]
        bias = norms[-1].bias if norms else None
        if bias is not None and bias.shape == weight.shape:
            kept = bias.clone()
            bias.copy_(bias.double() + by * weight / weight.square().sum())
            moved = score_rows(self.model, probe, length) - before
            if torch.allclose(moved, torch.full_like(moved, by), rtol=1e-3, atol=1e-3):
                return
            bias.copy_(kept)  # the last norm is not the final one after all
        self.model.config.score_offset = score_offset(self.model) + by


def load_reward_model(
    name: str | Path, device: str | torch.device = "cpu", *, dtype: torch.dtype = torch.float32
) -> TransformerRewardModel:
    """Load a folder or hub id. ``trust_remote_code`` stays off; weights come from safetensors.

    Raises:
        ValueError: the name is no readable causal sequence classifier with one label.
    """
    try:
        model = AutoModelForSequenceClassification.from_pretrained(str(name), dtype=dtype, use_safetensors=True)
        tokenizer = load_tokenizer(name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"a reward model must be a registered name, 'module:callable', a folder or a hub id, with name "
            f"(={str(name)!r}). Loading it as a Hugging Face sequence classifier failed: {error}"
        ) from error
    return TransformerRewardModel(model.to(device), tokenizer, name=str(name))


def score_rows(
    model: PreTrainedModel, input_ids: Int[Tensor, "B S"], lengths: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Scores of right-padded rows, with gradient: the head runs on the last real token of each row only."""
    # All ones: the padding lies on the right, where a causal model never looks, and no mask means the fast kernel.
    trunk = model.base_model
    hidden = trunk(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(lengths), device=hidden.device), lengths.to(hidden.device) - 1]
    return score_head(model)(last).squeeze(-1).float() + score_offset(model)


def score_head(model: PreTrainedModel) -> nn.Linear:
    """The linear head of a causal classifier with one label; ValueError for any other model."""
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ValueError(
            f"a reward model must be a causal classifier with a linear `score` head of one label, with model "
            f"(={type(model).__name__}) and head (={head}). Train one, or convert it with num_labels=1."
        )
    return head


def score_unit(model: PreTrainedModel) -> float:
    """Log-odds in one unit of score."""
    return float(getattr(model.config, "score_unit", 1.0))


def score_offset(model: PreTrainedModel) -> float:
    """Constant added to every score of a model whose trunk has no bias to take it."""
    return float(getattr(model.config, "score_offset", 0.0))
