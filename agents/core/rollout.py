"""The record of a batch of episodes, and how it is collected: what every learner of this package trains on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from agents.core.actor import observation_tokens
from textenv.lm import Responses, Sampled
from textenv.scoring import spread_kl
from textenv.vector import TextVectorEnv


class Rollout(NamedTuple):
    """B finished episodes."""

    tokens: Responses
    logprobs: Float[Tensor, "B T"]
    """Of the chosen tokens when they were chosen; zeros on padding."""
    values: Float[Tensor, "B T"]
    """Of the state before each token; zeros on padding."""
    rewards: Float[Tensor, " B"]
    """What the environment paid: scores − kl_coef · Σ KL."""
    kl_per_token: Float[Tensor, "B T"]
    """k1, nats; zeros on padding, and everywhere when the environment knows no KL."""
    kl_coef: float
    rm_scores: Float[Tensor, " B"]
    gold: Float[Tensor, " B"] | None
    prompt_ids: Int[np.ndarray, " B"]
    """Which prompt of the environment's prompt set (−1: none of them)."""
    finish_reasons: list[str]
    responses: list[str]

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
    """A vector environment with the observation it stands at, so that collecting can go on where it stopped.

    With groups of k, slots i·k … i·k + k − 1 answer the same prompt: the one that the first of them drew.
    """

    def __init__(self, env: TextVectorEnv, seed: int | None, *, group_size: int = 1) -> None:
        if env.autoreset_mode.value != "SameStep":
            raise ValueError(
                f"collecting needs autoreset_mode 'SameStep', with autoreset_mode (={env.autoreset_mode.value!r}). "
                "Make the environment without that keyword."
            )
        if env.num_envs % group_size:
            raise ValueError(
                f"the environment's slots must be a multiple of group_size, with num_envs (={env.num_envs}), "
                f"group_size (={group_size}). Change one of them."
            )
        self.env, self.group_size = env, group_size
        self._stand_at(*env.reset(seed=seed))

    def restart(self, prompt_ids: list[int]) -> None:
        """Start episodes on given prompts, one a slot."""
        self._stand_at(*self.env.reset(options={"prompt_id": prompt_ids}))

    def _stand_at(self, observation: Any, infos: dict[str, Any]) -> None:
        prompt_ids = infos["prompt_id"]
        first = prompt_ids[:: self.group_size].repeat(self.group_size)
        if (prompt_ids != first).any():
            observation, _ = self.env.reset(options={"prompt_id": first})
        self.observation, self.prompt_ids = observation, first

    def collect(self, episodes: int, act: Callable[[Any], Sampled]) -> Rollout:
        """Play ``episodes`` (a multiple of the environment's slots) with whole responses of ``act``."""
        if episodes % self.env.num_envs:
            raise ValueError(
                f"a batch must be a multiple of the environment's slots, with batch (={episodes}), num_envs "
                f"(={self.env.num_envs}). Change one of them."
            )
        return concatenate([self._play(act) for _ in range(episodes // self.env.num_envs)])

    def _play(self, act: Callable[[Any], Sampled]) -> Rollout:
        observation, prompt_ids = self.observation, self.prompt_ids
        sampled = act(observation)
        following, rewards, _, _, infos = self.env.play(
            sampled.response_ids, sampled.response_lengths, sampled.logprobs
        )
        self._stand_at(following, infos)
        final = infos["final_info"]
        tokens = observation_tokens(observation, self.env.task)._replace(
            response_ids=sampled.response_ids, response_lengths=sampled.response_lengths
        )
        kl = final.get("kl_per_token", np.zeros(sampled.response_ids.shape, dtype=np.float32))
        return Rollout(
            tokens=tokens,
            logprobs=sampled.logprobs,
            values=sampled.values,
            rewards=torch.from_numpy(rewards).float(),
            kl_per_token=torch.from_numpy(kl),
            kl_coef=float(final["kl_coef"][0]),
            rm_scores=torch.from_numpy(final["rm_score"]).float(),
            gold=torch.from_numpy(final["gold_score"]).float() if "gold_score" in final else None,
            prompt_ids=prompt_ids,
            finish_reasons=list(final["finish_reason"]),
            responses=list(final["response"]),
        )


def concatenate(parts: list[Rollout]) -> Rollout:
    """Batches of one environment, joined."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return first._replace(
        tokens=Responses(*(torch.cat(fields) for fields in zip(*(part.tokens for part in parts), strict=True))),
        **{
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("logprobs", "values", "rewards", "kl_per_token", "rm_scores")
        },
        gold=None if first.gold is None else torch.cat([part.gold for part in parts if part.gold is not None]),
        prompt_ids=np.concatenate([part.prompt_ids for part in parts]),
        finish_reasons=[reason for part in parts for reason in part.finish_reasons],
        responses=[text for part in parts for text in part.responses],
    )


def rollout_log(rollout: Rollout) -> dict[str, float]:
    """Means over a batch of episodes."""
    mask = rollout.tokens.response_mask
    log = {
        "reward": rollout.rewards.mean().item(),
        "rm_score": rollout.rm_scores.mean().item(),
        "kl": rollout.kl_per_token.sum(1).mean().item(),
        "surprise": -rollout.logprobs[mask].mean().item(),
        "response_tokens": rollout.tokens.response_lengths.float().mean().item(),
        "eos_rate": float(np.mean([reason != "length" for reason in rollout.finish_reasons])),
    }
    if rollout.gold is not None:
        log["gold_score"] = rollout.gold.mean().item()
    return log
