"""REINFORCE, with a learned value function as its baseline.

Objective: that of PPO, ``max_π E[r(x, y)] − β KL(π ‖ π_ref)``, by one on-policy gradient step per batch.

How this differs from the paper:

1. The baseline is a value function, learned from the same episodes: PPO's.
2. Actions are tokens and the reward is terminal, KL included; γ = 1.
3. The policy loss is divided by episodes × length budget, a constant, so that long responses weigh no less.

References: Williams 1992.

Command: ``textenv reinforce --env-id textenv/Assistant-v0``.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from agents.core.actor import Evaluated
from agents.core.checkpoint import CheckpointedLearner
from agents.core.config import CriticConfig
from agents.core.learner import MicroBatch
from agents.core.losses import Loss, value_loss
from agents.core.returns import Advantages, generalized_advantages
from agents.core.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig(CriticConfig):
    """Settings of REINFORCE. The KL coefficient is the environment's ``kl_coef``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs != 1 or self.minibatches != 1:
            rule = "epochs and minibatches must be 1 for REINFORCE, whose gradient is only right on-policy"
            raise ValueError(f"{rule}, got {self.epochs} and {self.minibatches}. Use RLOO or PPO for more.")


def policy_gradient_loss(
    logprobs: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, normalizer: float
) -> Float[Tensor, ""]:
    """−Σ_t Â_t log π(y_t) / normalizer (Williams 1992). Its gradient is that of the return only on-policy."""
    return -(torch.where(mask, logprobs, 0.0) * torch.where(mask, advantages, 0.0)).sum() / normalizer


@final
class Reinforce(CheckpointedLearner[ReinforceConfig]):
    """REINFORCE with a value function as its baseline."""

    config_type = ReinforceConfig

    def advantages(self, rollout: Rollout) -> Advantages:
        """The future return minus the value."""
        rewards = rollout.token_rewards(per_token_kl=self.config.per_token_kl)
        return generalized_advantages(rewards, rollout.values, rollout.tokens.response_mask, gamma=1.0, lam=1.0)

    def loss(self, new: Evaluated, old: MicroBatch) -> Loss:
        """−Â log π, and the squared error of the values."""
        budget = self.task.config.max_new_tokens
        policy = policy_gradient_loss(new.logprobs, old.advantages, old.mask, normalizer=old.episodes * budget)
        value = value_loss(new.values, old.values, old.returns, old.mask, normalizer=old.tokens)
        return Loss(policy + self.config.value_coef * value, {"policy_loss": policy, "value_loss": value})


if __name__ == "__main__":
    from textenv.cli import run_command

    run_command("reinforce")
