"""REINFORCE leave-one-out: each response judged against the others to its prompt.

Objective: that of PPO, ``max_π E[r(x, y)] − β KL(π ‖ π_ref)``, without a value function. The gradient treats a whole
response as one action, whose advantage is given to each of its tokens.

How this differs from the papers:

1. The return is what the environment pays: score minus β · KL (k1 of the response), as in Ahmadian et al.
2. The surrogate is PPO's, token by token. With one epoch and one minibatch (the default) every ratio is 1,
   which is plain REINFORCE; more of them reuse the samples within the clip range.
3. Losses are sums over tokens divided by episodes × length budget, a constant: long responses weigh no less.

References: Kool et al. 2019; Ahmadian et al. 2024.

Command: ``textenv rloo --env-id textenv/Assistant-v0``.
"""

from dataclasses import dataclass
from typing import final

import torch

from agents.core.actor import Evaluated
from agents.core.checkpoint import CheckpointedLearner
from agents.core.group import ClippedGroupConfig, clipped_loss, leave_one_out_advantages, on_every_token
from agents.core.learner import MicroBatch
from agents.core.losses import Loss
from agents.core.returns import Advantages
from agents.core.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class RLOOConfig(ClippedGroupConfig):
    """Settings of RLOO. The KL coefficient is the environment's ``kl_coef``."""


@final
class RLOO(CheckpointedLearner[RLOOConfig]):
    """REINFORCE with the leave-one-out baseline."""

    config_type = RLOOConfig

    def advantages(self, rollout: Rollout) -> Advantages:
        """A response's return minus the mean return of the others to its prompt."""
        advantages = leave_one_out_advantages(rollout.rewards, self.config.group_size)
        mask = rollout.tokens.response_mask
        return Advantages(on_every_token(advantages, mask), torch.zeros_like(rollout.logprobs))

    def loss(self, new: Evaluated, old: MicroBatch) -> Loss:
        """Clipped surrogate; plain REINFORCE while the ratios are 1."""
        normalizer = old.episodes * self.task.config.max_new_tokens
        return clipped_loss(new, old, clip_range=self.config.clip_range, normalizer=normalizer)


if __name__ == "__main__":
    from textenv.cli import run_command

    run_command("rloo")
