"""KL divergence: estimators for one drawn token, and controllers of its coefficient.

With ``d = log π(a) − log π_ref(a)`` for a token ``a`` drawn from π:

* k1 = d: unbiased. The only one fit for a reward: E[k1 · ∇log π] = ∇KL.
* k2 = d²/2: biased, low variance.
* k3 = exp(−d) − 1 + d: unbiased and ≥ 0; good for logging. As a *reward* both k2 and k3 have the wrong gradient.

Source: J. Schulman, "Approximating KL Divergence" (2020).
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float

from textenv.settings import NonNegative, Positive, check_settings


def kl_k1(logprobs: Float[np.ndarray, "*S"], ref_logprobs: Float[np.ndarray, "*S"]) -> Float[np.ndarray, "*S"]:
    """log π − log π_ref per token, in nats."""
    return logprobs - ref_logprobs


def kl_k3(logprobs: Float[np.ndarray, "*S"], ref_logprobs: Float[np.ndarray, "*S"]) -> Float[np.ndarray, "*S"]:
    """exp(−d) − 1 + d per token, in nats, where d = log π − log π_ref. Never negative."""
    d = logprobs - ref_logprobs
    return np.expm1(-d) + d


class KLController(Protocol):
    """Decides the KL coefficient β of the next batch from the KL just measured."""

    kl_coef: float

    def update(self, kl: float, episodes: int) -> float:
        """Take the mean KL of ``episodes`` finished episodes (nats per episode); return the coefficient to use next."""
        ...


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """How learners change the KL coefficient."""

    kl_target: Positive | None = None
    """KL per episode, in nats, that an adaptive controller steers towards; None keeps the coefficient fixed."""
    kl_horizon: Positive = 10_000.0
    """Episodes over which the adaptive controller acts; larger is slower."""

    def controller(self, kl_coef: float) -> KLController:
        """What decides the coefficient, starting from ``kl_coef``."""
        if self.kl_target is None:
            return FixedKL(kl_coef)
        return AdaptiveKL(kl_coef, self.kl_target, self.kl_horizon)


@dataclass
class FixedKL:
    """β stays constant."""

    kl_coef: float

    def update(self, kl: float, episodes: int) -> float:
        return self.kl_coef


@dataclass
class AdaptiveKL:
    """Proportional control of log β towards a target KL (Ziegler et al. 2019, § 2.2).

    ``e = clip(KL / target − 1, −0.2, 0.2)``, ``β ← β · (1 + e · episodes / horizon)``.
    """

    kl_coef: NonNegative
    target: Positive
    """Nats per episode."""
    horizon: Positive = 10_000.0
    """Episodes over which an error of 0.2 changes β by 20 %; larger is slower."""

    def __post_init__(self) -> None:
        check_settings(self)

    def update(self, kl: float, episodes: int) -> float:
        error = float(np.clip(kl / self.target - 1.0, -0.2, 0.2))
        self.kl_coef *= 1.0 + error * episodes / self.horizon
        return self.kl_coef
