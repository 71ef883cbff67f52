"""The environment under test: making it, playing random episodes in it, and comparing what it returned."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from jaxtyping import Bool, Int

from textenv import registry
from textenv.config import TaskConfig

EOS_RATES = (1.0, 0.25, 0.25, 0.25, 0.0)
"""Chance of EOS at each token, per episode: one ends at once, one uses its whole budget, the others lie in between."""

TOLERANCE = 1e-5
"""Absolute and relative tolerance of floats; everything else is compared exactly."""

Step = tuple[Any, Any, Any, Any, dict[str, Any]]
"""Observation, reward, terminated, truncated, info."""


class Subject:
    """An id and its options."""

    def __init__(self, env_id: str, options: Mapping[str, Any]) -> None:
        self.spec = registry.environment_spec(env_id)
        self.options = dict(options)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Every option of the task: from the environment's own ``task.config``, else from what it was made with."""
        task = getattr(self.make().unwrapped, "task", None)
        if isinstance(getattr(task, "config", None), TaskConfig):
            return vars(task.config)  # type: ignore[union-attr]
        defaults = {f.name: f.default for f in dataclasses.fields(TaskConfig)}
        return {**defaults, **self.spec.kwargs, **self.options}

    @property
    def has_vector(self) -> bool:
        return self.spec.vector_entry_point is not None

    def make(self, spec: Any = None, **more: Any) -> Any:
        """An environment with the reference as its policy. Gymnasium's checker is off, since a check runs its rules."""
        more = {**self.options, **more} if spec is None else more
        return attach(gymnasium.make(self.spec if spec is None else spec, disable_env_checker=True, **more))

    def make_vec(self, num_envs: int, spec: Any = None, **more: Any) -> Any:
        if spec is not None:
            return attach(gymnasium.make_vec(spec))
        return attach(gymnasium.make_vec(self.spec, num_envs=num_envs, **{**self.options, **more}))


def attach(env: Any) -> Any:
    env.unwrapped.attach_policy(env.unwrapped.reference.model)
    return env


class Episode(NamedTuple):
    """One episode of a single environment: copies of what it returned, and what it was given."""

    start: tuple[Any, dict[str, Any]]
    steps: list[Step]
    actions: list[int]
    logprobs: list[float]
    masks: list[Bool[np.ndarray, " V"]]
    """Allowed actions before each step."""


def run_episode(
    env: Any,
    seed: int | None,
    rng: np.random.Generator,
    budget: int,
    *,
    eos_rate: float = 0.25,
    touch: Callable[[Any], None] = lambda returned: None,
) -> Episode:
    """Play random allowed tokens, EOS with probability ``eos_rate``, and report random log-probabilities.

    ``touch`` is called on everything returned, once it has been copied.
    """
    inner = env.unwrapped
    start = env.reset(seed=seed)
    episode = Episode(copy.deepcopy(start), [], [], [], [])
    touch(start)
    while len(episode.steps) <= budget:
        mask = action_masks(inner)
        action = int(choose(rng, mask[None], inner.reference.eos_id, np.array([eos_rate]))[0])
        logprob = -3.0 * float(rng.random())
        inner.report_logprobs(logprob)
        step = env.step(action)
        episode.steps.append(copy.deepcopy(step))
        episode.actions.append(action)
        episode.logprobs.append(logprob)
        episode.masks.append(mask)
        touch(step)
        if step[2] or step[3]:
            return episode
    raise AssertionError(f"an episode must end within max_new_tokens ({budget}) steps, and did not. End it there.")


def run_vector(
    env: Any, seed: int, steps: int, *, touch: Callable[[Any], None] = lambda returned: None
) -> list[tuple[Any, ...]]:
    """Copies of what a vector environment returned to ``reset`` and ``steps`` random steps."""
    inner, rng = env.unwrapped, np.random.default_rng(seed)
    returned = [env.reset(seed=seed)]
    trace = [copy.deepcopy(returned[0])]
    touch(returned[0])
    for _ in range(steps):
        masks = action_masks(inner)
        inner.report_logprobs(-3.0 * rng.random(env.num_envs))
        step = env.step(choose(rng, masks, inner.reference.eos_id, np.full(env.num_envs, 0.25)))
        trace.append(copy.deepcopy(step))
        touch(step)
    return trace


def action_masks(inner: Any) -> np.ndarray:
    return np.asarray(inner.action_masks()).copy()


def choose(
    rng: np.random.Generator, masks: Bool[np.ndarray, "N V"], eos_id: int, eos_rates: np.ndarray
) -> Int[np.ndarray, " N"]:
    """An allowed action per row: EOS with its probability if allowed, else any other at random."""
    actions = []
    for mask, rate in zip(masks, eos_rates, strict=True):
        others = np.flatnonzero(mask & (np.arange(len(mask)) != eos_id))
        actions.append(eos_id if mask[eos_id] and rng.random() < rate else int(rng.choice(others)))
    return np.array(actions)


def difference(got: Any, want: Any, path: str = "") -> str | None:
    """Where and how two nested values differ, with ``TOLERANCE`` for floats; None if they do not."""
    if type(got) is not type(want):
        return f"{path or 'value'}: type {type(got).__name__}, not {type(want).__name__}"
    if isinstance(want, dict):
        if got.keys() != want.keys():
            return f"{path or 'value'}: keys {sorted(got)}, not {sorted(want)}"
        return first_of(difference(got[key], want[key], f"{path}/{key}") for key in want)
    if isinstance(want, tuple | list):
        if len(got) != len(want):
            return f"{path or 'value'}: length {len(got)}, not {len(want)}"
        return first_of(difference(one, other, f"{path}[{i}]") for i, (one, other) in enumerate(zip(got, want)))
    if isinstance(want, np.ndarray):
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            return f"{path}: {got.dtype} of shape {got.shape}, not {want.dtype} of shape {want.shape}"
        if want.dtype == object:
            return difference(list(got), list(want), path)
    same = close(got, want) if isinstance(want, float | np.floating) or is_float_array(want) else np.all(got == want)
    return None if same else f"{path or 'value'}: {got!r}, not {want!r}"


def first_of(found: Any) -> str | None:
    return next((item for item in found if item is not None), None)


def close(got: Any, want: Any, tolerance: float = TOLERANCE) -> bool:
    return bool(np.allclose(got, want, rtol=tolerance, atol=tolerance, equal_nan=True))


def is_float_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def row(value: Any, index: int) -> Any:
    """One slot of a vector info, a batched observation or a column."""
    if isinstance(value, dict):
        return {key: row(part, index) for key, part in value.items() if not key.startswith("_")}
    return value[index]


def plain(value: Any) -> Any:
    """NumPy scalars as Python ones, also inside dicts."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return value.item() if isinstance(value, np.generic) else value


class Skipped(Exception):
    """Raised with the reason when a check cannot run."""


def expect(condition: Any, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def expect_equal(name: str, got: Any, want: Any, remedy: str = "") -> None:
    expect(got == want, f"{name} must be {want}, got {got}. {remedy}".rstrip())


def expect_same(got: Any, want: Any, what: str) -> None:
    found = difference(got, want)
    expect(found is None, f"{what}: {found}")


def episodes(subject: Subject, env: Any, **options: Any) -> list[Episode]:
    """A few random episodes, the same for every environment that behaves the same."""
    rng = np.random.default_rng(0)
    return [
        run_episode(env, seed, rng, subject.settings["max_new_tokens"], eos_rate=rate, **options)
        for seed, rate in enumerate(EOS_RATES)
    ]
