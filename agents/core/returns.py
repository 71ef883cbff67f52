"""Advantages and returns over padded episodes. Pure functions; padding never affects the result."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Advantages(NamedTuple):
    advantages: Float[Tensor, "B T"]
    """Â_t; zeros on padding."""
    returns: Float[Tensor, "B T"]
    """Â_t + V_t, the target of the value function; zeros on padding."""


def generalized_advantages(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Advantages:
    """GAE (Schulman et al. 2016): Â_t = Σ_k (γλ)^k δ_{t+k}, with δ_t = r_t + γ V_{t+1} − V_t.

    ``values[b, t]`` is the value of the state *before* token t. Real tokens come first in a row (``mask`` is a prefix),
    and every episode terminates at its last real token, where V_{t+1} = 0.
    """
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    running = values.new_zeros(values.shape[0])
    next_value = running
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # Beyond the end of a row, rewards, values and running are all 0, so the last real step starts clean.
        running = torch.where(mask[:, t], delta + gamma * lam * running, 0.0)
        advantages[:, t] = running
        next_value = values[:, t]
    return Advantages(advantages, torch.where(mask, advantages + values, 0.0))


def masked_mean(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean over the real entries."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Shift and scale the real entries to mean 0 and (population) variance 1; zeros on padding."""
    mean = masked_mean(x, mask)
    variance = masked_mean(torch.where(mask, x - mean, 0.0) ** 2, mask)
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), 0.0)
