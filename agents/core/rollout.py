"""Batches of episodes, on which every learner of this package trains."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from textenv.episode import observation_tokens
from textenv.lm import Responses, Sampled
from textenv.scoring import spread_kl
from textenv.training.processes import check_groups, own_seed, rounds_of, together
from textenv.vector import TextVectorEnv


class Rollout(NamedTuple):
    """B finished episodes."""

    tokens: Responses
    logprobs: Float[Tensor, "B T"]
    """Log-probabilities of the tokens at the time they were chosen; zeros on padding."""
    values: Float[Tensor, "B T"]
    """Value of the state before each token; zeros on padding."""
    rewards: Float[Tensor, " B"]
    """What the environment paid: score − kl_coef · Σ KL."""
    kl_per_token: Float[Tensor, "B T"]
    """k1 in nats; zeros on padding, and everywhere if the environment does not know the KL."""
    kl_coef: float
    rm_scores: Float[Tensor, " B"]
    gold: Float[Tensor, " B"] | None
    prompt_indices: Int[Tensor, " B"]
    """Index of each prompt in the environment's prompt set; −1 for a prompt that is not in it."""
    ended: Bool[Tensor, " B"]
    """Whether the response ended within the length budget."""
    truncated: Bool[Tensor, " B"]
    """Whether the reward model read only the beginning of the response."""

    @property
    def scores(self) -> Float[Tensor, " B"]:
        """Rewards before the KL."""
        kl = torch.where(self.tokens.response_mask, self.kl_per_token, 0.0)
        return self.rewards + self.kl_coef * kl.sum(1)

    def token_rewards(self, *, per_token_kl: bool) -> Float[Tensor, "B T"]:
        """Rewards by token: all on the last one, or with ``per_token_kl`` each token's own KL on that token."""
        lengths = self.tokens.response_lengths
        return spread_kl(self.scores, self.kl_per_token, self.kl_coef, lengths, per_token=per_token_kl)


class Stream:
    """A vector environment and its current observation, so that each batch continues where the last one ended.

    With groups of k, slots i·k … i·k + k − 1 answer the same prompt: the one that the first of them has drawn.
    """

    def __init__(self, env: TextVectorEnv, seed: int, *, group_size: int = 1) -> None:
        env.require_same_step("collecting rollouts")
        check_groups(env.num_envs, group_size)
        self.env, self.group_size = env, group_size
        self._continue_from(*env.reset(seed=own_seed(seed, env.num_envs)))

    def restart(self, prompt_indices: list[int]) -> None:
        """Start episodes on the given prompts, one per slot."""
        self._continue_from(*self.env.reset(options={"prompt_id": prompt_indices}))

    def collect(self, episodes: int, act: Callable[[Any], Sampled]) -> Rollout:
        """Play ``episodes`` with whole responses of ``act``, in the slots of all processes; each gets all of them."""
        rounds = rounds_of(episodes, self.env.num_envs)
        return concatenate([part for _ in range(rounds) for part in together(self._play(act))])

    def _continue_from(self, observation: Any, infos: dict[str, Any]) -> None:
        first = infos["prompt_id"][:: self.group_size].repeat(self.group_size)
        if (infos["prompt_id"] != first).any():
            observation, _ = self.env.reset(options={"prompt_id": first})
        self.observation, self.prompt_indices = observation, first

    def _play(self, act: Callable[[Any], Sampled]) -> Rollout:
        prompt_indices, prompts = self.prompt_indices, observation_tokens(self.observation, self.env.task.prompt_width)
        ids, lengths, logprobs, values = act(self.observation)
        observation, rewards, _, _, infos = self.env.play(ids, lengths, logprobs)
        self._continue_from(observation, infos)
        final = infos["final_info"]
        return Rollout(
            tokens=prompts._replace(response_ids=ids, response_lengths=lengths),
            logprobs=logprobs,
            values=values,
            rewards=torch.from_numpy(rewards).float(),
            kl_per_token=torch.from_numpy(final.get("kl_per_token", np.zeros(ids.shape, dtype=np.float32))),
            kl_coef=float(final["kl_coef"][0]),
            rm_scores=torch.from_numpy(final["rm_score"]).float(),
            gold=torch.from_numpy(final["gold_score"]).float() if "gold_score" in final else None,
            prompt_indices=torch.from_numpy(prompt_indices),
            ended=torch.from_numpy(final["finish_reason"] != "length"),
            truncated=torch.from_numpy(final["truncated_response"]),
        )


def concatenate(parts: list[Rollout]) -> Rollout:
    """Join batches of one environment."""
    tokens = Responses(*map(torch.cat, zip(*(part.tokens for part in parts), strict=True)))
    columns = dict(zip(Rollout._fields, zip(*parts, strict=True), strict=True))
    tensors: dict[str, Any] = {}
    for name, column in columns.items():
        if isinstance(column[0], Tensor):
            tensors[name] = torch.cat(column)
    return parts[0]._replace(tokens=tokens, **tensors)
