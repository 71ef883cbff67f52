"""N text-generation episodes at once: one batched scorer, and whole responses in one call (``play``)."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from textenv.episode import Episodes, whole_numbers
from textenv.settings import PositiveInt, check_value
from textenv.task import ScoredByTask

Stepped = tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]
"""Observations, rewards, terminated, truncated, infos."""


class TextVectorEnv(ScoredByTask, VectorEnv):
    """The vector form of :class:`textenv.env.TextEnv`: it returns what a ``SyncVectorEnv`` of N would.

    A reset with seed s seeds slot i with s + i. ``autoreset_mode`` is "SameStep" (default), "NextStep" or "Disabled". A
    step that ends no episode makes no model call. Other keyword arguments are those of ``TextEnv``.

    :meth:`play` is the fast engine of the task: it takes whole responses and returns what their last ``step`` would.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        check_value("num_envs", num_envs, PositiveInt)
        self._set_up(render_mode, options)
        self.num_envs = num_envs
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = self.task.observation_space
        self.single_action_space = self.task.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._episodes = Episodes(num_envs, self.task)
        self._rngs: list[np.random.Generator | None] = [None] * num_envs
        self._seeds: list[int] = [-1] * num_envs
        self._resetting = np.zeros(num_envs, dtype=bool)

    @property
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The generator of each slot."""
        return tuple(self._rng(slot) for slot in range(self.num_envs))

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each slot."""
        _ = self.np_random
        return tuple(self._seeds)

    @property
    def random_states(self) -> list[dict[str, Any]]:
        """State of every slot's generator as JSON, for checkpoints; assign to restore."""
        return [dict(rng.bit_generator.state) for rng in self.np_random]

    @random_states.setter
    def random_states(self, states: list[dict[str, Any]]) -> None:
        for slot, state in enumerate(states):
            self._rng(slot).bit_generator.state = state

    def require_same_step(self, purpose: str) -> None:
        """Refuse a ``purpose`` that needs a new episode to start in the very step that ends the last one."""
        if self.autoreset_mode is not AutoresetMode.SAME_STEP:
            rule = f"autoreset_mode must be 'SameStep' for {purpose}, got {self.autoreset_mode.value!r}"
            raise ValueError(f"{rule}. Make the environment without that keyword.")

    def report_logprobs(self, logprobs: Any) -> None:
        """Report the policy's log-probabilities ``(N,)`` of the actions that the next ``step`` takes."""
        self._episodes.report(np.asarray(logprobs, dtype=np.float32).reshape(self.num_envs))

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start episodes in every slot, or in those of ``options["reset_mask"]``.

        ``options``: ``prompt`` (text for all slots) or ``prompt_id`` (one int for all, or one per slot).
        """
        seeds = [None] * self.num_envs if seed is None else seed
        seeds = [seeds + i for i in range(self.num_envs)] if isinstance(seeds, int) else seeds
        if len(seeds) != self.num_envs:
            raise ValueError(
                f"seed must be one number, or one per slot ({self.num_envs}), got {len(seeds)}. Give as many."
            )
        options = dict(options or {})
        mask = np.asarray(options.pop("reset_mask", np.ones(self.num_envs, dtype=bool)))
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            rule = f"reset_mask must be a bool array of shape ({self.num_envs},) with a True in it"
            raise ValueError(f"{rule}, got {mask}. Name at least one slot.")
        infos = []
        slots = np.flatnonzero(mask)
        for slot in map(int, slots):
            if seeds[slot] is not None:
                self._rngs[slot], self._seeds[slot] = seeding.np_random(seeds[slot])
            infos.append(self._episodes.begin(slot, self._rng(slot), self._slot_options(options, slot)))
        self._resetting[slots] = False
        return self._episodes.observe(), scatter(self.num_envs, slots, columns_of(infos))

    def step(self, actions: Any) -> Stepped:
        if self.autoreset_mode is AutoresetMode.DISABLED and self._resetting.any():
            raise ValueError(
                "with autoreset off, ended episodes must be reset before the next step, got ended slots "
                f"{np.flatnonzero(self._resetting).tolist()}. Call reset(options={{'reset_mask': ...}})."
            )
        actions = whole_numbers("actions", actions)
        if actions.shape != (self.num_envs,):
            raise ValueError(f"actions must have shape ({self.num_envs},), got {actions.shape}. Give one per slot.")
        resetting = np.flatnonzero(self._resetting)
        ended = self._episodes.append(~self._resetting, actions)
        infos: dict[str, Any] = {}
        if resetting.size:
            infos = scatter(self.num_envs, resetting, self._begin(resetting))
        return self._result(ended, infos)

    def play(self, response_ids: Any, response_lengths: Any, logprobs: Any = None) -> Stepped:
        """Play one whole response per slot and return what each slot's last ``step`` would have returned.

        Args:
            response_ids: ints ``(N, T)``, right-padded; each ends at its first stop token or at the budget.
            response_lengths: ints ``(N,)``, the ending token included.
            logprobs: floats ``(N, T)``, the policy's log-probabilities of ``response_ids``.

        Raises:
            ValueError: an episode has begun already, or a response does not end where the task ends it.
        """
        ids, lengths = whole_numbers("response_ids", response_ids), whole_numbers("response_lengths", response_lengths)
        self._episodes.fill(ids, lengths, None if logprobs is None else np.asarray(logprobs, dtype=np.float32))
        return self._result(np.ones(self.num_envs, dtype=bool), {})

    def action_masks(self) -> np.ndarray:
        """Bool ``(N, V)``: True where an action is allowed now."""
        return self._episodes.action_masks()

    def render(self) -> tuple[str, ...] | None:  # type: ignore[override]
        return None if self.render_mode is None else tuple(map(self._episodes.text, range(self.num_envs)))

    def _result(self, ended: np.ndarray, infos: dict[str, Any]) -> Stepped:
        rewards = np.zeros(self.num_envs)
        self._resetting = np.zeros(self.num_envs, dtype=bool)
        slots = np.flatnonzero(ended)
        if slots.size:
            outcome = self.task.outcome(self._episodes.finished(slots))
            rewards[slots] = outcome.rewards
            if self.autoreset_mode is AutoresetMode.SAME_STEP:
                final_obs = np.full(self.num_envs, None, dtype=object)
                final_obs[slots] = unbatch(self._episodes.observe(slots), slots.size)
                columns = {"final_info": outcome.infos, **self._begin(slots)}
                infos = scatter(self.num_envs, slots, columns)
                infos["final_obs"], infos["_final_obs"] = final_obs, ended.copy()
            else:
                infos = {**infos, **scatter(self.num_envs, slots, outcome.infos, into=infos)}
                self._resetting = ended.copy()
        return self._episodes.observe(), rewards, ended.copy(), np.zeros(self.num_envs, dtype=bool), infos

    def _begin(self, slots: np.ndarray) -> dict[str, Any]:
        return columns_of([self._episodes.begin(slot, self._rng(slot)) for slot in slots])

    def _rng(self, slot: int) -> np.random.Generator:
        rng = self._rngs[slot]
        if rng is None:
            rng, self._seeds[slot] = seeding.np_random()
            self._rngs[slot] = rng
        return rng

    def _slot_options(self, options: dict[str, Any], slot: int) -> dict[str, Any]:
        ids = options.get("prompt_id")
        if ids is None or np.ndim(ids) == 0:
            return options
        if len(ids) != self.num_envs:
            raise ValueError(f"prompt_id must be one, or one per slot ({self.num_envs}), got {len(ids)}. Give as many.")
        return {**options, "prompt_id": ids[slot]}


def make_vec(env_id: str, num_envs: int = 1, **options: Any) -> TextVectorEnv:
    """``gymnasium.make_vec`` for text environments: without wrappers, and typed as a :class:`TextVectorEnv`.

    Raises:
        ValueError: the id belongs to another kind of environment.
    """
    env = gymnasium.make_vec(env_id, num_envs=num_envs, **options).unwrapped
    if not isinstance(env, TextVectorEnv):
        rule = f"the id must be that of a text environment, got {env_id!r}, a {type(env).__name__}"
        raise ValueError(f"{rule}. `textenv envs` lists the ids of this package.")
    return env


def columns_of(infos: list[dict[str, Any]]) -> dict[str, Any]:
    """Infos with the same keys, as columns."""
    return {key: [info[key] for info in infos] for key in infos[0]}


def entry(columns: dict[str, Any], slot: int) -> dict[str, Any]:
    """One slot of a vector info, or of columns, in plain Python numbers and strings."""
    out = {}
    for key, values in columns.items():
        if isinstance(values, dict):
            out[key] = entry(values, slot)
        elif not key.startswith("_"):
            out[key] = values[slot].item() if isinstance(values[slot], np.generic) else values[slot]
    return out


def unbatch(observations: Any, count: int) -> list[Any]:
    """A batched observation as a list of single ones."""
    if isinstance(observations, dict):
        return [{key: value[i] for key, value in observations.items()} for i in range(count)]
    return list(observations)


def scatter(
    num_envs: int, slots: np.ndarray, columns: dict[str, Any], into: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Columns of some slots as a vector info: one full-width array per key, and a mask ``_key`` of the slots set.

    The layout is that of ``VectorEnv._add_info``, built by column instead of by element.
    """
    into = into or {}
    out: dict[str, Any] = {}
    for key, values in columns.items():
        mask = into.get(f"_{key}", np.zeros(num_envs, dtype=bool)).copy()
        mask[slots] = True
        if isinstance(values, dict):
            out[key] = scatter(num_envs, slots, values, into.get(key))
        else:
            text = isinstance(values, list) and isinstance(values[0], str)
            column = np.empty(len(values), dtype=object) if text else np.asarray(values)
            if text:
                column[:] = values
            empty = np.full(num_envs, None) if text else np.zeros((num_envs, *column.shape[1:]), dtype=column.dtype)
            full = into[key].copy() if key in into else empty
            full[slots] = column
            out[key] = full
        out[f"_{key}"] = mask
    return out
