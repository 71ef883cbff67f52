"""Evaluate any agent on any id: every prompt answered, every answer scored, means with confidence intervals."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from textenv.optimum import Optimum, optimum
from textenv.stats import Mean, mean_ci95
from textenv.vector import TextVectorEnv, make_vec

__all__ = ["Agent", "Evaluation", "Optimum", "evaluate", "optimum"]


@runtime_checkable
class Agent(Protocol):
    """Anything that predicts the way Stable-Baselines3's models do.

    An agent that also has ``respond(observation, deterministic) -> Sampled``, for whole responses, is evaluated through
    ``play``, many times faster. One whose responses have no known log-probability sets ``knows_logprobs = False``.
    """

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """The next token of each observation, and the state to pass to the next call."""
        ...


class Evaluation(NamedTuple):
    """Finished episodes of one agent, one entry per episode."""

    prompts: list[str]
    responses: list[str]
    prompt_ids: Int[np.ndarray, " B"]
    rewards: Float[np.ndarray, " B"]
    rm_scores: Float[np.ndarray, " B"]
    kl: Float[np.ndarray, " B"] | None
    """k1 summed over the response, nats; None when the environment knows no KL for this agent."""
    gold: Float[np.ndarray, " B"] | None
    lengths: Int[np.ndarray, " B"]
    """Response tokens, EOS included."""
    finish_reasons: list[str]
    response_ids: Int[np.ndarray, "B T"]
    """The responses as tokens, right-padded."""
    kl_per_token: Float[np.ndarray, "B T"] | None
    """k1 of each token, nats, zeros on padding; None where ``kl`` is."""
    logprobs: Float[np.ndarray, "B T"] | None = None
    """Log-probability of each token as the agent drew it, zeros on padding; None for an agent without ``respond`` or
    that does not know it. Less ``kl_per_token`` it is the reference's."""

    def summary(self) -> dict[str, Mean | float]:
        """Means of everything measured, with intervals that treat the episodes as independent."""
        out: dict[str, Mean | float] = {
            "reward": mean_ci95(self.rewards),
            "rm_score": mean_ci95(self.rm_scores),
            "response_tokens": mean_ci95(self.lengths),
            "eos_rate": float(np.mean([reason != "length" for reason in self.finish_reasons])),
            "episodes": float(len(self.rewards)),
        }
        if self.kl is not None:
            out["kl"] = mean_ci95(self.kl)
        if self.gold is not None:
            out["gold_score"] = mean_ci95(self.gold)
        return out


def evaluate(
    agent: Agent,
    env: TextVectorEnv | str,
    *,
    prompt_ids: Any = None,
    deterministic: bool = False,
    num_envs: int = 128,
    **options: Any,
) -> Evaluation:
    """Answer the prompts ``prompt_ids`` (default: every prompt of the environment, once) and score the answers.

    Args:
        agent: one of this package, a Stable-Baselines3 model, or anything else that predicts the same way.
        env: a vector environment, or an id to make one from with ``num_envs`` slots and ``options``.
        deterministic: take the most likely tokens instead of sampling.

    Raises:
        ValueError: ``options`` are given for an environment already made, or it cannot be stepped (no SameStep).
    """
    if isinstance(env, str):
        env = make_vec(env, num_envs, **options)
    elif options:
        raise ValueError(f"options go with an id, got {sorted(options)} for an environment made before. Drop them.")
    ids = np.arange(len(env.task.prompts.ids)) if prompt_ids is None else np.asarray(prompt_ids)
    run = _play if hasattr(agent, "respond") else _step
    parts = []
    for start in range(0, len(ids), env.num_envs):
        chunk = ids[start : start + env.num_envs]
        filled = np.concatenate([chunk, np.resize(ids, env.num_envs - len(chunk))])
        columns = run(agent, env, filled, deterministic).items()
        parts.append({key: value[: len(chunk)] for key, value in columns if isinstance(value, np.ndarray)})
    return _concatenate(parts, ids)


def _play(agent: Any, env: TextVectorEnv, ids: np.ndarray, deterministic: bool) -> dict[str, Any]:
    observation, _ = env.reset(options={"prompt_id": ids})
    sampled = agent.respond(observation, deterministic)
    logprobs = sampled.logprobs if getattr(agent, "knows_logprobs", True) else None
    _, rewards, _, _, infos = env.play(sampled.response_ids, sampled.response_lengths, logprobs)
    columns = {"response_ids": _within(env, sampled.response_ids)}
    if logprobs is not None:
        real = np.arange(env.task.config.max_new_tokens) < np.asarray(sampled.response_lengths)[:, None]
        columns["logprobs"] = np.where(real, _within(env, logprobs), 0.0)
    return {**infos.get("final_info", infos), "reward": rewards, **columns}


def _within(env: TextVectorEnv, values: Any) -> np.ndarray:
    """Columns cut and padded with zeros to the environment's budget."""
    budget = env.task.config.max_new_tokens
    values = np.asarray(values)[:, :budget]
    return np.pad(values, ((0, 0), (0, budget - values.shape[1])))


def _step(agent: Agent, env: TextVectorEnv, ids: np.ndarray, deterministic: bool) -> dict[str, Any]:
    """Step until the first episode of every slot has ended; later episodes are discarded."""
    env.require_same_step("an agent without respond")
    observation, _ = env.reset(options={"prompt_id": ids})
    rows: list[dict[str, Any] | None] = [None] * env.num_envs
    while any(row is None for row in rows):
        actions, _ = agent.predict(observation, deterministic=deterministic)
        observation, rewards, ended, _, infos = env.step(actions)
        for slot in np.flatnonzero(ended):
            if rows[slot] is None:
                final = infos["final_obs"][slot]
                ids = final["input_ids"] if isinstance(final, dict) else final.clip(min=0)
                columns = {**infos["final_info"], "reward": rewards}
                row = {key: values[slot] for key, values in columns.items() if isinstance(values, np.ndarray)}
                rows[slot] = {**row, "response_ids": ids[env.task.prompt_width :]}
    done = [row for row in rows if row is not None]
    return {key: np.asarray([row[key] for row in done]) for key in done[0]}


def _concatenate(parts: list[dict[str, Any]], ids: np.ndarray) -> Evaluation:
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    known = set(joined["kl_source"]) <= {"reported", "policy"}
    return Evaluation(
        prompts=list(joined["prompt"]),
        responses=list(joined["response"]),
        prompt_ids=ids,
        rewards=joined["reward"],
        rm_scores=joined["rm_score"],
        kl=joined["kl"] if known else None,
        gold=joined.get("gold_score"),
        lengths=joined["response_length"],
        finish_reasons=list(joined["finish_reason"]),
        response_ids=joined["response_ids"],
        kl_per_token=joined["kl_per_token"] if known else None,
        logprobs=joined.get("logprobs"),
    )
