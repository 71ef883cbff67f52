"""Rows of tokens that grow side by side: with a KV cache where the model allows it, else by whole passes.

Which of the two is measured once a model, not looked up in a list of families.
"""

import logging
import weakref
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from textenv.lm.batch import Responses, length_mask, rows
from textenv.lm.heads import output_embeddings, run
from textenv.lm.packing import packed, row_layout, run_packed
from textenv.lm.prefix import aligned, prefix_outputs

_log = logging.getLogger(__name__)


class Decoding(Protocol):
    """N rows, each at its own length."""

    def outputs(self) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N H"]]:
        """Logits and hidden states at the last token of each row."""
        ...

    def append(self, tokens: Int[Tensor, " N"]) -> None:
        """Add one token to each row."""
        ...

    def keep(self, index: Int[Tensor, " n"]) -> None:
        """Go on with these rows only, before the next token is added."""
        ...

    @property
    def can_join(self) -> bool:
        """Whether rows may come in later."""
        ...

    def join(self, prompt_ids: Int[Tensor, "n P"], lengths: Int[Tensor, " n"]) -> None:
        """More rows, behind the others; the next token that they are given is the last one of their prompts."""
        ...


class CachedDecoding:
    """Rows padded on the left, so that all end in one column; a new token costs one token.

    Rows of the same prompt are read once.
    """

    def __init__(
        self, model: PreTrainedModel, prompt_ids: Int[Tensor, "N P"], lengths: Int[Tensor, " N"], room: int = 0
    ) -> None:
        """``room`` is the number of tokens to come, as far as it is known."""
        prompt_ids = prompt_ids[:, prompt_ids.shape[1] - int(lengths.max()) :]
        self.model, self.room = model, room
        self._prompts: tuple[Tensor, Tensor] | None = (prompt_ids, lengths)
        self.cache: Any = None
        self.attention = length_mask(lengths, prompt_ids.shape[1]).flip(1).long()
        self.positions = lengths[:, None] - 1

    def outputs(self) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N H"]]:
        if self._prompts is not None:
            prompts, self._prompts = self._prompts, None
            self.cache, logits, hidden = _read(self.model, *prompts, self.room)
            return logits, hidden
        context = {"attention_mask": self.attention, "position_ids": self.positions, "past_key_values": self.cache}
        outputs, self.cache = run(self.model, self.tokens, **context, use_cache=True)
        return outputs.at((slice(None), -1))

    def append(self, tokens: Int[Tensor, " N"]) -> None:
        self.tokens = tokens[:, None]
        self.positions = self.positions + 1
        self.attention = pad(self.attention, (0, 1), value=1)

    def keep(self, index: Int[Tensor, " n"]) -> None:
        self.cache.reorder_cache(index)
        self.positions, self.attention = self.positions[index], self.attention[index]

    @property
    def can_join(self) -> bool:
        return all(type(layer) is RoomyLayer for layer in self.cache.layers)

    def join(self, prompt_ids: Int[Tensor, "n P"], lengths: Int[Tensor, " n"]) -> None:
        before = lengths - 1
        width = max(1, int(self.attention.sum(1).max()), int(before.max()))
        # A prompt of one token has nothing to read; what is read in its place is never looked at.
        fresh = _read(self.model, prompt_ids[:, : max(1, prompt_ids.shape[1] - 1)], before.clamp(min=1), self.room)
        for layer, other in zip(self.cache.layers, fresh.cache.layers, strict=True):
            layer.join(other, width)
        held = self.attention[:, -width:]
        held = pad(held, (width - held.shape[1], 0))
        self.attention = torch.cat([held, length_mask(before, width).flip(1).long()])
        self.positions = torch.cat([self.positions, before[:, None] - 1])


class RoomyLayer(DynamicLayer):
    """Keys and values ``[N, heads, W, D]``: the first rows and columns of larger tensors.

    A token is written into them, and only rows that move are copied. transformers' own layer copies all that it holds
    for every token, and again for every choice of rows.
    """

    keys: Tensor  # type: ignore[bad-override]  (never without)
    values: Tensor  # type: ignore[bad-override]

    def __init__(self, keys: Float[Tensor, "N A W D"], values: Float[Tensor, "N A W E"], room: int) -> None:
        """``room`` columns are kept free for tokens to come; more are made when they are full."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self._extra = max(1, room)
        self._hold(keys, values)

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        width = keys.shape[2]
        self._stores = [x.new_empty(*x.shape[:2], width + self._extra, x.shape[3]) for x in (keys, values)]
        for store, held in zip(self._stores, (keys, values), strict=True):
            store[:, :, :width] = held
        self._show(len(keys), width)

    def _show(self, rows: int, width: int) -> None:
        self.keys, self.values = (store[:rows, :, :width] for store in self._stores)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the columns of new tokens."""
        rows, start = self.keys.shape[0], self.keys.shape[2]
        end = start + key_states.shape[2]
        while end > self._stores[0].shape[2]:
            self._hold(self.keys, self.values)
        for store, new in zip(self._stores, (key_states, value_states), strict=True):
            store[:rows, :, start:end] = new
        self._show(rows, end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Int[Tensor, " n"]) -> None:
        """Go on with these rows; those that stay where they are cost nothing."""
        moved = (beam_idx != torch.arange(len(beam_idx), device=beam_idx.device)).nonzero().squeeze(1)
        source = beam_idx[moved]
        for held in (self.keys, self.values):
            held[moved] = held[source]
        self._show(len(beam_idx), self.keys.shape[2])

    def join(self, other: "RoomyLayer", width: int) -> None:
        """More rows, behind these; of all, the last ``width`` columns are kept."""
        pairs = zip((self.keys, self.values), (other.keys, other.values), strict=True)
        keys, values = (torch.cat([aligned(old, width), aligned(new, width)]) for old, new in pairs)
        self._hold(keys, values)


class _Read(NamedTuple):
    """N prompts, read."""

    cache: Any
    logits: Float[Tensor, "N V"]
    """At the last token."""
    hidden: Float[Tensor, "N H"]


def _read(model: PreTrainedModel, prompt_ids: Int[Tensor, "N P"], lengths: Int[Tensor, " N"], room: int) -> _Read:
    """Read left-padded prompts into a cache for rows padded on the left; equal ones are read once."""
    unique, owner = _distinct(prompt_ids, lengths)
    real = unique >= 0
    count = real.sum(1)
    batch = Responses(unique.clamp(min=0), count, unique[:, :0], torch.zeros_like(count))
    cache = DynamicCache(config=model.config)
    if packed(model, batch) and all(type(layer) is DynamicLayer for layer in cache.layers):
        ids = rows(batch).input_ids
        layout = row_layout(count, ids.shape[1])
        outputs = run_packed(model, ids, layout, cache)
        ends = layout.starts + count
        index = (ends[:, None] - torch.arange(ids.shape[1], 0, -1, device=ids.device)).clamp(min=0)[owner]
        logits, hidden = outputs.at((torch.zeros_like(ends), ends - 1))
    else:
        context = {"attention_mask": real.long(), "position_ids": (real.cumsum(1) - 1).clamp(min=0)}
        outputs, cache = run(model, batch.prompt_ids, **context, use_cache=True)
        index = owner
        logits, hidden = outputs.at((slice(None), -1))
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            cache.layers[number] = RoomyLayer(_picked(layer.keys, index), _picked(layer.values, index), room)
        else:
            layer.reorder_cache(index)  # type: ignore[arg-type]
    return _Read(cache, logits[owner], hidden[owner])


def _picked(held: Float[Tensor, "U A S D"], index: Int[Tensor, " N"] | Int[Tensor, "N W"]) -> Float[Tensor, "N A W D"]:
    """Rows ``[N]`` of keys or values, or tokens ``[N, W]`` of a single packed row."""
    return held[index] if index.ndim == 1 else held[0][:, index].transpose(0, 1)


def _distinct(
    prompt_ids: Int[Tensor, "N P"], lengths: Int[Tensor, " N"]
) -> tuple[Int[Tensor, "U P"], Int[Tensor, " N"]]:
    """Each prompt once, with −1 on its padding, and for every row the number of its prompt."""
    prompts = prompt_ids.masked_fill(~length_mask(lengths, prompt_ids.shape[1]).flip(1), -1)
    unique, owner = torch.unique(prompts, dim=0, return_inverse=True)
    if len(unique) == len(prompts):
        return prompts, torch.arange(len(prompts), device=prompts.device)
    return unique, owner


class WholeDecoding:
    """Rows padded on the right, read from the start for every token: slow, and right for every causal model."""

    def __init__(
        self, model: PreTrainedModel, prompt_ids: Int[Tensor, "N P"], lengths: Int[Tensor, " N"], room: int = 0
    ) -> None:
        none = prompt_ids[:, :0], torch.zeros_like(lengths)
        self.model, self.ids, self.lengths = model, rows(Responses(prompt_ids, lengths, *none)).input_ids, lengths

    def outputs(self) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N H"]]:
        return prefix_outputs(self.model, self.ids, self.lengths)

    def append(self, tokens: Int[Tensor, " N"]) -> None:
        self.ids = pad(self.ids, (0, 1)).scatter(1, self.lengths[:, None], tokens[:, None])
        self.lengths = self.lengths + 1

    def keep(self, index: Int[Tensor, " n"]) -> None:
        self.ids, self.lengths = self.ids[index], self.lengths[index]

    @property
    def can_join(self) -> bool:
        return True

    def join(self, prompt_ids: Int[Tensor, "n P"], lengths: Int[Tensor, " n"]) -> None:
        new = WholeDecoding(self.model, prompt_ids, lengths)
        width = max(self.ids.shape[1], new.ids.shape[1])
        self.ids = torch.cat([pad(ids, (0, width - ids.shape[1])) for ids in (self.ids, new.ids)])
        self.lengths = torch.cat([self.lengths, lengths - 1])


def decoding(
    model: PreTrainedModel, prompt_ids: Int[Tensor, "N P"], lengths: Int[Tensor, " N"], room: int = 0
) -> Decoding:
    """The fastest way that is right to continue left-padded prompts by ``room`` tokens."""
    return (CachedDecoding if decodes_with_cache(model) else WholeDecoding)(model, prompt_ids, lengths, room)


_with_cache: "weakref.WeakKeyDictionary[PreTrainedModel, bool]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def decodes_with_cache(model: PreTrainedModel) -> bool:
    """Whether a left-padded batch with a cache yields what the model itself says of each row: measured once a model.

    It is false for families whose state runs through padding, or that keep it elsewhere (Mamba, RWKV, RecurrentGemma).

    Raises:
        ValueError: whole passes do not yield it either, since the model looks at later tokens or says NaN.
    """
    if model not in _with_cache:
        with torch.autocast(model.device.type, enabled=False):
            _with_cache[model] = _equals_own(model, CachedDecoding)
            if not _with_cache[model] and not _equals_own(model, WholeDecoding):
                _check_finite(model)
                rule = "a language model must predict each token from those before it alone"
                raise ValueError(f"{rule}, got {type(model).__name__}. Use a causal language model.")
            if not _with_cache[model]:
                _log.warning("%s is wrong with a cache: every token reads its row anew.", type(model).__name__)
    return _with_cache[model]


def _check_finite(model: PreTrainedModel) -> None:
    """Refuse a model whose weights or logits are no numbers."""
    rule = f"a language model must predict with finite numbers, got {type(model).__name__} with"
    remedy = "Load a checkpoint from before the training diverged."
    broken = [name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]
    if broken:
        raise ValueError(f"{rule} NaN or infinite entries in {len(broken)} weights, first {broken[0]}. {remedy}")
    ids = torch.arange(2, device=model.device)[None]
    if not bool(model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.isfinite().all()):
        raise ValueError(f"{rule} NaN or infinite logits. {remedy} If it is in half precision, use dtype='float32'.")


_Kind = type[CachedDecoding] | type[WholeDecoding]


def _equals_own(model: PreTrainedModel, kind: _Kind) -> bool:
    """Whether rows are decoded to what the model's own pass over each says.

    In half precision a few tokens of a pretrained model differ by rounding as much as by a wrong cache, most of them
    special ones. So tokens are taken from three places of the vocabulary there, of which one must agree.
    """
    exact = torch.finfo(model.dtype).bits >= 32
    places, most = ((0.5,), 1e-4) if exact else ((0.25, 0.5, 0.75), 0.1)
    return any(_distance(model, kind, place, exact) < most for place in places)


def _distance(model: PreTrainedModel, kind: _Kind, place: float, exact: bool) -> float:
    """Two rows of unlike length, decoded and reordered: how far the worse is from the model's own pass over it. Total
    variation of the next token if ``exact``, else the distance of the logits as a share of their length. ``place`` is
    that of the tokens in the vocabulary, from 0 to 1."""
    size = output_embeddings(model).weight.shape[0]
    ids = (int(place * size) + torch.arange(5, device=model.device)) % size
    long, short = ids[:3], ids[3:]
    each = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in (short, long)]
    own = torch.cat([model(**row, use_cache=False).logits[:, -1] for row in each])
    prompts = torch.stack([long[:2], ids[2:4]])  # the short row is its second token alone
    try:
        decoder = kind(model, prompts, torch.tensor([2, 1], device=model.device))
        decoder.outputs()
        decoder.keep(torch.tensor([1, 0], device=model.device))
        decoder.append(torch.stack([short[-1], long[-1]]))
        logits = decoder.outputs()[0]
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return float("inf")
    own = own.to(logits.dtype)
    if exact:
        return float(((logits.softmax(-1) - own.softmax(-1)).abs().sum(-1) / 2).max())
    logits, own = (x - x.mean(-1, keepdim=True) for x in (logits, own))
    return float(((logits - own).norm(dim=-1) / own.norm(dim=-1)).max())
