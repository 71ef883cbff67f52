"""How good can an agent become? The optimum of the KL-regularised objective, from samples of the reference.

The objective of an environment, ``E_π[r] − β KL(π ‖ π_ref)``, is highest at ``π* ∝ π_ref exp(r/β)``, where it is
``J*(x) = β log E_ref[exp(r/β)]`` for a prompt x (Ziebart 2010; Korbak et al. 2022). So responses of the reference tell
what the best policy would earn, as long as some of them are good enough to show it.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from textenv.episode import observation_tokens
from textenv.settings import PositiveInt, check_value
from textenv.stats import Mean, mean_ci95
from textenv.vector import TextVectorEnv

ENOUGH = 10.0
"""Effective samples of a prompt below which its estimate hangs on one or two responses."""


class Optimum(NamedTuple):
    """The range in which every agent of an environment lies, unless it is worse than the reference."""

    reference: Mean
    """Objective of the reference, which pays no KL: its mean reward, with an interval over prompts."""
    value: float
    """Estimate of J*, mean over the prompts."""
    ci95: tuple[float, float]
    """Of the estimate, for these prompts. Too narrow where ``unclear_prompts`` is above 0."""
    effective_samples: float
    """Mean over the prompts of ``(Σ w)² / Σ w²`` with ``w = exp(r/β)``: how many responses carry the estimate."""
    unclear_prompts: float
    """Share of prompts with fewer than ``ENOUGH`` effective samples. There the true optimum may be far higher."""

    def share(self, objective: float) -> float:
        """How far an agent has come on the way from the reference (0) to the optimum (1)."""
        return (objective - self.reference.mean) / (self.value - self.reference.mean)


def optimum(env: TextVectorEnv, samples_per_prompt: int = 64, *, seed: int = 0) -> Optimum:
    """Estimate the optimum of an environment from responses of its reference to each of its prompts.

    The estimate corrects the first-order bias of the logarithm, ``β Var(w) / (2 n E[w]²)``; the interval is the delta
    method's.

    Args:
        env: a vector environment with ``kl_coef`` above 0.
        samples_per_prompt: responses to each prompt. More are needed the smaller β is.
        seed: seed of the sampling.

    Raises:
        ValueError: ``kl_coef`` is 0, where the optimum is the best of all texts and no sample tells it.
    """
    check_value("samples_per_prompt", samples_per_prompt, PositiveInt)
    if env.kl_coef <= 0:
        raise ValueError(
            f"kl_coef must be above 0 to estimate an optimum, got {env.kl_coef}. Without a KL the best of all texts is "
            "the optimum, which no sample tells."
        )
    rewards = reference_rewards(env, samples_per_prompt, seed)
    return estimate(rewards, env.kl_coef)


def estimate(rewards: Float[np.ndarray, "P n"], kl_coef: float) -> Optimum:
    """The optimum from the rewards, KL left out, of n responses of the reference to each of P prompts."""
    prompts, count = rewards.shape
    top = rewards.max(1, keepdims=True)
    weights = np.exp((rewards - top) / kl_coef)
    mean = weights.mean(1)
    relative = weights.var(1, ddof=1) / mean**2 / count if count > 1 else np.full(prompts, math.nan)
    values = top[:, 0] + kl_coef * (np.log(mean) + relative / 2)
    effective = weights.sum(1) ** 2 / (weights**2).sum(1)
    half = 1.96 * kl_coef * math.sqrt(float(np.sum(relative))) / prompts
    value = float(values.mean())
    return Optimum(
        mean_ci95(rewards.mean(1)),
        value,
        (value - half, value + half),
        float(effective.mean()),
        float(np.mean(effective < ENOUGH)),
    )


def reference_rewards(env: TextVectorEnv, samples_per_prompt: int, seed: int) -> Float[np.ndarray, "P n"]:
    """Rewards without the KL of responses of the reference to each prompt of an environment."""
    task, generator = env.task, torch.Generator().manual_seed(seed)
    ids = np.repeat(np.arange(len(task.prompts.ids)), samples_per_prompt)
    parts = []
    for start in range(0, len(ids), env.num_envs):
        chunk = ids[start : start + env.num_envs]
        observation, _ = env.reset(options={"prompt_id": np.resize(chunk, env.num_envs)})
        batch = observation_tokens(observation, task.prompt_width)
        sampled = task.respond(task.reference.model, batch, generator=generator)
        _, rewards, _, _, infos = env.play(sampled.response_ids, sampled.response_lengths, sampled.logprobs)
        final = infos.get("final_info", infos)
        paid = rewards + env.kl_coef * final.get("kl", 0.0)  # the KL of a sample of the reference is 0 but for rounding
        parts.append(paid[: len(chunk)])
    return np.concatenate(parts).reshape(-1, samples_per_prompt)
