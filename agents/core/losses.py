"""Losses over padded episodes. Pure functions of tensors; the mask is True on real tokens.

Every loss is a **sum over real tokens divided by a normalizer**. A caller that splits a minibatch into micro-batches
passes the token count of the whole minibatch, and gets the same gradient however it is split.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Loss(NamedTuple):
    loss: Float[Tensor, ""]
    log: dict[str, Float[Tensor, ""]]
    """Figures that add up over the micro-batches of a minibatch."""


def ppo_policy_loss(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    clip_range: float,
    normalizer: float,
    dual_clip: float | None = None,
) -> Loss:
    """Clipped surrogate (Schulman et al. 2017): −Σ_t min(ρ_t Â_t, clip(ρ_t, 1−ε, 1+ε) Â_t) / normalizer.

    ``ρ_t = exp(logprobs − old_logprobs)``. With ``dual_clip`` c, where Â_t < 0 the surrogate is c Â_t at least (Ye et
    al. 2020). Poisoned padding (NaN, 1e6) changes neither value nor gradient. The log counts tokens whose ratio left
    the clip range and sums k3 of KL(π_old ‖ π), both divided by the normalizer.
    """
    logprobs, old_logprobs, advantages = (torch.where(mask, x, 0.0) for x in (logprobs, old_logprobs, advantages))
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    loss = -surrogate.sum() / normalizer
    with torch.no_grad():
        outside = ((ratio - 1.0).abs() > clip_range).to(ratio.dtype)
        approx_kl = torch.expm1(log_ratio) - log_ratio
        log = {"clip_fraction": outside.sum() / normalizer, "approx_kl": approx_kl.sum() / normalizer}
    return Loss(loss, {"policy_loss": loss, **log})


def value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    normalizer: float,
    clip_range: float | None = None,
) -> Float[Tensor, ""]:
    """½ Σ_t (V_t − R_t)² / normalizer; with a clip range, the larger error of V_t and V_t clipped near the old one."""
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    error = (values - returns) ** 2
    if clip_range is not None:
        held = old_values + (values - old_values).clamp(-clip_range, clip_range)
        error = torch.maximum(error, (held - returns) ** 2)
    return 0.5 * error.sum() / normalizer
