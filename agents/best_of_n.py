"""Best-of-n: draw n responses, keep the one that the reward model likes best.

``π_n`` is never trained. Its KL to the policy it draws from is at most ``log n − (n − 1)/n`` (exact only when no two
responses of a prompt tie), and unknown in general; so no log-probabilities are reported for it.

Reference: Stiennon et al. 2020; the bound: Beirami et al. 2024.
"""

import math
from typing import Any

import torch

from agents.policy import LanguageModelAgent
from textenv.episode import Task
from textenv.lm import LanguageModel, Sampled
from textenv.registry import RewardFunction


class BestOfN:
    """An agent that answers with the best of ``n`` samples of a language model."""

    def __init__(self, model: LanguageModel, task: Task, reward_model: RewardFunction, n: int, *, seed: int = 0) -> None:
        if n < 1:
            raise ValueError(f"n must be ≥ 1, with n (={n}).")
        self.agent = LanguageModelAgent(model, task, seed=seed)
        self.task, self.reward_model, self.n = task, reward_model, n

    @property
    def kl_bound(self) -> float:
        """Upper bound of KL(π_n ‖ π), in nats."""
        return math.log(self.n) - (self.n - 1) / self.n

    def respond(self, observation: Any, deterministic: bool = False, prompts: list[str] | None = None) -> Sampled:
        """The best of n responses to each fresh observation. ``prompts`` are their texts."""
        raise NotImplementedError
