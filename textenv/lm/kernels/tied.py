"""The gradient of a token embedding that is the LM head too, made once.

Autograd makes it twice: the head's part, and for the embedding a matrix of zeros of the same size with a few hundred
rows set. Their sum is a third. For a vocabulary of 49,000 each is a fifth of the memory of all gradients, and a CPU
spends more time on new memory than on the sums. Here the head leaves its part to the embedding, which adds its rows.

A pass makes one :class:`Link` between the two. The hidden states that the head reads come from the embedding, so in the
backward pass the head always goes first. Without a link, both have the gradients of PyTorch.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from textenv.lm.kernels.layers import OneDNNLinear, product

ROWS = 4096
"""Rows of the weight that are rounded at a time where autocast asks for it, so that they stay in the cache."""


class Link:
    """What the head has left for the embedding of the same forward pass."""

    def __init__(self) -> None:
        self._left: Tensor | None = None
        self._task = -1

    def leave(self, grad: Float[Tensor, "n V"], hidden: Float[Tensor, "n H"], dtype: torch.dtype) -> None:
        """Add the weight's gradient ``gradᵀ · hidden`` of one part of the tokens."""
        task = torch._C._current_graph_task_id()
        left = self._left if self._task == task else None  # what an earlier backward pass did not fetch is dropped
        if left is None and grad.dtype == dtype:
            left = product(grad.T, hidden.T)
        else:
            left = grad.new_zeros(grad.shape[1], hidden.shape[1], dtype=dtype) if left is None else left
            for rows, columns in zip(left.split(ROWS), grad.split(ROWS, dim=1), strict=True):
                rows += product(columns.T, hidden.T)
        self._left, self._task = left, task

    def take(self) -> Float[Tensor, "V H"] | None:
        left, self._left = self._left, None
        return left if self._task == torch._C._current_graph_task_id() else None


def tie(model: PreTrainedModel) -> None:
    """Make the embedding of a model with a tied LM head one that a pass can link to it. Weight, name and base class
    stay; layers of a class of their own are left alone."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or not isinstance(head, nn.Linear):
        return
    if type(head) in (nn.Linear, OneDNNLinear) and head.weight is embedding.weight and head.bias is None:
        embedding.__class__ = TiedEmbedding


class TiedEmbedding(nn.Embedding):
    """``nn.Embedding``, which adds its gradient to what the head has left."""

    link: Link | None = None
    """That of the pass that has begun; :func:`linked` takes it."""

    def forward(self, input: Int[Tensor, "*B"]) -> Float[Tensor, "*B H"]:
        weight = self.weight
        if weight.device.type != "cpu" or not (torch.is_grad_enabled() and weight.requires_grad):
            self.link = None
            return super().forward(input)
        self.link = Link()
        return _Rows.apply(weight, input, self.link)  # type: ignore[return-value]


def linked(model: PreTrainedModel) -> Link | None:
    """The link of the pass that has just been run, for its head; None where there is nothing to link."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, TiedEmbedding):
        return None
    link, embedding.link = embedding.link, None
    return link if getattr(model.get_output_embeddings(), "weight", None) is embedding.weight else None


def tied_logits(weight: Float[Tensor, "V H"], hidden: Float[Tensor, "n H"], link: Link) -> Float[Tensor, "n V"]:
    """Logits of hidden states of a linked pass, in the precision of autocast."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    return _Logits.apply(weight, hidden.to(dtype), link)  # type: ignore[return-value]


class _Rows(torch.autograd.Function):
    """Rows of a matrix by their numbers."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor, link: Link) -> Tensor:
        ctx.save_for_backward(index)
        ctx.link, ctx.size, ctx.dtype = link, weight.shape, weight.dtype
        return nn.functional.embedding(index, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        left = ctx.link.take()
        whole = grad.new_zeros(ctx.size, dtype=ctx.dtype) if left is None else left
        return whole.index_add_(0, index.flatten(), grad.flatten(0, -2).to(ctx.dtype)), None, None


class _Logits(torch.autograd.Function):
    """``hidden · weightᵀ``, whose gradient of the weight goes by the link."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, hidden: Tensor, link: Link) -> Tensor:
        ctx.save_for_backward(weight, hidden)
        ctx.link = link
        if weight.dtype == hidden.dtype:
            return product(hidden, weight)
        out = hidden.new_empty(len(hidden), len(weight))
        for columns, rows in zip(out.split(ROWS, dim=1), weight.split(ROWS), strict=True):
            columns.copy_(product(hidden, rows.to(hidden.dtype)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        weight, hidden = ctx.saved_tensors
        ctx.link.leave(grad, hidden, weight.dtype)
        if weight.dtype == grad.dtype:
            return None, product(grad, weight.T), None
        total = torch.zeros(hidden.shape, dtype=weight.dtype)
        for columns, rows in zip(grad.split(ROWS, dim=1), weight.split(ROWS), strict=True):
            total += product(columns, rows.to(grad.dtype).T)
        return None, total.to(grad.dtype), None
