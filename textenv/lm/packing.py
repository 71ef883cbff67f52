"""Teacher forcing without padding: all rows behind one another in a single one, and attention row by row.

Everything but attention works on one token at a time, so it need not see any padding. For attention alone the tokens
are spread into padded rows, which the causal kernel takes without a mask, and joined again; long rows in groups of
similar length. Whether a family of models can be run that way is measured once per model; where it cannot, rows are
padded as usual.

Two details are for CPUs. The number of tokens is rounded up by a few per cent at most, since oneDNN compiles and keeps
a kernel for each size of a matrix. And short rows in bfloat16 attend by plain products: the backward pass of PyTorch's
flash attention is many times slower there.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from textenv.lm.batch import Responses, length_buckets, length_mask, rows
from textenv.lm.frozen import lower_blocks
from textenv.lm.heads import Outputs, run
from textenv.lm.kernels.attention import SHORT, causal_mask, written_out

WORTH_IT = 0.05
"""Share of padding from which packing is faster than passing the padding through."""


WIDE = 128
"""Columns from which rows attend in groups: the attention of shorter ones costs less than to part them."""

GROUP_PADDING = 0.2
"""Share of padding that a group of rows may have in attention."""


class Group(NamedTuple):
    """Rows that attend at once."""

    rows: int
    columns: int
    at: Int[Tensor, " n"]
    """Where its real tokens stand, row by row."""


class Layout(NamedTuple):
    """Where packed tokens stand in B rows of S columns."""

    real: Bool[Tensor, "B S"]
    positions: Int[Tensor, " N"]
    """Column of each token in its row; zeros for ``spare`` more at the end, which belong to no row."""
    spare: int
    starts: Int[Tensor, " B"]
    """Number of the first token of each row."""
    groups: list[Group]
    """Parts of the rows, in order."""


def row_layout(lengths: Int[Tensor, " B"], width: int, group_sizes: list[int] | None = None) -> Layout:
    """The layout of rows of the given lengths, padded on the right to ``width``, in groups of so many rows; by default
    in one."""
    real = length_mask(lengths, width)
    positions = real.nonzero()[:, 1]
    spare = spare_rows(len(positions), lengths.device)
    groups = []
    for part in lengths.split(group_sizes or [len(lengths)]):
        mask = length_mask(part, int(part.max()))
        groups.append(Group(len(mask), mask.shape[1], mask.flatten().nonzero()[:, 0]))
    return Layout(real, pad(positions, (0, spare)), spare, lengths.cumsum(0) - lengths, groups)


def spare_rows(count: int, device: torch.device) -> int:
    """How many rows to add to a matrix so that it has one of 16 sizes an octave; none where sizes do not matter."""
    step = 1 << max(0, count.bit_length() - 5)
    return -count % step if device.type == "cpu" else 0


def run_rows(model: PreTrainedModel, batch: Responses) -> tuple[Outputs, tuple[Tensor, Tensor]]:
    """One pass over prompts and responses → ``(outputs, index)``; the index is that of the real response positions.

    Their order is that of ``batch.response_mask``: row by row, step by step.
    """
    joined, lengths = rows(batch), batch.total_lengths
    row, step = batch.response_mask.nonzero(as_tuple=True)
    column = joined.predictors[row, step]
    ids, layout = joined.input_ids, None
    if packed(model, batch):
        groups = [torch.arange(len(ids), device=ids.device)]
        if ids.shape[1] >= WIDE:
            groups = list(length_buckets(lengths, len(ids), max_padding=GROUP_PADDING))
        order = torch.cat(groups)
        ids, lengths, row = ids[order], lengths[order], order.argsort()[row]
        layout = row_layout(lengths, ids.shape[1], [len(group) for group in groups])
    with lower_blocks(model, ids, lengths, spare=None if layout is None else layout.spare):
        if layout is not None:
            return run_packed(model, ids, layout), (torch.zeros_like(row), layout.starts[row] + column)
        # All ones: the padding lies on the right, where a causal model never looks, and no mask means the fast kernel.
        outputs, _ = run(model, ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return outputs, (row, column)


def packed(model: PreTrainedModel, batch: Responses) -> bool:
    """Whether :func:`run_rows` passes these rows without padding."""
    lengths = batch.total_lengths
    padding = 1 - int(lengths.sum()) / max(1, len(lengths) * int(lengths.max()))
    return (padding > WORTH_IT or _in_bfloat16_on_cpu(model)) and can_pack(model)


def _in_bfloat16_on_cpu(model: PreTrainedModel) -> bool:
    here = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return model.device.type == "cpu" and (here or model.dtype == torch.bfloat16)


_packs: "weakref.WeakKeyDictionary[PreTrainedModel, bool]" = weakref.WeakKeyDictionary()
_blocks: "weakref.WeakKeyDictionary[PreTrainedModel, list[Any]]" = weakref.WeakKeyDictionary()


def can_pack(model: PreTrainedModel) -> bool:
    """Whether packed rows have the outputs of padded ones: measured once per model, on two short rows."""
    if model not in _blocks:  # found once, since every pass asks
        _blocks[model] = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    recomputes = any(block.gradient_checkpointing for block in _blocks[model])
    # What transformers takes by itself; another kind was asked for.
    usual = "sdpa" if model._supports_sdpa else "eager"
    if recomputes or model.config._attn_implementation != usual:
        return False  # a recomputation would come after the attention has been switched back
    if model not in _packs:
        _packs[model] = _same_outputs(model)
    return _packs[model]


@torch.no_grad()
def _same_outputs(model: PreTrainedModel) -> bool:
    lengths = torch.tensor([3, 5], device=model.device)
    ids = torch.arange(10, device=model.device).view(2, 5) % model.config.vocab_size
    layout = row_layout(lengths, 5)
    with torch.autocast(model.device.type, enabled=False):
        padded, _ = run(model, ids, attention_mask=torch.ones_like(ids), use_cache=False)
        try:
            packed = run_packed(model, ids, layout)
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError):
            return False  # the family does not pass the layout on to its attention, or wants another kind of it
    expected = padded.hidden[layout.real].float()
    # Pretrained models have a few hidden numbers that are many times as large as all others, so of each token's vector.
    tolerance = (0.1 if model.dtype.itemsize < 4 else 1e-4) * expected.norm(dim=-1)
    return bool(((packed.hidden[0] - expected).norm(dim=-1) <= tolerance).all())


def run_packed(
    model: PreTrainedModel, ids: Int[Tensor, "B S"], layout: Layout, cache: DynamicCache | None = None
) -> Outputs:
    """One pass over the real tokens alone, as ``[1, N]``; ``cache`` takes their keys and values, in one row, and after
    them those of the spare ones."""
    with _packed_attention(model):
        tokens = pad(ids[layout.real], (0, layout.spare))[None]
        where: dict[str, Any] = {"attention_mask": torch.ones_like(tokens), "position_ids": layout.positions[None]}
        where |= {"past_key_values": cache, "use_cache": cache is not None}
        outputs, _ = run(model, tokens, **where, layout=layout)
    return outputs


@contextlib.contextmanager
def _packed_attention(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.config._attn_implementation = "packed_rows"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _attend(
    module: Any,
    query: Float[Tensor, "1 A N D"],
    key: Float[Tensor, "1 K N D"],
    value: Float[Tensor, "1 K N D"],
    attention_mask: None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 N A D"], None]:
    """Causal attention within each row; the interface is that of transformers' attention functions."""
    if kwargs.get("s_aux") is not None:
        raise ValueError("packed attention must be attention within a row, got sinks. Pad the rows.")
    options = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, "softcap": softcap}
    sizes = [*(len(group.at) for group in layout.groups), layout.spare]
    queries, keys, values = (x[0].transpose(0, 1).split(sizes) for x in (query, key, value))
    parts = [
        _attend_in_rows(group, *tokens, **options)
        for group, *tokens in zip(layout.groups, queries, keys, values, strict=False)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return (pad(out, (0, 0, 0, 0, 0, layout.spare)) if layout.spare else out)[None], None


def _attend_in_rows(
    group: Group,
    query: Float[Tensor, "n A D"],
    key: Float[Tensor, "n K D"],
    value: Float[Tensor, "n K D"],
    *,
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Float[Tensor, "n A D"]:
    """The attention of the packed tokens of a group."""
    size, grouped = group.columns, query.shape[1] != key.shape[1]
    query, key, value = (_spread(x, group) for x in (query, key, value))
    window = size if sliding_window is None else sliding_window
    # The values tell the precision: under autocast some families rotate queries and keys in float32.
    slow = value.device.type == "cpu" and value.dtype == torch.bfloat16 and size <= SHORT and dropout == 0
    if slow or softcap is not None:
        mask = causal_mask(size, window, query.device)
        out = written_out(query, key, value, mask, scaling, softcap=softcap, dropout=dropout)
        return _join(out, group)
    causal: dict[str, Any] = {"is_causal": True}
    if window < size:
        causal = {"attn_mask": causal_mask(size, window, query.device)}
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": grouped, **causal}
    return _join(scaled_dot_product_attention(query, key, value, **options), group)


def _spread(tokens: Float[Tensor, "n A D"], group: Group) -> Float[Tensor, "b A s D"]:
    count = group.rows * group.columns
    if len(tokens) < count:
        tokens = tokens.new_zeros(count, *tokens.shape[1:]).index_copy(0, group.at, tokens)
    return tokens.unflatten(0, (group.rows, group.columns)).transpose(1, 2)


def _join(rows: Float[Tensor, "b A s D"], group: Group) -> Float[Tensor, "n A D"]:
    tokens = rows.transpose(1, 2).flatten(0, 1)
    return tokens.index_select(0, group.at) if len(group.at) < len(tokens) else tokens


AttentionInterface.register("packed_rows", _attend)
