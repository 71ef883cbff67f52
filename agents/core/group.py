"""What RLOO, GRPO and online DPO share: several responses to each prompt, each judged against the others."""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Bool, Float
from torch import Tensor

from agents.core.actor import Evaluated
from agents.core.config import LearnerConfig
from agents.core.learner import MicroBatch
from agents.core.losses import Loss, ppo_policy_loss
from textenv.settings import Positive


@dataclass(frozen=True, kw_only=True)
class GroupConfig(LearnerConfig):
    """Settings of algorithms that compare the responses to one prompt."""

    group_size: Annotated[int, Ge(2), "The responses to one prompt are compared."] = 4
    """Responses per prompt, 2 or more. More tell better how good each is, and leave fewer prompts per batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.group_size:
            rule = f"batch_size must be a multiple of group_size ({self.group_size})"
            raise ValueError(f"{rule}, got {self.batch_size}. Change one of them.")


@dataclass(frozen=True, kw_only=True)
class ClippedGroupConfig(GroupConfig):
    """Settings of those that use the clipped surrogate."""

    clip_range: Positive = 0.2
    """ε of the surrogate: how far a ratio may move from 1 before its gradient stops."""


def leave_one_out_advantages(returns: Float[Tensor, " B"], group_size: int) -> Float[Tensor, " B"]:
    """``R_i − mean of the other R_j of its prompt`` (Kool et al. 2019; Ahmadian et al. 2024).

    The responses to a prompt are consecutive, ``group_size`` ≥ 2 of them. The baseline of a response does not depend on
    that response, so the gradient estimate is unbiased.
    """
    groups = returns.view(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def group_advantages(returns: Float[Tensor, " B"], group_size: int, *, normalize_std: bool) -> Float[Tensor, " B"]:
    """``R_i − mean R`` of its group, optionally divided by the group's sample standard deviation (Shao et al. 2024).

    The mean includes the response's own return, which scales the gradient by ``(k − 1)/k`` and keeps its direction. A
    group of equal returns teaches nothing: the constant added to the deviation keeps its rounding errors small.
    """
    groups = returns.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if normalize_std:
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    return centred.flatten()


def on_every_token(advantages: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The advantage of a response on each of its tokens; zeros on padding."""
    return torch.where(mask, advantages[:, None], 0.0)


def clipped_loss(new: Evaluated, old: MicroBatch, *, clip_range: float, normalizer: int) -> Loss:
    """The clipped surrogate alone, divided by ``normalizer``; the logged figures are means over tokens."""
    policy = ppo_policy_loss(
        new.logprobs, old.logprobs, old.advantages, old.mask, clip_range=clip_range, normalizer=normalizer
    )
    means = {name: policy.log[name] * (normalizer / old.tokens) for name in ("clip_fraction", "approx_kl")}
    return Loss(policy.loss, {**policy.log, **means})
