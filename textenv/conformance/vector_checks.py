"""The vector form compared with single environments: ``step`` in every autoreset mode, and ``play``."""

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from textenv.conformance.subject import (
    EOS_RATES,
    Skipped,
    Subject,
    action_masks,
    choose,
    close,
    expect,
    expect_equal,
    expect_same,
    plain,
    row,
    run_episode,
)

SLOTS = len(EOS_RATES)
"""Slots of the vector environments."""


def vector(subject: Subject, mode: AutoresetMode) -> str:
    """The vector form returns what Gymnasium's ``SyncVectorEnv`` of single environments returns."""
    need_vector(subject)
    native = subject.make_vec(SLOTS, autoreset_mode=mode.value)
    sync = SyncVectorEnv([subject.make] * SLOTS, autoreset_mode=mode)
    singles: list[Any] = [env.unwrapped for env in sync.envs]
    for name in ("observation_space", "action_space", "single_observation_space", "single_action_space"):
        expect_equal(name, getattr(native, name), getattr(sync, name))
    expect_equal("autoreset_mode in metadata", native.metadata["autoreset_mode"], mode)
    rng = np.random.default_rng(0)
    expect_same(native.reset(seed=11), sync.reset(seed=11), "reset(seed)")
    ended, resetting = 0, np.zeros(SLOTS, dtype=bool)
    for t in range(subject.settings["max_new_tokens"] + 12):
        masks = action_masks(native.unwrapped)
        expect((masks == [env.action_masks() for env in singles])[~resetting].all(), f"action_masks at step {t}")
        actions = choose(rng, masks, singles[0].reference.eos_id, np.array(EOS_RATES[::-1]))
        logprobs = -3.0 * rng.random(SLOTS)
        native.unwrapped.report_logprobs(logprobs)
        for slot in np.flatnonzero(~resetting):
            singles[slot].report_logprobs(logprobs[slot])
        got, want = native.step(actions), sync.step(actions)
        for name, one, other in zip(
            ("observation", "reward", "terminated", "truncated", "info"), got, want, strict=True
        ):
            expect_same(one, other, f"{name} at step {t}")
        over = got[2] | got[3]
        ended += int(over.sum())
        resetting = over if mode is AutoresetMode.NEXT_STEP else np.zeros(SLOTS, dtype=bool)
        if mode is AutoresetMode.DISABLED and over.any():
            again = [env.reset(options={"reset_mask": over.copy()}) for env in (native, sync)]
            expect_same(again[0], again[1], f"reset of the ended slots at step {t}")
    return f"{ended} episodes equal those of SyncVectorEnv"


def play(subject: Subject) -> str:
    """``play`` returns what the last ``step`` of each slot would have returned, and the next episodes are the same."""
    need_vector(subject)
    count, budget = len(EOS_RATES), subject.settings["max_new_tokens"]
    singles = [subject.make() for _ in range(count)]
    rng = np.random.default_rng(0)
    stepped = [run_episode(env, 7 + i, rng, budget, eos_rate=EOS_RATES[i]) for i, env in enumerate(singles)]
    ids, logprobs = np.zeros((count, budget), dtype=np.int64), np.zeros((count, budget), dtype=np.float32)
    lengths = np.array([len(episode.actions) for episode in stepped])
    for i, episode in enumerate(stepped):
        ids[i, : lengths[i]], logprobs[i, : lengths[i]] = episode.actions, episode.logprobs
    next_starts = [env.reset() for env in singles]
    for mode in AutoresetMode:
        played = subject.make_vec(count, autoreset_mode=mode.value)
        played.reset(seed=7)
        observation, got, terminated, truncated, infos = played.unwrapped.play(ids, lengths, logprobs)
        same_step = mode is AutoresetMode.SAME_STEP
        final = infos["final_info"] if same_step else infos
        for i, episode in enumerate(stepped):
            want = episode.steps[-1]
            where = f"slot {i}, {mode.value}"
            last = infos["final_obs"][i] if same_step else row(observation, i)
            expect_same(last, want[0], f"last observation ({where})")
            expect(close(got[i], want[1]), f"reward ({where}) must be {want[1]}, got {got[i]}.")
            expect_equal(f"terminated or truncated ({where})", (bool(terminated[i]), bool(truncated[i])), want[2:4])
            expect_same(plain(row(final, i)), plain(want[4]), f"info ({where})")
            if same_step:
                expect_same(row(observation, i), next_starts[i][0], f"first observation of the next episode ({where})")
    return f"{count} responses in each autoreset mode"


def need_vector(subject: Subject) -> None:
    if not subject.has_vector:
        raise Skipped("the id has no vector_entry_point; gymnasium.make_vec falls back to SyncVectorEnv")
