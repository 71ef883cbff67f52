"""Losses over padded episodes. Pure functions of tensors; the mask is True on real tokens.

Every loss is a **sum over real tokens divided by a normalizer** (by default the number of real tokens). A caller that
splits a minibatch into micro-batches passes the token count of the whole, and gets the same gradient for every split.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class PolicyLoss(NamedTuple):
    loss: Float[Tensor, ""]
    clip_fraction: Float[Tensor, ""]
    """Share of real tokens whose ratio left the clip range (of the normalizer's tokens)."""
    approx_kl: Float[Tensor, ""]
    """k3 estimate of KL(π_old ‖ π) a token, in nats."""


class ValueLoss(NamedTuple):
    loss: Float[Tensor, ""]
    clip_fraction: Float[Tensor, ""]


def masked_sum(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
    return torch.where(mask, x, 0.0).sum()


def ppo_policy_loss(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    clip_range: float = 0.2,
    normalizer: Float[Tensor, ""] | float | None = None,
) -> PolicyLoss:
    """Clipped surrogate (Schulman et al. 2017): −Σ_t min(ρ_t Â_t, clip(ρ_t, 1−ε, 1+ε) Â_t) / normalizer.

    ``ρ_t = exp(logprobs − old_logprobs)``. Poisoned padding (NaN, 1e6) changes neither value nor gradient.
    """
    total = mask.sum().clamp(min=1) if normalizer is None else normalizer
    log_ratio = torch.where(mask, logprobs, 0.0) - torch.where(mask, old_logprobs, 0.0)
    advantages = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = -masked_sum(torch.minimum(ratio * advantages, clipped * advantages), mask) / total
    with torch.no_grad():
        outside = ((ratio - 1.0).abs() > clip_range).to(ratio.dtype)
        approx_kl = torch.expm1(log_ratio) - log_ratio
        return PolicyLoss(loss, masked_sum(outside, mask) / total, masked_sum(approx_kl, mask) / total)


def policy_gradient_loss(
    logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    normalizer: Float[Tensor, ""] | float | None = None,
) -> Float[Tensor, ""]:
    """−Σ_t Â_t log π(y_t) / normalizer (Williams 1992): its gradient is that of the return, on-policy only."""
    total = mask.sum().clamp(min=1) if normalizer is None else normalizer
    return -masked_sum(torch.where(mask, logprobs, 0.0) * torch.where(mask, advantages, 0.0), mask) / total


def value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    clip_range: float | None = None,
    normalizer: Float[Tensor, ""] | float | None = None,
) -> ValueLoss:
    """½ Σ_t (V_t − R_t)² / normalizer; with a clip range, the worse of V_t and V_t held near the old value."""
    total = mask.sum().clamp(min=1) if normalizer is None else normalizer
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    error = (values - returns) ** 2
    outside = torch.zeros_like(error)
    if clip_range is not None:
        held = old_values + (values - old_values).clamp(-clip_range, clip_range)
        held_error = (held - returns) ** 2
        outside = (held_error > error).to(error.dtype).detach()
        error = torch.maximum(error, held_error)
    return ValueLoss(0.5 * masked_sum(error, mask) / total, masked_sum(outside, mask) / total)


def entropy_loss(
    entropy: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, normalizer: Float[Tensor, ""] | float | None = None
) -> Float[Tensor, ""]:
    """−Σ_t H_t / normalizer: minimising it raises the entropy."""
    total = mask.sum().clamp(min=1) if normalizer is None else normalizer
    return -masked_sum(entropy, mask) / total
