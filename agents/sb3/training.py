"""Training Stable-Baselines3's algorithms by name, with the same record of episodes as our own learners keep."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from agents.core.agent import LanguageModelAgent
from agents.core.job import Algorithm, Job, Trained
from agents.sb3.env import make_vec_env
from agents.sb3.policy import MEMORY_OPTIONS, CausalLMPolicy
from textenv.settings import PositiveInt, check_value
from textenv.training.memory import MemoryConfig
from textenv.training.progress import Advance
from textenv.training.trackers import Report, tracking

CURVE = ("rm_score", "gold_score", "kl")
OPTIONS = ("num_envs", "linear_decay", *MEMORY_OPTIONS)


class EpisodeLog(BaseCallback):
    """Means over the episodes that ended in each rollout; stops the training after ``total_episodes``."""

    def __init__(self, total_episodes: int, advance: Advance | None = None) -> None:
        super().__init__()
        self.total_episodes, self.advance = total_episodes, advance
        self.report = Report()
        self.curve: list[dict[str, float]] = []
        self.episodes = self.tokens = 0
        self._ended: list[dict[str, Any]] = []

    def remaining(self, _: float) -> float:
        """Share of the training that is left, counted in episodes, since responses differ in length."""
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
        self.report(self.curve[-1], len(self.curve))
        self._ended = []
        if self.advance is not None:
            self.advance(min(self.episodes, self.total_episodes), self.total_episodes, log)


class SB3Algorithm(Algorithm):
    """One of Stable-Baselines3's algorithms, with a language model as its policy.

    Options are those of the algorithm's constructor, ``num_envs``, ``linear_decay`` (of the learning rate, to 0), and
    those of the policy that save memory.
    """

    kind: ClassVar[type[BaseAlgorithm]]
    policy: ClassVar[type[CausalLMPolicy]] = CausalLMPolicy
    settings: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def option_names(cls) -> list[str]:
        given = {"self", "policy", "env", "seed", "device", *cls.settings}
        return [*(name for name in inspect.signature(cls.kind.__init__).parameters if name not in given), *OPTIONS]

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        parameters = inspect.signature(cls.kind.__init__).parameters.items()
        hints = {name: parameter.annotation for name, parameter in parameters}
        hints |= {"num_envs": PositiveInt, "linear_decay": bool}
        for name, value in options.items():
            if name in hints:
                check_value(name, value, hints[name])
        MemoryConfig(**_memory(options))

    @classmethod
    def train(cls, job: Job) -> Trained:
        options = {name: value for name, value in job.options.items() if name not in MEMORY_OPTIONS}
        options["policy_kwargs"] = {**(options.get("policy_kwargs") or {}), **_memory(job.options)}
        env = make_vec_env(job.env_id, int(options.pop("num_envs", 64)), seed=job.seed)
        log = EpisodeLog(job.total_episodes, job.advance)
        if options.pop("linear_decay", False):
            rate = float(options.get("learning_rate", 3e-4))
            options["learning_rate"] = lambda progress: rate * log.remaining(progress)
        kind: Any = cls.kind
        model = kind(cls.policy, env, seed=job.seed, device="cpu", **cls.settings, **options)
        task = env.get_attr("task")[0]
        with tracking(job.report_to, job.folder, job.options, name=job.name) as log.report:
            model.learn(job.total_episodes * task.config.max_new_tokens, callback=log)
        trained = replace(task.reference, name=cls.__name__, model=model.policy.model)
        return Trained(LanguageModelAgent(trained, task, seed=job.seed), trained.model, log.curve, log.tokens)


def _memory(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in MEMORY_OPTIONS}


class SB3PPO(SB3Algorithm):
    kind = PPO


class SB3A2C(SB3Algorithm):
    kind = A2C
