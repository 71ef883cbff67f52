"""Rules for any Gymnasium environment: checkers, specs, pickling, shared models, no global state, no aliasing."""

import copy
import functools
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector.utils import CloudpickleWrapper
from gymnasium.wrappers import RecordEpisodeStatistics

from textenv.conformance.subject import (
    Skipped,
    Subject,
    attach,
    difference,
    episodes,
    expect,
    expect_equal,
    expect_same,
    run_vector,
)


def make(subject: Subject) -> str:
    """The environment can be made, single and vector."""
    reference = subject.make().unwrapped.reference
    if subject.has_vector:
        subject.make_vec(2)
    return f"a turn ends at {' or '.join(reference.tokenizer.convert_ids_to_tokens(list(reference.ending_ids)))}"


def global_generators(subject: Subject) -> str:
    """Nothing draws from the process's global generators or seeds them."""

    def states() -> dict[str, Any]:
        return {
            "random": random.getstate(),
            "numpy.random": np.random.get_state(),  # noqa: NPY002
            "torch": torch.get_rng_state().numpy(),
        }

    saved = states()
    try:
        random.seed(987_654_321)
        np.random.seed(987_654_321)  # noqa: NPY002
        torch.manual_seed(987_654_321)
        before = states()
        try:
            env = subject.make()
        except Exception:
            raise Skipped("it cannot be made") from None
        episodes(subject, env)
        if subject.has_vector:
            run_vector(subject.make_vec(2), 0, 8)
        after = states()
    finally:
        random.setstate(saved["random"])
        np.random.set_state(saved["numpy.random"])  # noqa: NPY002
        torch.set_rng_state(torch.from_numpy(saved["torch"]))
    for name, state in before.items():
        found = f"the global generator of {name} must be left alone, but was used or seeded. Use self.np_random."
        expect(difference(state, after[name]) is None, found)
    return "random, numpy.random and torch untouched"


def gymnasium_checker(subject: Subject) -> str:
    modes = subject.make().metadata.get("render_modes") or [None]
    env = subject.make(render_mode=modes[0], **for_random_actions(subject)).unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)
    return "check_env without a warning"


def stable_baselines3_checker(subject: Subject) -> str:
    try:
        from stable_baselines3.common.env_checker import check_env as sb3_check_env
    except ImportError:
        raise Skipped("stable_baselines3 is not installed") from None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sb3_check_env(subject.make(**for_random_actions(subject)).unwrapped)
    return "check_env without a warning"


def for_random_actions(subject: Subject) -> dict[str, Any]:
    """Options for checkers that act at random: they read no action masks and report no log-probabilities."""
    masked = {"min_new_tokens": 0} if subject.settings["min_new_tokens"] else {}
    return masked | ({"kl_source": "auto"} if subject.settings["kl_source"] == "reported" else {})


def spec_json(subject: Subject) -> str:
    """The spec survives JSON, and environments made from it play the same."""
    expect_equal("max_episode_steps", subject.spec.max_episode_steps, None, "The length budget belongs to the task.")
    env = subject.make()
    assert env.spec is not None
    again = EnvSpec.from_json(env.spec.to_json())
    expect_same(episodes(subject, subject.make(again)), episodes(subject, env), "an environment made from JSON differs")
    if not subject.has_vector:
        return "single; there is no vector form"
    vector = subject.make_vec(3)
    remade = subject.make_vec(3, EnvSpec.from_json(vector.spec.to_json()))
    expect_same(run_vector(remade, 1, 12), run_vector(vector, 1, 12), "a vector made from JSON differs")
    return "single and vector play the same when made from JSON"


PICKLE_LIMIT = 100_000
"""Bytes: names and token buffers fit easily, weights do not."""


def shared_models(subject: Subject) -> str:
    """One reference per process: neither ``make`` nor ``.spec`` nor a wrapper copies it."""
    model = subject.make().unwrapped.reference.model
    copies: list[str] = []
    doing = ""

    def refuse(memo: Any) -> Any:
        copies.append(doing)
        return model

    model.__deepcopy__ = refuse
    try:
        doing = "making the environment"
        env = subject.make()
        doing = "a wrapper or .spec"
        wrapped = RecordEpisodeStatistics(env)
        copy.deepcopy(wrapped.spec)
        wrapped.reset(seed=0)
        doing = "making the vector"
        inner: list[Any] = [env.unwrapped, wrapped.unwrapped]
        if subject.has_vector:
            vector = subject.make_vec(2)
            copy.deepcopy(vector.spec)
            inner.append(vector.unwrapped)
    finally:
        del model.__deepcopy__
    expect(not copies, f"the reference must not be copied, but was by {copies[:1]}. Name models; do not pass them.")
    for one in inner:
        name = type(one).__name__
        expect(one.reference.model is model, f"{name} must share the registry's reference, but has its own. Share it.")
    return "one reference model in every environment, spec and wrapper"


def pickling(subject: Subject) -> str:
    """Specs, factories and environments can be pickled the way AsyncVectorEnv does it: by cloudpickle."""
    env = subject.make()
    factory = pickle.loads(pickle.dumps(CloudpickleWrapper(functools.partial(gymnasium.make, env.spec))))
    pickled = pickle.dumps(CloudpickleWrapper(lambda: env))
    rule = f"a pickled environment must stay under {PICKLE_LIMIT:,} bytes"
    expect(len(pickled) < PICKLE_LIMIT, f"{rule}, got {len(pickled):,}. Pickle names only.")
    unpickled = pickle.loads(pickled)()
    want = episodes(subject, env)
    expect_same(episodes(subject, attach(factory())), want, "an environment made by a pickled factory differs")
    expect_same(episodes(subject, unpickled), want, "an unpickled environment differs")
    return "spec, factory and environment"


def fresh_arrays(subject: Subject) -> str:
    """What was returned belongs to the caller: it never changes later, and changing it has no effect."""

    def runs(play: Callable[..., Any]) -> None:
        kept: list[tuple[Any, Any]] = []
        clean = play(lambda returned: kept.append((returned, copy.deepcopy(returned))))
        for returned, copied in kept:
            expect_same(returned, copied, "an array or info changed after it was returned")
        expect_same(play(spoil), clean, "overwriting what was returned changed what followed")

    env = subject.make()
    runs(lambda touch: episodes(subject, env, touch=touch))
    if subject.has_vector:
        vector = subject.make_vec(3)
        runs(lambda touch: run_vector(vector, 3, 12, touch=touch))
    return "later steps do not change what was returned, nor does changing it affect them"


def spoil(value: Any) -> None:
    """Overwrite arrays and empty containers, recursively."""
    if isinstance(value, dict):
        for part in list(value.values()):
            spoil(part)
        value.clear()
    elif isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype == object):
        for part in value:
            spoil(part)
    if isinstance(value, np.ndarray) and value.flags.writeable and value.ndim:
        value[...] = None if value.dtype == object else 1
    elif isinstance(value, list):
        value.clear()
