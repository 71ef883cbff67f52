"""Settings that policy-gradient algorithms share."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """Settings that every algorithm has. The KL coefficient is the environment's ``kl_coef``."""

    batch_size: int = 256
    """Episodes an update; a multiple of the environment's slots. More is slower and less noisy."""
    group_size: int = 1
    """Responses to each prompt drawn; the environment's slots must be a multiple. More means fewer prompts a batch."""
    epochs: int = 1
    """Passes over each batch. More reuses samples further from the policy that drew them."""
    minibatches: int = 1
    """Optimiser steps a pass."""
    micro_batch_size: int | None = None
    """Episodes in one forward pass; None takes the whole minibatch. Lower saves memory and changes no gradient."""
    learning_rate: float = 1e-3
    """Of Adam. The default suits the small worlds here; pretrained models want about 1e-5."""
    lr_decay_episodes: int | None = None
    """Episodes over which the learning rate falls linearly to 0; None keeps it constant."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus. The KL already keeps the policy broad."""
    kl_target: float | None = None
    """Nats an episode that an adaptive controller steers towards; None keeps the coefficient fixed."""
    kl_horizon: float = 10_000.0
    """Episodes over which the adaptive controller acts; larger is slower."""
    seed: int = 0
    """Of the prompts drawn, the tokens sampled and the minibatches."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "group_size", "epochs", "minibatches", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, with {name} (={getattr(self, name)}).")
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate must be ≥ 0, with learning_rate (={self.learning_rate}).")
        if self.minibatches > self.batch_size:
            raise ValueError(
                f"minibatches (={self.minibatches}) must not exceed batch_size (={self.batch_size}): each needs "
                "an episode."
            )

    @property
    def critic(self) -> Literal["none", "head", "trunk"]:
        """The value function: none, a head on the policy's trunk, or a trunk of its own."""
        return "none"


@dataclass(frozen=True, kw_only=True)
class CriticConfig(LearnerConfig):
    """Settings of algorithms that learn a value function."""

    value_coef: float = 0.1
    """Weight of the value loss against the policy loss; matters while they share a trunk."""
    per_token_kl: bool = False
    """Pay each token its own KL instead of paying the sum at the end."""
    separate_critic: bool = False
    """Give the value function a trunk of its own (one more model in memory, one more forward pass)."""

    @property
    def critic(self) -> Literal["none", "head", "trunk"]:
        return "trunk" if self.separate_critic else "head"


@dataclass(frozen=True, kw_only=True)
class GroupConfig(LearnerConfig):
    """Settings of algorithms that compare the responses to one prompt."""

    group_size: int = 4
    """Responses a prompt, ≥ 2. More give a better baseline and fewer prompts a batch."""
    clip_range: float = 0.2
    """ε of the surrogate: how far a ratio may leave 1 before its gradient stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2:
            raise ValueError(f"group_size must be ≥ 2, with group_size (={self.group_size}): responses are compared.")
        if self.batch_size % self.group_size:
            raise ValueError(
                f"batch_size must be a multiple of group_size, with batch_size (={self.batch_size}), group_size "
                f"(={self.group_size}). Change one of them."
            )
