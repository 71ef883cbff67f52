"""Algorithms by name: what an experiment file may ask for, and how each is built, trained and handed over.

``ppo, rloo, grpo, reinforce`` are the learners of this package; ``sb3-ppo, sb3-a2c, sb3-maskable-ppo`` are
Stable-Baselines3's own, around a language model; ``best-of-n``, ``reference`` and ``random`` do not learn.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium

from agents.baselines import RandomAgent, reference_agent
from agents.best_of_n import BestOfN
from agents.core.job import Trained
from agents.core.learner import Learner, learn_with_checkpoints
from agents.grpo import GRPO
from agents.ppo import PPO
from agents.reinforce import Reinforce
from agents.rloo import RLOO
from textenv.config import hint
from textenv.episode import Task
from textenv.registry import fresh_language_model
from textenv.registry.experiment import AgentPlan
from textenv.training.progress import Advance
from textenv.vector import TextVectorEnv

LEARNERS: dict[str, type[Learner[Any]]] = {"ppo": PPO, "rloo": RLOO, "grpo": GRPO, "reinforce": Reinforce}
SB3 = ("sb3-ppo", "sb3-a2c", "sb3-maskable-ppo")


def check_plan(plan: AgentPlan) -> None:
    """Refuse an unknown algorithm or option before anything runs; names the place in the file."""
    place = plan.places.get("algorithm", f"agent {plan.name!r}")
    if plan.algorithm not in ALGORITHMS:
        raise ValueError(
            f"{place}: algorithm must be one of {', '.join(ALGORITHMS)}, with algorithm (={plan.algorithm!r}). "
            f"{hint(plan.algorithm, ALGORITHMS)}".rstrip()
        )
    options = known_options(plan.algorithm)
    for name in plan.options:
        if options is not None and name not in options:
            raise ValueError(
                f"{plan.places.get(name, place)}: {plan.algorithm} has no option {name!r}. {hint(name, options)}"
                f"Options: {', '.join(options) or 'none'}."
            )
    try:
        if plan.algorithm in LEARNERS:
            LEARNERS[plan.algorithm].config_type(**learner_options(plan))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error


def known_options(algorithm: str) -> list[str] | None:
    """Options that an algorithm takes; None where its own constructor decides (Stable-Baselines3)."""
    if algorithm in LEARNERS:
        names = [field.name for field in dataclasses.fields(LEARNERS[algorithm].config_type) if field.name != "seed"]
        return [*names, "num_envs"]
    return {"best-of-n": ["n"], "reference": [], "random": []}.get(algorithm)


def learner_options(plan: AgentPlan) -> dict[str, Any]:
    return {name: value for name, value in plan.options.items() if name != "num_envs"}


def train(
    plan: AgentPlan, env_id: str, seed: int, total_episodes: int, folder: Path, advance: Advance | None = None
) -> Trained:
    """Train an agent on an id. A learner's checkpoint goes to ``folder`` and is gone on with when it is there."""
    if plan.algorithm in LEARNERS:
        return _train_learner(plan, env_id, seed, total_episodes, folder, advance)
    if plan.algorithm in SB3:
        from agents.sb3.training import train_sb3  # Stable-Baselines3 takes a second to import

        return train_sb3(plan, env_id, seed, total_episodes, advance)
    return FIXED[plan.algorithm](plan.options, make_env(env_id, 1).task, seed)


def make_env(env_id: str, num_envs: int, **options: Any) -> TextVectorEnv:
    env = gymnasium.make_vec(env_id, num_envs=num_envs, **options).unwrapped
    assert isinstance(env, TextVectorEnv)
    return env


def _train_learner(
    plan: AgentPlan, env_id: str, seed: int, total_episodes: int, folder: Path, advance: Advance | None
) -> Trained:
    kind = LEARNERS[plan.algorithm]
    config = kind.config_type(**learner_options(plan), seed=seed)
    env = make_env(env_id, int(plan.options.get("num_envs", config.batch_size)))
    agent = kind.load(folder, env) if (folder / "state.json").is_file() else kind(env, config)
    learn_with_checkpoints(agent, total_episodes, folder, advance=advance)
    tokens = sum(log["response_tokens"] * config.batch_size for log in agent.history)
    return Trained(agent, agent.policy.model, agent.history, math.floor(tokens + 0.5))


def _best_of_n(options: Mapping[str, Any], task: Task, seed: int) -> Trained:
    model = fresh_language_model(task.config.reference, task.config.device)
    return Trained(BestOfN(task, model, int(options.get("n", 4)), seed=seed), None, [], 0)


def _reference(options: Mapping[str, Any], task: Task, seed: int) -> Trained:
    agent = reference_agent(task, seed=seed)
    return Trained(agent, agent.model.model, [], 0)


def _random(options: Mapping[str, Any], task: Task, seed: int) -> Trained:
    return Trained(RandomAgent(task, seed=seed), None, [], 0)


FIXED: dict[str, Callable[[Mapping[str, Any], Task, int], Trained]] = {
    "best-of-n": _best_of_n,
    "reference": _reference,
    "random": _random,
}
ALGORITHMS = (*LEARNERS, *SB3, *FIXED)
