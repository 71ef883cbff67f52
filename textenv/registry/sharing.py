"""Matrices that several loaded models have are in memory once: a reward model on the reference's trunk, or several on
one trunk.

They are recognised by their contents, so it does not matter how the files came about. Vectors (biases, norms) are left
alone: they are small, and normalising a reward model changes one of them in place.
"""

import weakref
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_holders: "weakref.WeakSet[PreTrainedModel]" = weakref.WeakSet()
"""Models whose matrices others may use."""


def share_matrices(model: PreTrainedModel) -> int:
    """Let a model that nobody will train use the matrices of those before it that equal its own, bit for bit, under the
    same name in the trunk. Returns the bytes that this frees."""
    known: dict[str, list[Tensor]] = defaultdict(list)
    for holder in _holders:
        for name, weight in _matrices(holder).items():
            known[name].append(weight)
    freed, shared = 0, set()
    for name, weight in _matrices(model).items():
        same = next((other for other in known[name] if _equal(weight, other)), None)
        if same is not None and same.data_ptr() != weight.data_ptr():
            freed += weight.nbytes
            weight.data = same.data
            shared.add(id(weight))
    table: Any = model.get_input_embeddings()
    if freed and model.get_output_embeddings() is None and id(table.weight) not in shared:
        table.weight.data = table.weight.data.clone()  # with one row more: else it would keep the whole file in memory
    _holders.add(model)
    return freed


def _matrices(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The matrices of a trunk; those under an adapter by the names that they have without it."""
    named = model.base_model.named_parameters()
    named = ((name, weight) for name, weight in named if weight.ndim > 1 and not weight.is_meta)
    return {name.replace(".base_layer.", "."): weight for name, weight in named}


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether all bits are equal: 0 and -0 are not, since the identity of a reward model is that of its bytes."""
    alike = (one.shape, one.dtype, one.device, one.stride()) == (other.shape, other.dtype, other.device, other.stride())
    return alike and torch.equal(one.detach().view(torch.uint8), other.detach().view(torch.uint8))
