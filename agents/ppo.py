"""Proximal policy optimisation, with a learned value function.

Objective: ``max_π E[r(x, y)] − β KL(π ‖ π_ref)`` by the clipped surrogate on token advantages. An action is a token;
the reward, KL included, comes from the environment at the last token.

How this differs from the papers:

1. Log-probabilities and values are captured while decoding; no second pass of the policy over its own samples.
2. γ = λ = 1, and the score is paid at the last token: a value function that still learns adds variance but no bias.
3. The KL is the environment's (k1), charged token by token as in Ziegler et al. (2019). Without ``per_token_kl`` the
   last token pays the sum: the return is the same, the credit assignment is not.
4. Losses are sums over real tokens divided by the minibatch's token count, so splitting it changes nothing.
5. Advantages are whitened over the real tokens of the batch. Scores never are, since that would rescale β.
6. Dropout is off, so the first ratio is 1.
7. The value function is a small network on the policy's hidden states. It starts at zero, has its own learning rate,
   and its loss does not train the policy's trunk (``value_function`` offers that, and a trunk of its own).

References: Schulman et al. 2017 (PPO); Ziegler et al. 2019 and Ouyang et al. 2022 (RLHF); Huang et al. 2024 (details).

Command: ``textenv ppo --env-id textenv/Assistant-v0``.
"""

from dataclasses import dataclass
from typing import Annotated, final

from annotated_types import Gt

from agents.core.actor import Evaluated
from agents.core.checkpoint import CheckpointedLearner
from agents.core.config import CriticConfig
from agents.core.learner import MicroBatch
from agents.core.losses import Loss, ppo_policy_loss, value_loss
from agents.core.returns import Advantages, generalized_advantages, whiten
from agents.core.rollout import Rollout
from textenv.settings import Fraction, Positive, PositiveInt


@dataclass(frozen=True, kw_only=True)
class PPOConfig(CriticConfig):
    """Settings of PPO. The KL coefficient is the environment's ``kl_coef``."""

    epochs: PositiveInt = 4
    """Passes over each batch. More passes reuse samples that are further from the current policy."""
    minibatches: PositiveInt = 4
    """Optimiser steps per pass."""
    clip_range: Positive = 0.2
    """ε of the surrogate: how far a ratio may move from 1 before its gradient stops."""
    dual_clip: Annotated[float, Gt(1), "3 is usual."] | None = None
    """How far the ratio of a token with a negative advantage may rise before its gradient stops; None: without end."""
    value_clip_range: Positive | None = None
    """Keeps the new value within this distance of the old one; None does not clip."""
    gamma: Fraction = 1.0
    """Discount per token."""
    lam: Fraction = 1.0
    """λ of GAE: 1 trusts the returns, 0 the value function."""
    whiten_advantages: bool = True
    """Shift and scale the advantages to mean 0 and variance 1 over the real tokens of a batch."""


@final
class PPO(CheckpointedLearner[PPOConfig]):
    """Proximal policy optimisation, with a value function and the clipped surrogate."""

    config_type = PPOConfig

    def advantages(self, rollout: Rollout) -> Advantages:
        """GAE on the environment's rewards, whitened over the real tokens of the batch."""
        config = self.config
        mask = rollout.tokens.response_mask
        rewards = rollout.token_rewards(per_token_kl=config.per_token_kl)
        advantages, returns = generalized_advantages(rewards, rollout.values, mask, gamma=config.gamma, lam=config.lam)
        return Advantages(whiten(advantages, mask) if config.whiten_advantages else advantages, returns)

    def loss(self, new: Evaluated, old: MicroBatch) -> Loss:
        """Clipped surrogate and squared error of the values."""
        config, mask, tokens = self.config, old.mask, old.tokens
        clip = {"clip_range": config.clip_range, "dual_clip": config.dual_clip}
        policy = ppo_policy_loss(new.logprobs, old.logprobs, old.advantages, mask, normalizer=tokens, **clip)
        near = config.value_clip_range
        value = value_loss(new.values, old.values, old.returns, mask, normalizer=tokens, clip_range=near)
        return Loss(policy.loss + config.value_coef * value, {**policy.log, "value_loss": value})


if __name__ == "__main__":
    from textenv.cli import run_command

    run_command("ppo")
