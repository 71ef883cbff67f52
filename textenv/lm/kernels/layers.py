"""Float32 products of linear layers by oneDNN: the same numbers, up to rounding.

PyTorch gives float32 matrices to MKL, which keeps to 256-bit instructions on processors that are not Intel's. oneDNN,
which comes with PyTorch, uses all 512 bits: 2.3 times as many products a second on a Zen 5.
"""

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

WORTH_IT = 2**20
"""Multiplications from which oneDNN's overhead of some ten microseconds pays."""


def speed_up(model: nn.Module) -> None:
    """Let the linear layers of a model multiply by oneDNN where that is faster. Their weights, names and base classes
    stay; layers of a class of their own are left alone."""
    if not onednn_is_faster():
        return
    faster: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: OneDNNLinear, Conv1D: OneDNNConv1D}
    for module in model.modules():
        if type(module) in faster:
            module.__class__ = faster[type(module)]


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this processor has 512-bit registers that MKL leaves unused.

    Nothing is timed: a resumed run must multiply as it did before.
    """
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and not _is_intel()
    built = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return wide and built and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return "Intel" in platform.processor()


class OneDNNLinear(nn.Linear):
    """``nn.Linear``, whose large float32 products on a CPU are oneDNN's."""

    def forward(self, input: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        if _suits(input, self.weight):
            return _affine(input, self.weight, self.bias, transposed=False)
        return super().forward(input)


class OneDNNConv1D(Conv1D):
    """GPT-2's linear layer, whose weight is ``[I, O]``, likewise."""

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        if _suits(x, self.weight):
            return _affine(x, self.weight, self.bias, transposed=True)
        return super().forward(x)


def _suits(x: Tensor, weight: Tensor) -> bool:
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and x.numel() * weight.numel() >= WORTH_IT * max(x.shape[-1], 1)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    if torch.is_grad_enabled():
        return _Affine.apply(x, weight, bias, transposed)  # type: ignore[return-value]
    return _product(x, weight.T if transposed else weight, bias)


class _Affine(torch.autograd.Function):
    """``x · Wᵀ + b``, or ``x · W + b`` if ``transposed``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        ctx.transposed = transposed
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return _product(x, weight.T if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        x_grad = weight_grad = bias_grad = None
        flat = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            x_grad = _product(grad, weight if ctx.transposed else weight.T)
        if ctx.needs_input_grad[1]:
            inputs = x.reshape(-1, x.shape[-1])
            weight_grad = _product(inputs.T, flat.T) if ctx.transposed else _product(flat.T, inputs.T)
        if ctx.needs_input_grad[2]:
            bias_grad = flat.sum(0)
        return x_grad, weight_grad, bias_grad, None


def product(x: Float[Tensor, "*B I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "*B O"]:
    """``x · Wᵀ`` without gradient, by whichever is faster."""
    if onednn_is_faster() and _suits(x, weight):
        return _product(x, weight)
    return torch.nn.functional.linear(x, weight)


def _product(x: Float[Tensor, "*B I"], weight: Float[Tensor, "O I"], bias: Tensor | None = None) -> Tensor:
    """The operator that torch.compile lowers linear layers to."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
