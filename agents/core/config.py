"""Settings that policy-gradient algorithms share."""

from dataclasses import dataclass
from typing import Literal

from textenv.kl import KLConfig
from textenv.served.config import SamplerConfig
from textenv.settings import Count, NonNegative, Positive, PositiveInt
from textenv.training.memory import PassConfig
from textenv.training.optimizer import EpisodeOptimizerConfig


@dataclass(frozen=True, kw_only=True)
class LearnerConfig(SamplerConfig, PassConfig, EpisodeOptimizerConfig, KLConfig):
    """Settings of every algorithm. The KL coefficient is the environment's ``kl_coef``."""

    batch_size: PositiveInt = 256
    """Episodes per update; a multiple of the environment's slots. More is slower and less noisy."""
    group_size: PositiveInt = 1
    """Responses to each prompt; the environment's slots must be a multiple. More means fewer prompts per batch."""
    epochs: PositiveInt = 1
    """Passes over each batch. More reuses samples further from the policy that drew them."""
    minibatches: PositiveInt = 1
    """Optimiser steps per pass."""
    target_kl: Positive | None = None
    """Ends the passes over a batch once the policy is so many nats per token away from the one that drew it."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus. The KL penalty already keeps the policy from collapsing."""
    scale_rewards: bool = False
    """Divide rewards, KL included, by the running standard deviation of the return: β keeps its meaning, and the value
    function and advantages that are not whitened get another unit, to which ``entropy_coef`` then refers."""
    seed: Count = 0
    """Seed of the prompts, the sampled tokens and the minibatches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minibatches > self.batch_size:
            rule = f"minibatches must be batch_size ({self.batch_size}) or less"
            raise ValueError(f"{rule}, got {self.minibatches}. Each needs an episode.")
        self.check_span()


@dataclass(frozen=True, kw_only=True)
class CriticConfig(LearnerConfig):
    """Settings of algorithms that learn a value function."""

    value_function: Literal["head", "shared", "trunk", "reward-model"] = "head"
    """"head": a small network on the policy's hidden states, which it leaves alone. "shared": its loss trains the
    policy's trunk too. "trunk": another model, which learns fastest and costs its memory and forward passes.
    "reward-model": the same, and it starts as the trunk of the reward model."""
    value_learning_rate: Positive | None = None
    """Learning rate of the value head; None: ten times ``learning_rate``. It falls with that one."""
    value_coef: NonNegative = 0.1
    """Weight of the value loss relative to the policy loss; it matters where they share a trunk."""
    critic_warmup: Count = 0
    """Updates at the start that train the value function alone, while the schedule of the learning rate goes on."""
    per_token_kl: bool = True
    """Charge each token its own KL instead of charging the sum at the last token."""
