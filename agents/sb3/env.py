"""Stable-Baselines3 agents on text environments.

Command::

    from stable_baselines3 import PPO
    from agents.sb3 import CausalLMPolicy, make_vec_env

    env = make_vec_env("textenv/Micro-v0", 256)
    PPO(CausalLMPolicy, env, n_steps=4, batch_size=256, gamma=1.0).learn(200_000)

The policy starts from the environment's reference, and the KL to it is in the reward.
"""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Bool
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from agents.sb3.policy import TokenSpace, take_decision
from textenv.task import Task
from textenv.vector import TextVectorEnv, entry, make_vec

WHOLE = ("reset", "step", "play", "close")
"""Methods of the environment that move all slots; they have methods of their own here."""


def make_vec_env(env_id: str, num_envs: int, *, seed: int | None = None, **options: Any) -> VecMonitor:
    """``num_envs`` episodes of a registered id as a Stable-Baselines3 environment, with its episode statistics."""
    env = TextVecEnv(make_vec(env_id, num_envs, **options))
    if seed is not None:
        env.seed(seed)
    return VecMonitor(env)


class TextVecEnv(VecEnv):
    """A :class:`textenv.vector.TextVectorEnv` in Stable-Baselines3's interface: it returns what a ``DummyVecEnv`` of N
    single environments would, batched natively.

    A policy of this package needs no ``report_logprobs``: the environment reads the policy's last decision. For other
    policies ``kl_source`` decides. Attributes and methods belong to all slots at once.
    """

    def __init__(self, env: gymnasium.vector.VectorEnv) -> None:
        if not isinstance(env, TextVectorEnv):
            raise ValueError(
                f"env must be an unwrapped text environment, got {env}. Make it with textenv.vector.make_vec, put "
                "Stable-Baselines3's wrappers around TextVecEnv."
            )
        env.require_same_step("Stable-Baselines3")
        self.env = env
        self._observation: Any = None
        self._actions = np.zeros(env.num_envs, dtype=np.int64)
        super().__init__(env.num_envs, env.single_observation_space, TokenSpace(env.task))

    @property
    def task(self) -> Task:
        return self.env.task

    @property
    def kl_coef(self) -> float:
        """β; assign with ``set_attr("kl_coef", value)``, which passes through wrappers."""
        return self.env.kl_coef

    @property
    def spec(self) -> Any:
        return self.env.spec

    def reset(self) -> Any:
        """Start an episode in every slot, using up the seeds and options that were set before."""
        for number, options in enumerate(self._options):
            same = np.array([other == options for other in self._options])
            if same.argmax() == number:  # the first slot of those with these options
                chosen = {**options, "reset_mask": same}
                self._observation, infos = self.env.reset(seed=list(self._seeds), options=chosen)
                self._keep_reset_infos(infos, np.flatnonzero(same))
        self._reset_seeds()
        self._reset_options()
        return self._observation

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = np.asarray(actions)
        decision = take_decision(self._observation, self._actions)
        if decision is None:
            return
        if decision.rule != self.task.rule:
            raise ValueError(
                f"the policy must draw tokens by the environment's rule, {self.task.rule}, got {decision.rule}. Make "
                "the environment with the options that the policy was made for, or pass policy_kwargs."
            )
        self.env.report_logprobs(decision.logprobs.cpu().numpy())

    def step_wait(self) -> tuple[Any, np.ndarray, Bool[np.ndarray, " N"], list[dict[str, Any]]]:
        self._observation, rewards, ended, _, columns = self.env.step(self._actions)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        slots = np.flatnonzero(ended)
        for slot in map(int, slots):
            infos[slot] = entry(columns["final_info"], slot)
            infos[slot]["TimeLimit.truncated"] = False
            infos[slot]["terminal_observation"] = columns["final_obs"][slot]
        if slots.size:
            self._keep_reset_infos(columns, slots)
        return self._observation, rewards.astype(np.float32), ended, infos

    def action_masks(self) -> Bool[np.ndarray, "N V"]:
        """True where an action is allowed now."""
        return self.env.action_masks()

    def render(self, mode: str | None = None) -> str | None:  # type: ignore[override]
        """The text of every slot, one per line (``render_mode="ansi"``)."""
        texts = self.env.render()
        return None if texts is None else "\n".join(texts)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.env, attr_name)] * len(self._slots(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        if not hasattr(self.env, attr_name) or len(self._slots(indices)) < self.num_envs:
            raise ValueError(
                f"an attribute must exist and is set for all slots at once, got {attr_name!r} and indices {indices}. "
                "Call set_attr(name, value) without indices."
            )
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call a method once. A result with one entry per slot is split; any other is repeated for every slot."""
        if method_name in WHOLE:
            rule = "env_method takes methods that do not move the episodes"
            raise ValueError(f"{rule}, got {method_name!r}. Call it directly.")
        answer = getattr(self.env, method_name)(*args, **kwargs)
        split = isinstance(answer, np.ndarray | tuple | list) and len(answer) == self.num_envs
        return [answer[slot] if split else answer for slot in self._slots(indices)]

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * len(self._slots(indices))

    def close(self) -> None:
        self.env.close()

    def _slots(self, indices: Any) -> Sequence[int]:
        return list(self._get_indices(indices))

    def _keep_reset_infos(self, columns: dict[str, Any], slots: np.ndarray) -> None:
        for slot in map(int, slots):
            self.reset_infos[slot] = entry({key: columns[key] for key in ("prompt", "prompt_id")}, slot)
