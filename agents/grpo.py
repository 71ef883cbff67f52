"""Group-relative policy optimisation, and Dr. GRPO: responses judged against their group.

Objective: that of PPO, ``max_π E[r(x, y)] − β KL(π ‖ π_ref)``, without a value function. ``normalize_std`` and
``normalize_length`` on (the default) is GRPO (Shao et al. 2024); both off is Dr. GRPO (Liu et al. 2025).

How this differs from the papers:

1. The KL is in the reward (the environment's k1), where Shao et al. add k3 to the loss. The on-policy gradient of
   that term is the gradient of KL(π_ref ‖ π), a different divergence with a different optimum.
2. Without ``normalize_length`` the token sums are divided by episodes × length budget, a constant.

Both normalisations move the optimum: dividing by the group's standard deviation gives more weight to prompts whose
responses differ little; dividing by the length makes a long bad response cheaper than a short one.

References: Shao et al. 2024 (DeepSeekMath); Liu et al. 2025 (Dr. GRPO).

Command: ``textenv grpo --env-id textenv/Assistant-v0``.
"""

from dataclasses import dataclass
from typing import final

import torch

from agents.core.actor import Evaluated
from agents.core.checkpoint import CheckpointedLearner
from agents.core.group import ClippedGroupConfig, clipped_loss, group_advantages, on_every_token
from agents.core.learner import MicroBatch
from agents.core.losses import Loss
from agents.core.returns import Advantages
from agents.core.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(ClippedGroupConfig):
    """Settings of GRPO. The KL coefficient is the environment's ``kl_coef``."""

    normalize_std: bool = True
    """Divide the advantages of a prompt's responses by their standard deviation."""
    normalize_length: bool = True
    """Divide the loss of a response by its length."""


@final
class GRPO(CheckpointedLearner[GRPOConfig]):
    """Group-relative policy optimisation: GRPO, or Dr. GRPO with both normalisations off."""

    config_type = GRPOConfig

    def advantages(self, rollout: Rollout) -> Advantages:
        """A response's return relative to the returns of its group."""
        config, tokens = self.config, rollout.tokens
        advantages = group_advantages(rollout.rewards, config.group_size, normalize_std=config.normalize_std)
        if config.normalize_length:
            advantages = advantages / tokens.response_lengths
        return Advantages(on_every_token(advantages, tokens.response_mask), torch.zeros_like(rollout.logprobs))

    def loss(self, new: Evaluated, old: MicroBatch) -> Loss:
        """Clipped surrogate: a mean over responses."""
        normalizer = old.episodes * (1 if self.config.normalize_length else self.task.config.max_new_tokens)
        return clipped_loss(new, old, clip_range=self.config.clip_range, normalizer=normalizer)


if __name__ == "__main__":
    from textenv.cli import run_command

    run_command("grpo")
