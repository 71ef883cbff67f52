"""What acts: a language model as a policy, alone or with a value function."""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from textenv.episode import Task
from textenv.lm import (
    LanguageModel,
    Responses,
    Sampled,
    ScalarHead,
    gather_predictions,
    response_outputs,
    rows,
    sample_responses,
)
from textenv.lm.load import run
from textenv.lm.logprobs import token_logprobs


class Evaluated(NamedTuple):
    """A policy's view of given responses, with gradient."""

    logprobs: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"] | None
    """Of the whole next-token distribution, in nats; None unless asked for."""


class ActorCritic(nn.Module):
    """A policy and a value function: a scalar head on the policy's trunk, or on a trunk of its own."""

    def __init__(self, model: PreTrainedModel, hidden_size: int, critic: PreTrainedModel | None = None) -> None:
        """``critic``: a language model whose trunk (not its LM head) becomes the value function's own."""
        super().__init__()
        self.model = model
        self.value_head = ScalarHead(hidden_size)
        self.critic = None if critic is None else critic.base_model

    def evaluate(self, batch: Responses, task: Task, *, entropy: bool = False) -> Evaluated:
        """Log-probabilities and values of given responses by teacher forcing, with gradient."""
        logprobs, hidden = response_outputs(self.model, batch, task.rule)
        chosen = gather_predictions(token_logprobs(logprobs, batch), batch)
        spread = None
        if entropy:
            finite = torch.where(logprobs.isfinite(), logprobs, 0.0)
            spread = gather_predictions(-(finite.exp() * finite).sum(-1), batch)
        if self.critic is not None:
            hidden = critic_hidden(self.critic, batch)
        return Evaluated(chosen, gather_predictions(self.value_head(hidden), batch), spread)

    def act(self, observation: Any, task: Task, *, generator: torch.Generator | None, greedy: bool = False) -> Sampled:
        """Whole responses to the prompts of fresh observations; log-probabilities and values captured on the way."""
        head = None if self.critic is not None else self.value_head
        batch = observation_tokens(observation, task)
        sampled = respond(self.model, batch, task, generator=generator, greedy=greedy, value_head=head)
        if self.critic is None:
            return sampled
        done = batch._replace(response_ids=sampled.response_ids, response_lengths=sampled.response_lengths)
        with torch.no_grad():
            values = gather_predictions(self.value_head(critic_hidden(self.critic, done)), done)
        return sampled._replace(values=values)


def critic_hidden(critic: nn.Module, batch: Responses) -> Float[Tensor, "n H"]:
    """Hidden states of a separate critic at the real response positions."""
    joined = rows(batch)
    mask = torch.ones_like(joined.input_ids)
    hidden = critic(input_ids=joined.input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    row, step = batch.response_mask.nonzero(as_tuple=True)
    return hidden[row, joined.predictors[row, step]]


class LanguageModelAgent:
    """A language model as an agent of a task, in Stable-Baselines3's verbs."""

    def __init__(self, model: LanguageModel, task: Task, *, seed: int = 0) -> None:
        check_vocabulary(model, task)
        self.model, self.task = model, task
        self.generator = torch.Generator().manual_seed(seed)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """The next token of each observation."""
        return predict(self.model.model, observation, self.task, generator=self.generator, greedy=deterministic), state

    def respond(self, observation: Any, deterministic: bool = False) -> Sampled:
        """A whole response to each fresh observation: the fast path of evaluation."""
        batch = observation_tokens(observation, self.task)
        return respond(self.model.model, batch, self.task, generator=self.generator, greedy=deterministic)


def check_vocabulary(model: LanguageModel, task: Task) -> None:
    """Policy and environment must mean the same token by the same number."""
    if model.vocab_size != task.reference.vocab_size:
        raise ValueError(
            f"policy and environment must share one vocabulary, with policy {model.name!r} (={model.vocab_size}) and "
            f"reference {task.reference.name!r} (={task.reference.vocab_size}). Start the policy from the reference."
        )


def observation_tokens(observation: Any, task: Task) -> Responses:
    """The tokens in a batched observation of either mode."""
    width = task.prompt_width
    if isinstance(observation, dict):
        ids = torch.as_tensor(np.asarray(observation["input_ids"]))
        prompt_lengths = torch.as_tensor(np.asarray(observation["prompt_length"]))[:, 0]
        response_lengths = torch.as_tensor(np.asarray(observation["response_length"]))[:, 0]
    else:
        ids = torch.as_tensor(np.asarray(observation))
        prompt_lengths = (ids[:, :width] >= 0).sum(1)
        response_lengths = (ids[:, width:] >= 0).sum(1)
        ids = ids.clamp(min=0)
    return Responses(ids[:, :width], prompt_lengths, ids[:, width:], response_lengths)


def respond(
    model: PreTrainedModel,
    batch: Responses,
    task: Task,
    *,
    generator: torch.Generator | None,
    greedy: bool = False,
    value_head: nn.Module | None = None,
) -> Sampled:
    """Sample under the task's rule and budget."""
    return sample_responses(
        model,
        batch.prompt_ids,
        batch.prompt_lengths,
        max_new_tokens=task.config.max_new_tokens,
        rule=task.rule,
        pad_id=task.reference.pad_id,
        generator=generator,
        greedy=greedy,
        value_head=value_head,
    )


@torch.no_grad()
def predict(
    model: PreTrainedModel, observation: Any, task: Task, *, generator: torch.Generator | None, greedy: bool
) -> np.ndarray:
    """One token for each observation (single or batched), from the whole context."""
    flat = observation["input_ids"] if isinstance(observation, dict) else observation
    single = np.ndim(flat) == 1
    if single:
        is_dict = isinstance(observation, dict)
        observation = {k: np.asarray(v)[None] for k, v in observation.items()} if is_dict else np.asarray(flat)[None]
    batch = observation_tokens(observation, task)
    joined = rows(batch).input_ids.to(model.device)
    outputs, _ = run(model, joined, attention_mask=torch.ones_like(joined), use_cache=False)
    logits, _ = outputs.at((torch.arange(len(joined)), batch.total_lengths - 1))
    logprobs = task.rule.logprobs(logits, batch.response_lengths.to(model.device)).cpu()
    tokens = logprobs.argmax(-1) if greedy else torch.multinomial(logprobs.exp(), 1, generator=generator).squeeze(1)
    return tokens.numpy()[0] if single else tokens.numpy()
