"""What a learner is compared with: tokens at random, and the reference itself."""

from typing import Any, final

import numpy as np
import torch

from agents.core.actor import LanguageModelAgent, observation_tokens
from textenv import registry
from textenv.episode import Task
from textenv.lm import Sampled


def reference_agent(task: Task, *, seed: int = 0) -> LanguageModelAgent:
    """The environment's own reference: KL 0, and what every learner starts from."""
    model = registry.fresh_language_model(task.config.reference, task.config.device)
    return LanguageModelAgent(model, task, seed=seed)


@final
class RandomAgent:
    """Every allowed token with the same probability, at every step."""

    def __init__(self, task: Task, *, seed: int = 0) -> None:
        self.task, self.generator = task, torch.Generator().manual_seed(seed)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """One random token an observation; ``deterministic`` changes nothing, since no token is likelier."""
        flat = observation["input_ids"] if isinstance(observation, dict) else observation
        single = np.ndim(flat) == 1
        if single:
            is_dict = isinstance(observation, dict)
            observation = {k: v[None] for k, v in observation.items()} if is_dict else observation[None]
        steps = observation_tokens(observation, self.task).response_lengths
        tokens = torch.multinomial(self._logprobs(steps).exp(), 1, generator=self.generator).squeeze(1).numpy()
        return (tokens[0] if single else tokens), state

    def respond(self, observation: Any, deterministic: bool = False) -> Sampled:
        """A whole random response to each fresh observation, with its log-probabilities."""
        batch = observation_tokens(observation, self.task)
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
