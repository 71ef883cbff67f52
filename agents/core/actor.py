"""A policy with its value function."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from textenv.episode import observation_tokens
from textenv.lm import LanguageModel, Responses, Sampled, ValueHead, gather_predictions, response_scores
from textenv.lm.logprobs import response_hidden
from textenv.task import Task
from textenv.training.memory import Trunk


class Evaluated(NamedTuple):
    """What a policy says about given responses, with gradient."""

    logprobs: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"] | None
    """Entropy of the whole next-token distribution, in nats; zeros on padding; None unless asked for."""


class ActorCritic(nn.Module):
    """A policy and a value function: a head on the policy's trunk, or on a trunk of its own."""

    def __init__(
        self, policy: LanguageModel, critic: LanguageModel | Trunk | None = None, *, shared: bool = False, seed: int = 0
    ) -> None:
        """The trunk of ``critic``, without its LM head, becomes that of the value function. On the policy's own trunk,
        the value function trains it only if ``shared``."""
        super().__init__()
        self.model = policy.model
        self.value_head = ValueHead((critic or policy).hidden_size, seed)
        self.critic: Any = None if critic is None else critic.model.base_model
        self.shared = shared

    def evaluate(self, batch: Responses, task: Task, *, entropy: bool = False) -> Evaluated:
        """Log-probabilities and values of given responses by teacher forcing, with gradient."""
        with task.precision():
            scores = response_scores(self.model, batch, task.rule, entropy=entropy)
            own = scores.hidden if self.shared else scores.hidden.detach()
            hidden = own if self.critic is None else response_hidden(self.critic, batch)
        entropies = None if scores.entropy is None else gather_predictions(scores.entropy, batch)
        values = gather_predictions(self.value_head(hidden), batch)
        return Evaluated(gather_predictions(scores.logprobs, batch), values, entropies)

    def act(self, observation: Any, task: Task, *, generator: torch.Generator, slots: int | None = None) -> Sampled:
        """Whole responses to the prompts of fresh observations, with their log-probabilities and values."""
        batch = observation_tokens(observation, task.prompt_width)
        head = self.value_head if self.critic is None else None
        with torch.no_grad(), task.precision():
            sampled = task.respond(self.model, batch, generator=generator, value_head=head, slots=slots)
            if self.critic is not None:
                done = batch._replace(response_ids=sampled.response_ids, response_lengths=sampled.response_lengths)
                values = self.value_head(response_hidden(self.critic, done))
                sampled = sampled._replace(values=gather_predictions(values, done))
        return sampled
