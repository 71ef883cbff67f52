"""Rows of tokens that grow side by side: with a KV cache where the model allows it, else by whole passes.

Which of the two is measured once a model, not looked up in a list of families.
"""

import weakref
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from textenv.lm.batch import Responses, length_mask, rows
from textenv.lm.load import output_embeddings, run
from textenv.lm.prefix import prefix_outputs


class Decoding(Protocol):
    """N rows, each at its own length."""

    def outputs(self) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N H"]]:
        """Logits and hidden states at the last token of each row."""
        ...

    def append(self, tokens: Int[Tensor, " N"]) -> None:
        """Add one token to each row."""
        ...

    def keep(self, index: Int[Tensor, " n"]) -> None:
        """Go on with these rows only."""
        ...


class CachedDecoding:
    """Rows padded on the left, so that all end in one column; a new token costs one token."""

    def __init__(self, model: PreTrainedModel, prompt_ids: Int[Tensor, "N P"], lengths: Int[Tensor, " N"]) -> None:
        self.model, self.tokens, self.cache = model, prompt_ids, None
        self.attention = length_mask(lengths, prompt_ids.shape[1]).flip(1).long()
        self.positions = (self.attention.cumsum(1) - 1).clamp(min=0)

    def outputs(self) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N H"]]:
        context = {"attention_mask": self.attention, "position_ids": self.positions, "past_key_values": self.cache}
        outputs, self.cache = run(self.model, self.tokens, **context, use_cache=True)
        return outputs.at((slice(None), -1))

    def append(self, tokens: Int[Tensor, " N"]) -> None:
        self.tokens = tokens[:, None]
        self.positions = self.positions[:, -1:] + 1
        self.attention = pad(self.attention, (0, 1), value=1)

    def keep(self, index: Int[Tensor, " n"]) -> None:
        self.cache.reorder_cache(index)  # type: ignore[union-attr]
        self.tokens, self.positions, self.attention = (x[index] for x in (self.tokens, self.positions, self.attention))


class WholeDecoding:
    """Rows padded on the right, read from the start for every token: slow, and right for every causal model."""

    def __init__(self, model: PreTrainedModel, prompt_ids: Int[Tensor, "N P"], lengths: Int[Tensor, " N"]) -> None:
        none = prompt_ids[:, :0], torch.zeros_like(lengths)
        self.model, self.ids, self.lengths = model, rows(Responses(prompt_ids, lengths, *none)).input_ids, lengths

    def outputs(self) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N H"]]:
        return prefix_outputs(self.model, self.ids, self.lengths)

    def append(self, tokens: Int[Tensor, " N"]) -> None:
        self.ids = pad(self.ids, (0, 1)).scatter(1, self.lengths[:, None], tokens[:, None])
        self.lengths = self.lengths + 1

    def keep(self, index: Int[Tensor, " n"]) -> None:
        self.ids, self.lengths = self.ids[index], self.lengths[index]


def decoding(model: PreTrainedModel, prompt_ids: Int[Tensor, "N P"], lengths: Int[Tensor, " N"]) -> Decoding:
    """The fastest way that is right to continue left-padded prompts."""
    return (CachedDecoding if decodes_with_cache(model) else WholeDecoding)(model, prompt_ids, lengths)


_with_cache: "weakref.WeakKeyDictionary[PreTrainedModel, bool]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def decodes_with_cache(model: PreTrainedModel) -> bool:
    """Whether a left-padded batch with a cache yields what the model itself says of each row: measured once a model.

    It is false for families whose state runs through padding, or that keep it elsewhere (Mamba, RWKV, RecurrentGemma).

    Raises:
        ValueError: whole passes do not yield it either, since the model looks at later tokens.
    """
    if model not in _with_cache:
        with torch.autocast(model.device.type, enabled=False):
            _with_cache[model] = _equals_own(model, CachedDecoding)
            if not _with_cache[model] and not _equals_own(model, WholeDecoding):
                rule = "a language model must predict each token from those before it alone"
                raise ValueError(f"{rule}, got {type(model).__name__}. Use a causal language model.")
    return _with_cache[model]


def _equals_own(model: PreTrainedModel, kind: type[CachedDecoding] | type[WholeDecoding]) -> bool:
    """Two rows of unlike length, decoded and reordered, against the model's own pass over each."""
    exact = torch.finfo(model.dtype).bits >= 32
    ids = torch.arange(1, 6, device=model.device) % output_embeddings(model).weight.shape[0]
    long, short = ids[:3], ids[3:]
    each = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in (short, long)]
    own = torch.cat([model(**row, use_cache=False).logits[:, -1] for row in each])
    prompts = torch.stack([long[:2], ids[2:4]])  # the short row is its second token alone
    try:
        decoder = kind(model, prompts, torch.tensor([2, 1], device=model.device))
        decoder.outputs()
        decoder.append(torch.stack([long[-1], short[-1]]))
        decoder.keep(torch.tensor([1, 0], device=model.device))
        logits = decoder.outputs()[0]
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    distance = (logits.softmax(-1) - own.to(logits.dtype).softmax(-1)).abs().sum(-1) / 2
    return bool((distance < (1e-4 if exact else 0.05)).all())
