"""Teacher forcing without padding: all rows behind one another in a single one, and attention row by row.

Everything but attention works on one token at a time, so it need not see any padding. For attention alone the tokens
are spread into padded rows, which the causal kernel takes without a mask, and joined again. Whether a family of models
can be run that way is measured once per model; where it cannot, rows are padded as usual.

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

from textenv.lm.batch import Responses, length_mask, rows
from textenv.lm.frozen import lower_blocks
from textenv.lm.kernels.attention import SHORT, causal_mask, written_out
from textenv.lm.load import Outputs, run

WORTH_IT = 0.05
"""Share of padding from which packing is faster than passing the padding through."""


class Layout(NamedTuple):
    """Where packed tokens stand in B rows of S columns."""

    real: Bool[Tensor, "B S"]
    positions: Int[Tensor, " N"]
    """Column of each token in its row; zeros for ``spare`` more at the end, which belong to no row."""
    spare: int
    starts: Int[Tensor, " B"]
    """Number of the first token of each row."""


def row_layout(lengths: Int[Tensor, " B"], width: int) -> Layout:
    """The layout of rows of the given lengths, padded on the right to ``width``."""
    real = length_mask(lengths, width)
    positions = real.nonzero()[:, 1]
    spare = spare_rows(len(positions), lengths.device)
    return Layout(real, pad(positions, (0, spare)), spare, lengths.cumsum(0) - lengths)


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
    ids = joined.input_ids
    layout = row_layout(lengths, ids.shape[1]) if packed(model, batch) else None
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


def can_pack(model: PreTrainedModel) -> bool:
    """Whether packed rows have the outputs of padded ones: measured once per model, on two short rows."""
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if recomputes or model.config._attn_implementation != "sdpa":
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
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            return False  # the family does not pass the layout on to its attention, or wants another kind of it
    tolerance = 1e-2 if model.dtype.itemsize < 4 else 1e-4
    return torch.allclose(packed.hidden[0], padded.hidden[layout.real], atol=tolerance, rtol=tolerance)


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
    if softcap is not None or kwargs.get("s_aux") is not None:
        raise ValueError("packed attention must be plain attention, got capped logits or sinks. Pad the rows.")
    grouped = query.shape[1] != key.shape[1]
    query, key, value = (_spread(x, layout) for x in (query, key, value))
    size = layout.real.shape[1]
    window = size if sliding_window is None else sliding_window
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and size <= SHORT and dropout == 0:
        mask = causal_mask(size, window, query.device)
        return _join(written_out(query, key, value, mask, scaling), layout), None
    causal: dict[str, Any] = {"is_causal": True}
    if window < size:
        causal = {"attn_mask": causal_mask(size, window, query.device)}
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": grouped, **causal}
    out = scaled_dot_product_attention(query, key, value, **options)
    return _join(out, layout), None


def _join(rows: Float[Tensor, "B A S D"], layout: Layout) -> Float[Tensor, "1 N A D"]:
    tokens = rows.transpose(1, 2)
    if _is_full(layout):
        return tokens.flatten(0, 1)[None]
    return pad(tokens[layout.real], (0, 0, 0, 0, 0, layout.spare))[None]


def _is_full(layout: Layout) -> bool:
    """Whether packed tokens are the rows themselves, one after the other."""
    return len(layout.positions) == layout.real.numel() and layout.spare == 0


def _spread(packed: Float[Tensor, "1 A N D"], layout: Layout) -> Float[Tensor, "B A S D"]:
    tokens = packed[0].transpose(0, 1)
    if _is_full(layout):
        return tokens.unflatten(0, tuple(layout.real.shape)).transpose(1, 2)
    tokens = tokens[: len(tokens) - layout.spare]
    out = tokens.new_zeros(*layout.real.shape, *tokens.shape[1:])
    return out.index_put((layout.real,), tokens).transpose(1, 2)


AttentionInterface.register("packed_rows", _attend)
