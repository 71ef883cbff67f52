"""A language model as an agent of a task, in Stable-Baselines3's verbs."""

from typing import Any

import numpy as np
import torch

from textenv.episode import as_batch, observation_tokens
from textenv.lm import LanguageModel, Responses, Sampled, response_logprobs, rows
from textenv.lm.heads import run
from textenv.served.sampler import ServedSampler
from textenv.task import Task


class LanguageModelAgent:
    """A language model that answers the observations of a task."""

    knows_logprobs: bool = True
    """Whether its responses come with the log-probabilities that their KL is computed from."""

    def __init__(
        self, policy: LanguageModel, task: Task, *, seed: int = 0, served: ServedSampler | None = None
    ) -> None:
        """``served``: the server that draws whole responses in place of ``policy``, which it holds too."""
        if policy.vocab_size != task.reference.vocab_size:
            raise ValueError(
                f"the policy must have the reference's vocabulary, got {policy.vocab_size} tokens in {policy.name!r} "
                f"and {task.reference.vocab_size} in {task.reference.name!r}. Start the policy from the reference."
            )
        self.policy, self.task, self.served = policy, task, served
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """The next token of each observation (single or batched), from the whole context."""
        observation, single = as_batch(observation)
        batch = observation_tokens(observation, self.task.prompt_width)
        model = self.policy.model
        joined = rows(batch).input_ids.to(model.device)
        outputs, _ = run(model, joined, attention_mask=torch.ones_like(joined), use_cache=False)
        logits, _ = outputs.at((torch.arange(len(joined)), batch.total_lengths - 1))
        logprobs = self.task.rule.logprobs(logits, batch.response_lengths.to(model.device)).cpu()
        if deterministic:
            tokens = logprobs.argmax(-1)
        else:
            tokens = torch.multinomial(logprobs.exp(), 1, generator=self.generator).squeeze(1)
        return tokens.numpy()[0] if single else tokens.numpy(), state

    def respond(self, observation: Any, deterministic: bool = False) -> Sampled:
        """A whole response to each fresh observation, as evaluation uses it."""
        if self.served is not None:
            how = {"generator": self.generator, "greedy": deterministic}
            return self.served.act(observation, task=self.task, score=self._policy_scores, **how)
        batch = observation_tokens(observation, self.task.prompt_width)
        return self.task.respond(self.policy.model, batch, generator=self.generator, greedy=deterministic)

    def _policy_scores(self, batch: Responses, task: Task) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = response_logprobs(self.policy.model, batch, task.rule)
        return logprobs, torch.zeros_like(logprobs)
