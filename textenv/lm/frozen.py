"""Frozen lower blocks, run once a row: later passes over the same rows start above them.

What the last frozen block says of a row depends on its tokens alone, so it is kept under these. In a later pass the
frozen blocks answer with what was kept instead of computing it. Whether a family of models can be run that way is
measured once per model; where it cannot, every pass computes all blocks, and the log says so. A reference whose lower
blocks have the weights of the policy's frozen ones says the same, so each serves the other.
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

    def __init__(self, blocks: Sequence[nn.Module], rows: dict[bytes, Float[Tensor, "S H"]] | None = None) -> None:
        self.blocks = blocks
        self.rows = {} if rows is None else rows
        """By the tokens of the row."""


_kept: "weakref.WeakKeyDictionary[PreTrainedModel, _Kept]" = weakref.WeakKeyDictionary()
_fits: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[Any, bool]]" = weakref.WeakKeyDictionary()
"""Whether so many lower blocks of a model can be skipped, with these weights trained."""
_alike: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[weakref.ref[PreTrainedModel], bool]]" = (
    weakref.WeakKeyDictionary()
)
"""Whether lower blocks of a model say what those of another one say that have the same weights."""


@contextlib.contextmanager
def kept_activations(*models: PreTrainedModel | None) -> Iterator[None]:
    """Inside it, frozen lower blocks of these models are run once for each row that passes ``run_rows``; nothing may
    change them. Holds ``hidden_size`` numbers per token. A model that is kept already goes on with that."""
    opened = []
    for model in models:
        blocks = [] if model is None or model in _kept else frozen_blocks(model)
        if model is not None and blocks and _can_skip(model, blocks):
            _kept[model] = _Kept(blocks)
            opened.append(model)
    try:
        yield
    finally:
        for model in opened:
            _kept.pop(model, None)


@contextlib.contextmanager
def shared_activations(policy: PreTrainedModel, reference: PreTrainedModel) -> Iterator[None]:
    """Inside it, a policy and a reference that is equal to it below keep what their lower blocks say of a row, each for
    the other; of other references nothing is kept."""
    blocks = frozen_blocks(policy)
    lower = blocks_of(reference)[: len(blocks)]
    shared = bool(blocks) and _can_skip(policy, blocks) and _equal_below(policy, reference, len(blocks))
    if shared and _can_skip(reference, lower, trained=False):
        _kept[policy] = _Kept(blocks)
        _kept[reference] = _Kept(lower, _kept[policy].rows)
    try:
        yield
    finally:
        for model in (policy, reference):
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


def _can_skip(model: PreTrainedModel, blocks: Sequence[nn.Module], *, trained: bool = True) -> bool:
    """``trained``: its passes have gradients, of which none may reach below the blocks."""
    state = len(blocks), tuple(weight.requires_grad for weight in model.parameters())
    known = _fits.get(model)
    if known is None or known[0] != state:
        fits = _same_outputs(model, blocks, trained=trained)
        if not fits:
            name = type(model).__name__
            _log.warning("%s: its %d frozen blocks are computed anew in every pass over a batch.", name, len(blocks))
        known = _fits[model] = state, fits
    return known[1]


def _equal_below(policy: PreTrainedModel, reference: PreTrainedModel, depth: int) -> bool:
    """Whether the lower blocks of two models, and all that their inputs come from, are equal. All weights are compared
    each time: a fused optimiser leaves no trace of having changed one."""
    if type(policy) is not type(reference) or policy.dtype != reference.dtype:
        return False
    mine, theirs = blocks_of(policy)[:depth], blocks_of(reference)[:depth]
    for one, other in zip((policy, *mine), (reference, *theirs), strict=True):
        kinds = nn.Embedding if one is policy else nn.Module  # above the blocks there may be what is trained
        weights, others = _weights(one, kinds), _weights(other, kinds)
        if weights.keys() != others.keys():
            return False
        if not all(_is_equal(weight, others[name]) for name, weight in weights.items()):
            return False
    known = _alike.get(policy)
    if known is None or known[0]() is not reference:  # positions and the like, which have no weights
        heard = [_heard(model, blocks[-1]) for model, blocks in ((policy, mine), (reference, theirs))]
        known = _alike[policy] = weakref.ref(reference), torch.allclose(*heard, atol=1e-6, rtol=1e-5)
    return known[1]


def _weights(module: nn.Module, kinds: type[nn.Module]) -> dict[str, Tensor]:
    """The weights of all parts of some kind by their names, but for adapters that add nothing."""
    found: dict[str, Tensor] = {}
    for part, within in module.named_modules():
        for name, weight in [*within.named_parameters(recurse=False), *within.named_buffers(recurse=False)]:
            adds_nothing = "lora_A" in part or ("lora_B" in part and not weight.any())
            if isinstance(within, kinds) and not adds_nothing:
                found[f"{part}.{name}".replace(".base_layer", "")] = weight
    return found


def _is_equal(one: Tensor, other: Tensor) -> bool:
    same_place = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return one.shape == other.shape and one.dtype == other.dtype and (same_place or torch.equal(one, other))


@torch.no_grad()
def _heard(model: PreTrainedModel, block: nn.Module) -> Tensor:
    """What a block says of a few tokens."""
    ids = _probe(model)
    with _listening(block) as heard:
        run(model, ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return heard[-1]


def _probe(model: PreTrainedModel) -> Int[Tensor, "2 5"]:
    return torch.arange(10, device=model.device).view(2, 5) % model.config.get_text_config().vocab_size


def _same_outputs(model: PreTrainedModel, blocks: Sequence[nn.Module], *, trained: bool) -> bool:
    """Whether a pass without the blocks has the outputs of one with them, after another one in between, and no gradient
    would have reached below them."""

    def hidden(ids: Tensor) -> Any:
        return run(model, ids, attention_mask=torch.ones_like(ids), use_cache=False)[0].hidden

    ids = _probe(model)
    with torch.set_grad_enabled(trained), _listening(blocks[-1]) as heard:
        whole = hidden(ids)
    if not all(isinstance(output, Tensor) and not output.requires_grad for output in heard):
        return False  # something below the blocks is trained, or they return more than hidden states
    with torch.no_grad():
        hidden(ids.flip(1))
        with _answering(blocks, heard[-1]):
            return torch.allclose(hidden(ids), whole, atol=1e-6, rtol=1e-5)
