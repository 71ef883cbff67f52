"""Frozen lower blocks, run once a row: later passes over the same rows start above them.

What the last frozen block says of a row depends on its tokens alone, so it is kept under these. In a later pass the
frozen blocks answer with what was kept instead of computing it. Whether a family of models can be run that way is
measured once per model; where it cannot, every pass computes all blocks, and the log says so.
"""

import contextlib
import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from textenv.lm.batch import length_mask
from textenv.lm.heads import run

_log = logging.getLogger(__name__)


class _Kept:
    """Outputs of the last of some blocks."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = blocks
        self.rows: dict[bytes, Float[Tensor, "S H"]] = {}
        """By the tokens of the row."""


_kept: "weakref.WeakKeyDictionary[PreTrainedModel, _Kept]" = weakref.WeakKeyDictionary()
_fits: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[int, bool]]" = weakref.WeakKeyDictionary()
"""Whether so many lower blocks of a model can be skipped."""


@contextlib.contextmanager
def kept_activations(*models: PreTrainedModel | None) -> Iterator[None]:
    """Inside it, frozen lower blocks of these models are run once for each row that passes ``run_rows``; nothing may
    change them. Holds ``hidden_size`` numbers per token."""
    for model in models:
        blocks = [] if model is None else frozen_blocks(model)
        if model is not None and blocks and _can_skip(model, blocks):
            _kept[model] = _Kept(blocks)
    try:
        yield
    finally:
        for model in models:
            if model is not None:
                _kept.pop(model, None)


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks of a transformer, from the bottom; empty where they are not a list of their own."""
    total = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == total]
    return list(lists[0]) if lists else []


def frozen_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks below the first one with a weight to train."""
    blocks = blocks_of(model)
    trained = [i for i, block in enumerate(blocks) if any(weight.requires_grad for weight in block.parameters())]
    return blocks[: min(trained, default=0)]


@contextlib.contextmanager
def lower_blocks(
    model: PreTrainedModel, ids: Int[Tensor, "B S"], lengths: Int[Tensor, " B"], *, spare: int | None
) -> Iterator[None]:
    """Around one pass over right-padded rows, or over the same rows packed behind one another, with ``spare`` further
    tokens: keep what the frozen blocks say, or say it in their place."""
    kept = _kept.get(model)
    if kept is None:
        yield
        return
    sizes = lengths.tolist()
    keys = [row[:size].tobytes() for row, size in zip(ids.cpu().numpy(), sizes, strict=True)]
    if kept.rows.keys() >= set(keys):
        known = [kept.rows[key] for key in keys]
        padded = (
            pad_sequence(known, batch_first=True) if spare is None else pad(torch.cat(known), (0, 0, 0, spare))[None]
        )
        with _answering(kept.blocks, padded):
            yield
        return
    with _listening(kept.blocks[-1]) as heard:
        yield
    tokens = heard[-1][length_mask(lengths, ids.shape[1])] if spare is None else heard[-1][0, : sum(sizes)]
    kept.rows.update(zip(keys, tokens.split(sizes), strict=True))


@contextlib.contextmanager
def _listening(block: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of a block."""
    heard: list[Tensor] = []
    hook = block.register_forward_hook(lambda module, inputs, output: heard.append(output))
    try:
        yield heard
    finally:
        hook.remove()


@contextlib.contextmanager
def _answering(blocks: Sequence[nn.Module], output: Tensor) -> Iterator[None]:
    """Blocks that compute nothing and return ``output``."""
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _can_skip(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> bool:
    known = _fits.get(model)
    if known is None or known[0] != len(blocks):
        fits = _same_outputs(model, blocks)
        if not fits:
            name = type(model).__name__
            _log.warning("%s: its %d frozen blocks are computed anew in every pass over a batch.", name, len(blocks))
        known = _fits[model] = len(blocks), fits
    return known[1]


def _same_outputs(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> bool:
    """Whether a pass without the blocks has the outputs of one with them, after another one in between, and no gradient
    would have reached below them."""

    def hidden(ids: Tensor) -> Any:
        return run(model, ids, attention_mask=torch.ones_like(ids), use_cache=False)[0].hidden

    ids = torch.arange(10, device=model.device).view(2, 5) % model.config.get_text_config().vocab_size
    with torch.enable_grad(), _listening(blocks[-1]) as heard:
        whole = hidden(ids)
    if not all(isinstance(output, Tensor) and not output.requires_grad for output in heard):
        return False  # something below the blocks is trained, or they return more than hidden states
    with torch.no_grad():
        hidden(ids.flip(1))
        with _answering(blocks, heard[-1]):
            return torch.allclose(hidden(ids), whole, atol=1e-6, rtol=1e-5)
