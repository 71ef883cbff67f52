"""Baselines for learners: random tokens, and the reference itself."""

from typing import Any, final

import numpy as np
import torch

from agents.core.agent import LanguageModelAgent
from agents.core.job import Algorithm, Job, Trained
from textenv import registry
from textenv.episode import as_batch, observation_tokens
from textenv.lm import Sampled
from textenv.task import Task
from textenv.vector import make_vec


@final
class ReferenceAgent(LanguageModelAgent, Algorithm):
    """The environment's reference: its KL is 0, and every learner starts from it."""

    def __init__(self, task: Task, *, seed: int = 0) -> None:
        super().__init__(registry.fresh_language_model(task.config.reference, *task.config.loading), task, seed=seed)

    @classmethod
    def train(cls, job: Job) -> Trained:
        agent = cls(make_vec(job.env_id, 1).task, seed=job.seed)
        return Trained(agent, agent.policy.model, [], 0)


@final
class RandomAgent(Algorithm):
    """Every allowed token with the same probability, at every step."""

    def __init__(self, task: Task, *, seed: int = 0) -> None:
        self.task, self.generator = task, torch.Generator().manual_seed(seed)

    @classmethod
    def train(cls, job: Job) -> Trained:
        return Trained(cls(make_vec(job.env_id, 1).task, seed=job.seed), None, [], 0)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """One random token per observation; ``deterministic`` changes nothing, since no token is likelier."""
        observation, single = as_batch(observation)
        steps = observation_tokens(observation, self.task.prompt_width).response_lengths
        tokens = torch.multinomial(self._logprobs(steps).exp(), 1, generator=self.generator).squeeze(1).numpy()
        return (tokens[0] if single else tokens), state

    def respond(self, observation: Any, deterministic: bool = False) -> Sampled:
        """A whole random response to each fresh observation, with its log-probabilities."""
        batch = observation_tokens(observation, self.task.prompt_width)
        size, budget = len(batch.prompt_ids), self.task.config.max_new_tokens
        ids = torch.full((size, budget), self.task.reference.pad_id)
        lengths = torch.full((size,), budget)
        logprobs = torch.zeros(size, budget)
        stop = torch.tensor(self.task.rule.stop_ids)
        running = torch.ones(size, dtype=torch.bool)
        for step in range(budget):
            distribution = self._logprobs(torch.full((size,), step))
            chosen = torch.multinomial(distribution.exp(), 1, generator=self.generator)
            ids[running, step] = chosen.squeeze(1)[running]
            logprobs[running, step] = distribution.gather(1, chosen).squeeze(1)[running]
            ended = running & torch.isin(chosen.squeeze(1), stop)
            lengths[ended] = step + 1
            running &= ~ended
        return Sampled(ids, lengths, logprobs, torch.zeros_like(logprobs))

    def _logprobs(self, steps: torch.Tensor) -> torch.Tensor:
        return self.task.rule.logprobs(torch.zeros(len(steps), self.task.reference.vocab_size), steps)
