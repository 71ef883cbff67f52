"""AdamW and the schedule of its learning rate, as supervised training and learners use them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from textenv.settings import Below1, NonNegative, Positive, PositiveInt
from textenv.training.processes import sum_gradients


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) with one schedule of its learning rate."""

    learning_rate: NonNegative = 1e-5
    """Peak learning rate of AdamW. Higher learns faster; too high diverges."""
    warmup_ratio: Annotated[Below1, "It is a share."] = 0.0
    """Share of the schedule, in [0, 1), over which the learning rate rises to its peak."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """The learning rate after the warm-up: down to 0 along a line or a cosine, or constant."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay, ≥ 0, on matrices only (not on biases and norms)."""
    max_grad_norm: Annotated[Positive | None, "Use None to switch clipping off."] = 1.0
    """Gradients with a larger norm are scaled down to this one; None does not clip."""
    adam_beta1: Below1 = 0.9
    """Decay of AdamW's average of gradients, in [0, 1). Lower follows changes faster and averages less noise."""
    adam_beta2: Below1 = 0.999
    """Decay of AdamW's average of squared gradients, in [0, 1). Lower follows changes faster."""
    adam_eps: Positive = 1e-8
    """Added to the root of that average. Higher means smaller steps where gradients are tiny; usual is up to 1e-5."""


@dataclass(frozen=True, kw_only=True)
class EpisodeOptimizerConfig(OptimizerConfig):
    """The same for learners, whose schedule is counted in episodes."""

    learning_rate: NonNegative = 1e-5
    """Peak learning rate of AdamW. The default suits a pretrained model; the small worlds have presets with more."""
    lr_decay_episodes: PositiveInt | None = None
    """Episodes that ``lr_schedule`` and ``warmup_ratio`` span; None: the learning rate is constant."""

    def check_span(self) -> None:
        """Refuse a warm-up or a cosine that spans nothing."""
        spanning = {f"warmup_ratio {self.warmup_ratio:g}": self.warmup_ratio > 0}
        spanning |= {"lr_schedule 'cosine'": self.lr_schedule == "cosine"}
        for what, given in spanning.items():
            if given and self.lr_decay_episodes is None:
                rule = f"lr_decay_episodes must be given with {what}, which it spans, got None"
                raise ValueError(f"{rule}. Give the episodes of the run.")


def make_adamw(
    config: OptimizerConfig, parts: Sequence[Sequence[Tensor]], rates: Sequence[float], *, eight_bit: bool = False
) -> torch.optim.Optimizer:
    """AdamW over parts of a network, each with its peak learning rate.

    Raises:
        ValueError: 8 bits without CUDA or without bitsandbytes.
    """
    groups: list[dict[str, Any]] = []
    for part, rate in zip(parts, rates, strict=True):
        matrices, vectors = [w for w in part if w.ndim > 1], [w for w in part if w.ndim <= 1]
        for weights, decay in ((matrices, config.weight_decay), (vectors, 0.0)):
            if weights:
                groups.append({"params": weights, "lr": rate, "peak": rate, "weight_decay": decay})
    betas, eps = (config.adam_beta1, config.adam_beta2), config.adam_eps
    if not eight_bit:
        return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
    device = groups[0]["params"][0].device
    if device.type != "cuda":
        raise ValueError(f"adam_8bit needs a CUDA device, got {device}. Leave it out, or use device='cuda'.")
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError("adam_8bit needs the package bitsandbytes: pip install 'textenv[adam8bit]'.") from error
    return AdamW8bit(groups, betas=betas, eps=eps)


def set_rates(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, done: int, total: int | None, *, ahead: int = 0
) -> float:
    """Set the learning rates of the step after ``done`` of ``total`` ones; returns them relative to their peaks.

    The schedules are those of transformers: from 0 to 1 over ``warmup_ratio`` of the steps, then as ``lr_schedule``
    says; 1 without a ``total``. The warm-up alone is ``ahead`` by so many steps: then no step is taken at a rate of 0.
    """
    factor = 1.0 if total is None else _factor(config, done, total, ahead)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return factor


def _factor(config: OptimizerConfig, done: int, total: int, ahead: int) -> float:
    warmup = round(config.warmup_ratio * total)
    done = max(done, min(done + ahead, warmup))
    if 0 < warmup >= done:
        return done / warmup
    left = max(0.0, (total - done) / max(1, total - warmup))
    return {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[config.lr_schedule]


def clip_gradients(parts: Sequence[Sequence[Tensor]], max_norm: float | None) -> list[float]:
    """Add up the gradients of all processes, then scale that of each part of a network down to ``max_norm``, if it is
    larger; returns the norms before.

    Each part by itself: a large loss of a value function does not shrink the steps of the policy.

    Raises:
        ValueError: a norm is not finite.
    """
    sum_gradients(weight for part in parts for weight in part)
    norms = [nn.utils.get_total_norm([weight.grad for weight in part if weight.grad is not None]) for part in parts]
    found = [float(norm.full_tensor() if isinstance(norm, DTensor) else norm) for norm in norms]
    if not all(map(math.isfinite, found)):
        rule = f"the norm of a gradient must be finite, got {', '.join(map(str, found))}"
        raise ValueError(f"{rule}. The training diverged: lower the learning rate. What was saved stays as it is.")
    for part, norm, value in zip(parts, norms, found, strict=True):
        if max_norm is not None and value > max_norm:  # scaling by 1 would read and write every gradient for nothing
            nn.utils.clip_grads_with_norm_(part, max_norm, norm)
    return found
