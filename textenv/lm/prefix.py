"""Outputs at the end of many prefixes, for agents that step token by token.

* :func:`prefix_outputs` computes them at once, with gradient; a prefix of another row costs nothing.
* :class:`PrefixCache` keeps keys and values between calls, so that a row one token longer costs one token.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from textenv.lm.batch import length_mask
from textenv.lm.heads import run


def prefix_outputs(
    model: PreTrainedModel, ids: Int[Tensor, "B S"], lengths: Int[Tensor, " B"]
) -> tuple[Float[Tensor, "B V"], Float[Tensor, "B H"]]:
    """Logits and hidden states at the last real token of right-padded rows, with gradient.

    A row that is a prefix of another is read off that one. A minibatch of single steps holds many such rows, one for
    each step of the same episode.
    """
    longest, owner = longest_rows(ids, lengths)
    outputs, _ = run(model, longest, attention_mask=torch.ones_like(longest), use_cache=False)
    return outputs.at((owner, lengths - 1))


def longest_rows(ids: Int[Tensor, "B S"], lengths: Int[Tensor, " B"]) -> tuple[Int[Tensor, "U S"], Int[Tensor, " B"]]:
    """The rows that are no prefix of another, each once, and for every row the number of one that it is a prefix of."""
    real = length_mask(lengths, ids.shape[1])
    rows, inverse = torch.unique(ids.masked_fill(~real, -1), dim=0, return_inverse=True)
    # Sorted, with −1 beyond the end: a row that is a prefix of any other is a prefix of the next one.
    begins = ((rows[:-1] == rows[1:]) | (rows[:-1] < 0)).all(1)
    longest = torch.cat([~begins, begins.new_ones(1)])
    owner = longest.cumsum(0) - longest.long()
    return rows[longest].clamp(min=0), owner[inverse]


Pairs = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, ``[N, heads, W, D]``; all rows end in the last column."""


class _Held(NamedTuple):
    """What the cache holds of N rows."""

    pairs: Pairs
    ids: Int[Tensor, "N S"]
    lengths: Int[Tensor, " N"]
    weights: tuple
    """Which weights the keys and values were computed with."""


class PrefixCache:
    """Keys and values of N rows of tokens that grow side by side, each at its own length.

    A row that extends its cached tokens by one costs one token. Any other row (a new episode, another environment) is
    computed afresh, so results never depend on earlier calls. So is every row after the weights change in place; call
    :meth:`forget` after changes that PyTorch does not count (a fused optimiser).
    """

    def __init__(self) -> None:
        self._held: _Held | None = None

    def forget(self) -> None:
        """Free the memory; the next call computes every row afresh."""
        self._held = None

    @torch.no_grad()
    def outputs(
        self, model: PreTrainedModel, ids: Int[Tensor, "N S"], lengths: Int[Tensor, " N"]
    ) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N H"]]:
        """The result of :func:`prefix_outputs`, up to float rounding and without gradient."""
        weights = tuple((p.data_ptr(), p._version) for p in model.parameters())
        held, self._held = self._held, None  # an interrupted call leaves nothing half done
        if held is None or held.weights != weights or len(held.ids) != len(ids):
            held = _Held([], ids, torch.full_like(lengths, -1), weights)
        before = lengths - 1
        mask = length_mask(lengths, int(lengths.max())).flip(1).long()
        context: dict[str, Any] = {"attention_mask": mask, "position_ids": before[:, None]}
        context["past_key_values"] = _cache(_completed(held, model, ids, before))
        outputs, cache = run(model, ids.gather(1, before[:, None]), **context, use_cache=True)
        self._held = _Held(_pairs(cache), ids, lengths, weights)
        return outputs.at((slice(None), -1))


def _completed(held: _Held, model: PreTrainedModel, ids: Int[Tensor, "N S"], before: Int[Tensor, " N"]) -> Pairs:
    """Keys and values of the first ``before`` tokens of every row, in ``before.max()`` columns."""
    width = int(before.max())
    pairs = [(aligned(keys, width), aligned(values, width)) for keys, values in held.pairs]
    missing = (~_holds(held, ids, before) & (before > 0)).nonzero().squeeze(1)
    if len(missing):
        fresh = _prefill(model, ids[missing], before[missing])
        if not pairs:
            room = lambda like: like.new_zeros(len(ids), like.shape[1], width, like.shape[3])  # noqa: E731
            pairs = [(room(keys), room(values)) for keys, values in fresh]
        for pair, new in zip(pairs, fresh, strict=True):
            for kept, computed in zip(pair, new, strict=True):
                kept[missing, :, width - computed.shape[2] :] = computed
    return pairs


def _holds(held: _Held, ids: Int[Tensor, "N S"], before: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Rows of which the cache holds exactly the first ``before`` tokens."""
    width = min(ids.shape[1], held.ids.shape[1])
    same = (ids[:, :width] == held.ids[:, :width]) | ~length_mask(before, width)
    return (held.lengths == before) & same.all(1)


def _prefill(model: PreTrainedModel, ids: Int[Tensor, "n S"], lengths: Int[Tensor, " n"]) -> Pairs:
    """Keys and values of right-padded rows; the padding moves to the left."""
    mask = length_mask(lengths, int(lengths.max())).flip(1)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    tokens = ids.gather(1, positions).masked_fill(~mask, 0)
    context = {"attention_mask": mask.long(), "position_ids": positions, "past_key_values": _cache([])}
    _, cache = run(model, tokens, **context, use_cache=True)
    return _pairs(cache)


def aligned(old: Tensor, width: int) -> Tensor:
    """The last ``width`` columns of ``[N, heads, W, D]``, with zeros before them where there are fewer."""
    spare = old.shape[2] - width
    return old[:, :, spare:] if spare >= 0 else pad(old, (0, 0, -spare, 0))


def _cache(pairs: Pairs) -> DynamicCache:
    cache = DynamicCache()
    for keys, values in pairs:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _pairs(cache: DynamicCache) -> Pairs:
    pairs: Pairs = []
    for layer in cache.layers:
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            rule = "a prefix cache needs a model of attention layers that keep every token"
            raise ValueError(f"{rule}, got cache layer {type(layer).__name__}. Turn the cache off (use_cache=False).")
        pairs.append((layer.keys, layer.values))
    return pairs
