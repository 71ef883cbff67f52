"""Training Stable-Baselines3's algorithms by name, with the same record of episodes as our own learners keep."""

from dataclasses import replace
from typing import Any

import numpy as np
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from agents.core.actor import LanguageModelAgent
from agents.core.job import Trained
from agents.sb3.env import CausalLMPolicy, make_vec_env
from textenv.registry.experiment import AgentPlan
from textenv.training.progress import Advance

CURVE = ("rm_score", "gold_score", "kl")


class EpisodeLog(BaseCallback):
    """Means over the episodes that ended in each rollout; stops the training after ``total_episodes``."""

    def __init__(self, total_episodes: int, advance: Advance | None = None) -> None:
        super().__init__()
        self.total_episodes, self.advance = total_episodes, advance
        self.curve: list[dict[str, float]] = []
        self.episodes = self.tokens = 0
        self._ended: list[dict[str, Any]] = []

    def remaining(self, _: float) -> float:
        """Share of the training that is left, by episodes: steps do not tell, since responses differ in length."""
        return max(0.0, 1.0 - self.episodes / self.total_episodes)

    def _on_step(self) -> bool:
        ended = [info for info in self.locals["infos"] if "finish_reason" in info]
        self._ended += ended
        self.episodes += len(ended)
        self.tokens += sum(info["response_length"] for info in ended)
        return self.episodes < self.total_episodes

    def _on_rollout_end(self) -> None:
        if not self._ended:
            return
        log = {key: float(np.mean([info[key] for info in self._ended])) for key in CURVE if key in self._ended[0]}
        log["reward"] = float(np.mean([sum(info["reward_terms"].values()) for info in self._ended]))
        self.curve.append({"episodes": float(self.episodes), **log})
        self._ended = []
        if self.advance is not None:
            self.advance(min(self.episodes, self.total_episodes), self.total_episodes, log)


def train_sb3(plan: AgentPlan, env_id: str, seed: int, total_episodes: int, advance: Advance | None = None) -> Trained:
    """Train one of Stable-Baselines3's algorithms around the environment's reference.

    Options are those of the algorithm's constructor, and ``num_envs`` and ``linear_decay`` (the learning rate falls to
    0 over the training).
    """
    options = dict(plan.options)
    env = make_vec_env(env_id, int(options.pop("num_envs", 64)), seed=seed)
    log = EpisodeLog(total_episodes, advance)
    if options.pop("linear_decay", False):
        rate = float(options.get("learning_rate", 3e-4))
        options["learning_rate"] = lambda progress: rate * log.remaining(progress)
    kind, policy, stored = algorithm(plan.algorithm)
    try:
        model: Any = kind(policy, env, seed=seed, device="cpu", **stored, **options)
    except TypeError as error:
        place = plan.places.get("algorithm", f"agent {plan.name!r}")
        raise ValueError(f"{place}: {plan.algorithm} does not take these options ({error}).") from error
    budget = env.get_attr("task")[0].config.max_new_tokens
    model.learn(total_episodes * budget, callback=log)
    task = env.get_attr("task")[0]
    trained = replace(task.reference, name=plan.name, model=model.policy.model)
    return Trained(LanguageModelAgent(trained, task, seed=seed), trained.model, log.curve, log.tokens)


def algorithm(name: str) -> tuple[type[BaseAlgorithm], type[Any], dict[str, Any]]:
    """The class and the policy behind a name, and how it stores what it collects."""
    if name == "sb3-maskable-ppo":
        try:
            from sb3_contrib import MaskablePPO
        except ImportError as error:
            raise ValueError("sb3-maskable-ppo needs sb3-contrib. Install it: pip install 'textenv[sb3]'.") from error
        from agents.sb3.masks import MaskableCausalLMPolicy, SharedMasksDict

        return MaskablePPO, MaskableCausalLMPolicy, {"rollout_buffer_class": SharedMasksDict}
    return {"sb3-ppo": PPO, "sb3-a2c": A2C}[name], CausalLMPolicy, {}
