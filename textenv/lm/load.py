"""Loading Hugging Face causal language models by registered name, folder, hub id or GGUF file."""

import dataclasses
import json
import struct
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.activations import NewGELUActivation

from textenv.data.hub import hub_or_cache
from textenv.lm.adapters import adapter_base, adapters, load_adapter, merged_copy, plain_model, save_adapter
from textenv.lm.chat import ending_ids, prompt_text, turn_end_id
from textenv.lm.heads import output_embeddings
from textenv.lm.kernels.layers import speed_up
from textenv.lm.kernels.tied import tie


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model with its tokenizer and special tokens. Dropout is always off."""

    name: str
    model: PreTrainedModel
    """A ``PeftModel`` may be given: it is unwrapped, with its adapters inside."""
    tokenizer: PreTrainedTokenizerBase
    eos_id: int
    """The tokenizer's EOS, which closes a response to a plain text."""
    turn_end_id: int
    """Closes an assistant turn of a chat; EOS where the chat template has no token of its own."""
    ending_ids: tuple[int, ...]
    """Every token that ends a response, ``eos_id`` first (:mod:`textenv.lm.chat`)."""
    pad_id: int
    """Fills padding; may equal ``eos_id``, since nothing derives a mask from it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", plain_model(self.model))
        disable_dropout(self.model)
        train_padding(self.model)
        fuse_activations(self.model)
        speed_up(self.model)
        tie(self.model)

    @property
    def vocab_size(self) -> int:
        """Rows of the LM head: the number of actions."""
        return output_embeddings(self.model).weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return output_embeddings(self.model).weight.shape[1]

    @property
    def max_tokens(self) -> int | None:
        """Longest prompt + response that the position embeddings allow; None when the model sets no limit."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def prompt_text(self, prompt: Any) -> str:
        """A prompt as reward models see it: the string itself, or chat messages rendered by the chat template."""
        return prompt_text(self.tokenizer, prompt)

    def encode_prompt(self, prompt: Any) -> list[int]:
        """Tokens of a prompt: a string, or a list of chat messages (the chat template adds its special tokens)."""
        return self._encode(self.prompt_text(prompt), add_special_tokens=isinstance(prompt, str))

    def encode_response(self, response: str, *, eos: bool) -> list[int]:
        """Tokens of a response (no BOS), with EOS at its end if ``eos``."""
        ids = self._encode(response, add_special_tokens=False)
        return [*ids, self.eos_id] if eos else ids

    def check_ids(self, texts: Iterable[Sequence[int]], *, predicted: bool = False) -> None:
        """Refuse tokens that the embedding has no row for, or the LM head where they are to be ``predicted``."""
        highest = max((max(ids) for ids in texts if ids), default=-1)
        check_rows(self.model, self.tokenizer, highest, self.name)
        if predicted and highest >= self.vocab_size:
            raise _no_row(self.tokenizer, highest, self.name, "LM head", self.vocab_size)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            ids = list(self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids)
            self.check_ids([ids])
            return ids
        except Exception as error:
            raise (unknown_word(repr(self.name), text, error) or error) from None

    def decode(self, ids: list[int]) -> str:
        return self.decode_batch([ids])[0]

    def decode_batch(self, ids: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def response_texts(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Texts of responses without the token that ends them, whether or not the tokenizer calls it special."""
        ends = set(self.ending_ids)
        return self.decode_batch([list(row[:-1] if row and row[-1] in ends else row) for row in ids])

    def save_pretrained(self, folder: str | Path) -> None:
        """A plain Hugging Face folder: safetensors weights, config and tokenizer; of a model with adapters only these,
        as plain ``peft`` reads them."""
        if adapters(self.model):
            save_adapter(self.model, folder)
        else:
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def merged(self) -> "LanguageModel":
        """A copy whose adapters are added to its weights: an ordinary model."""
        return dataclasses.replace(self, model=merged_copy(self.model))


def load_language_model(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    base: LanguageModel | None = None,
) -> LanguageModel:
    """Load a folder, a hub id, or a ``.gguf`` file, whose weights are de-quantised (needs the package ``gguf``).

    ``trust_remote_code`` stays off; weights come from safetensors or GGUF. A folder with an adapter is loaded onto the
    weights of ``base``, which it shares, by default onto the folder or hub id that it names.

    Raises:
        ValueError: the name is not a readable causal language model, or its tokenizer has no EOS token.
    """
    named = adapter_base(name)
    if named is not None:
        options = {"device": device, "dtype": dtype, "attn_implementation": attn_implementation}
        try:
            base = base or load_language_model(named, **options)
        except ValueError as error:
            raise ValueError(
                f"the base of an adapter must be a folder, a hub id or a .gguf file that can be loaded, got {named!r} "
                f"in the adapter_config.json of {str(name)!r}: {error}. Correct the name there; if it is a registered "
                "one, register it and use textenv.language_model."
            ) from error
        tokenizer = load_tokenizer(name) if (Path(name) / "tokenizer_config.json").is_file() else base.tokenizer
        return wrap_language_model(load_adapter(base.model, name), tokenizer, name=str(name))
    missing: set[str] = set()
    with hub_or_cache(name) as unreachable:
        try:
            if is_gguf(name):
                model, tokenizer = _load_gguf(Path(name), dtype=dtype, attn_implementation=attn_implementation)
            else:
                options = {"dtype": dtype, "attn_implementation": attn_implementation, "use_safetensors": True}
                model, missing = load_with_gaps(AutoModelForCausalLM, name, **options)
                own_vectors(model)
                tokenizer = load_tokenizer(name)
        except ImportError as error:
            raise missing_package(error, attn_implementation) from error
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ValueError(
                f"a language model must be a registered name, a folder, a hub id or a .gguf file, got "
                f"{str(name)!r}. Loading it as a Hugging Face causal language model failed: {error}{unreachable}"
            ) from error
    check_gaps("a language model", name, missing)
    model.to(torch.device(device))  # type: ignore[arg-type]
    return wrap_language_model(model, tokenizer, name=str(name))


def load_with_gaps(auto_class: Any, name: str | Path, **options: Any) -> tuple[Any, set[str]]:
    """A model and the names of its weights that no file holds, which are then random numbers."""
    model, found = auto_class.from_pretrained(str(name), output_loading_info=True, **options)
    return model, set(found["missing_keys"])


def check_gaps(what: str, name: str | Path, missing: Collection[str]) -> None:
    """Refuse a model with weights that no file holds.

    Raises:
        ValueError: there are some.
    """
    if missing:
        rule = f"{what} must have all its weights, got {str(name)!r} without {len(missing)} of them ({min(missing)}"
        more = ", …" if len(missing) > 1 else ""
        remedy = "they would be random numbers. Name a model of the right kind, or save this one again"
        raise ValueError(f"{rule}{more}): {remedy}.")


def missing_package(error: ImportError, attn_implementation: str | None) -> ValueError:
    """What to say where loading a model needs a package that is not installed."""
    if attn_implementation is None:
        return ValueError(f"loading a model must find its packages, got: {error}. Install what it names.")
    return ValueError(
        f"attn_implementation must be one whose package is installed, got {attn_implementation!r}: {error}. Install "
        "the package, or use sdpa."
    )


def own_vectors(model: nn.Module) -> None:
    """Copy the vectors of a model, the head of a reward model too, out of the file that they were read from.

    safetensors maps a file into memory, and any tensor of it keeps the whole: so, where another model has the same
    matrices, the file can go once these are shared (:mod:`textenv.registry.sharing`).
    """
    for weight in model.parameters():
        if weight.ndim < 2 or 1 in weight.shape:
            weight.data = weight.data.clone()


def is_gguf(name: str | Path) -> bool:
    """Whether a name stands for a GGUF file."""
    return str(name).endswith(".gguf")


def _load_gguf(path: Path, **options: Any) -> tuple[Any, Any]:
    """``(model, tokenizer)`` of a GGUF file, without quantisation settings that a saved copy would inherit."""
    if not path.is_file():
        raise OSError(f"there is no file {str(path)!r}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        model: Any = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, **options)
    except (struct.error, IndexError) as error:
        raise ValueError(f"the file is cut short or damaged ({error})") from error
    for owner, names in (
        (model, ("hf_quantizer", "is_quantized", "quantization_method")),
        (model.config, ("quantization_config", "_is_quantized")),
    ):
        for attribute in names:
            owner.__dict__.pop(attribute, None)
    model.config._name_or_path = str(path)  # not the title chosen by the file's author
    return model, tokenizer


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a folder or hub id, as it was saved.

    A folder that names the generic class is read by it: some families' own classes rebuild the pre-tokenizer anyway.

    Raises:
        ValueError: there are no tokenizer files; transformers would silently use an empty tokenizer.
    """
    settings = Path(name) / "tokenizer_config.json"
    if settings.is_file():
        saved = json.loads(settings.read_text("utf-8")).get("tokenizer_class")
        if saved in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            return PreTrainedTokenizerFast.from_pretrained(str(name))
    tokenizer: Any = AutoTokenizer.from_pretrained(str(name))
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(
            f"a folder must hold its tokenizer, got {str(name)!r}: nothing but special tokens was found. Save "
            "it there: tokenizer.save_pretrained(folder)."
        )
    return tokenizer


def wrap_language_model(model: PreTrainedModel, tokenizer: Any, *, name: str = "unnamed") -> LanguageModel:
    """Bind a model in memory to its tokenizer, dropout off."""
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        raise ValueError(f"the tokenizer of {name!r} must have an EOS token. Set tokenizer.eos_token before saving it.")
    pad_id = tokenizer.pad_token_id
    if pad_id is None or pad_id >= embedding_rows(plain_model(model)):  # one that was added for padding has no row
        pad_id = eos_id
    return LanguageModel(
        name,
        model,
        tokenizer,
        eos_id=int(eos_id),
        turn_end_id=turn_end_id(tokenizer),
        ending_ids=ending_ids(plain_model(model), tokenizer),
        pad_id=int(pad_id),
    )


def disable_dropout(model: nn.Module) -> None:
    """Turn dropout off, in train mode too: old and new log-probabilities must come from one function."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model.eval()


def train_padding(model: nn.Module) -> None:
    """Let the embedding of the padding token learn. Padding itself has no gradient here, but where it is EOS, PyTorch
    would drop that of every EOS between the turns of a prompt."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None


def fuse_activations(model: nn.Module) -> None:
    """Let one kernel of PyTorch compute GPT-2's GELU, for which transformers calls eight: the same up to rounding."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))


def unknown_word(reader: str, text: str, error: Exception) -> ValueError | None:
    """What to say where a fast tokenizer without a token for unknown words refuses a text, which is then an Exception
    of no kind; None for other errors."""
    if type(error) is not Exception:
        return None
    rule = f"a text must be made of tokens that {reader} knows, got {text!r} ({error})"
    return ValueError(f"{rule}. Correct the text, or use another model.")


def embedding_rows(model: PreTrainedModel) -> int:
    """Tokens that a model can read."""
    embedding: Any = model.get_input_embeddings()
    return getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0]


def check_rows(model: PreTrainedModel, tokenizer: Any, highest: int, name: str) -> None:
    """Refuse texts whose ``highest`` token has no row in the embedding."""
    if highest >= (rows := embedding_rows(model)):
        raise _no_row(tokenizer, highest, name, "embedding", rows)


def _no_row(tokenizer: Any, token: int, name: str, place: str, rows: int) -> ValueError:
    known = max(tokenizer.get_vocab().values())
    return ValueError(
        f"a text must be made of tokens that the {place} of {name!r} has rows for, got "
        f"{tokenizer.convert_ids_to_tokens(token)!r} (id {token}): the tokenizer has ids up to {known}, the {place} "
        f"{rows} rows. Use the tokenizer that belongs to the model, or model.resize_token_embeddings(len(tokenizer))."
    )


def word_level_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token per word, for small worlds: ``<eos>`` is also the padding (nothing may tell them apart by id),
    ``<unk>`` stands for unknown words if ``words`` has it, and there is no BOS."""
    unknown = {"unk_token": "<unk>"} if "<unk>" in words else {}
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, **unknown))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": "<eos>", "padding_side": "left", **unknown}
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **special)
