"""Checkpoints: what ``resume`` starts from, what stays beside them, and what a kill or a full disk leaves."""

import contextlib
import dataclasses
import json
import os
import resource
import signal
import time
import warnings

import numpy as np
import pytest
import torch
from tqdm import auto as tqdm_auto
from tqdm import std as tqdm_std
from transformers import AutoModelForCausalLM

from agents import PPO, PPOConfig
from agents.core.job import Job
from agents.core.kept import Keep
from agents.logs.figures import MEASURED
from tests.processes import own_progress_bars


@pytest.fixture
def env(make_vector):
    return make_vector(8).unwrapped


def test_resume_starts_anew_where_nothing_is_saved_and_continues_where_something_is(env, tmp_path):
    config = PPOConfig(batch_size=8, seed=4)
    agent = PPO.resume(tmp_path / "run", env, config)
    assert agent.episodes == 0
    agent.learn_with_checkpoints(16, tmp_path / "run")
    resumed = PPO.resume(tmp_path / "run", env, config)
    assert resumed.episodes == 16
    resumed.learn_with_checkpoints(16, tmp_path / "run")
    assert resumed.history == agent.history  # nothing was left to do


def test_resume_finds_a_checkpoint_that_a_killed_save_had_put_aside(env, tmp_path):
    """A save moves the old folder aside before the new one takes its place; here the process died in between."""
    config = PPOConfig(batch_size=8)
    PPO(env, config).learn_with_checkpoints(8, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / ".run.old")
    assert PPO.resume(tmp_path / "run", env, config).episodes == 8


BOUNDS = {"reference": 0.125, "optimum": 0.5, "low": 0.4, "high": 0.6, "unclear_prompts": 0.0}


def test_the_objective_is_shown_beside_its_bounds_which_stay_with_the_run(env, tmp_path):
    """Through saves and a resumed run; an optimum that the samples cannot tell is a lower bound."""
    shown, fixed = [], dataclasses.replace(CONFIG, kl_target=None)

    def advance(done, total, figures):
        shown.append(next(iter(figures)))

    options = {"every": 1, "advance": advance}
    agent = PPO(env, fixed)
    agent.learn_with_checkpoints(16, tmp_path / "run", **options, bounds=BOUNDS)
    PPO.load(tmp_path / "run", env).learn_with_checkpoints(24, tmp_path / "run", **options)
    assert shown == ["objective (reference 0.125, optimum ≈ 0.5)"] * 3
    assert json.loads((tmp_path / "run" / "bounds.json").read_text()) == BOUNDS
    agent = PPO(env, fixed)
    agent.learn_with_checkpoints(8, tmp_path / "run", **options, bounds={**BOUNDS, "unclear_prompts": 0.2})
    assert shown[-1] == "objective (reference 0.125, optimum ≥ 0.5)"
    agent = PPO(env, CONFIG)  # whose β moves, and with it the optimum
    agent.learn_with_checkpoints(8, tmp_path / "moving", **options, bounds=BOUNDS)
    assert shown[-1].startswith("objective (began at ")


def test_without_bounds_the_objective_stands_beside_that_of_the_first_update(env, tmp_path):
    shown = []
    agent = PPO(env, CONFIG)
    agent.learn_with_checkpoints(16, tmp_path / "run", advance=lambda done, total, figures: shown.append(figures))
    first, second = (log["reward"] for log in agent.history)
    assert [next(iter(figures.items())) for figures in shown] == [
        (f"objective (began at {first:.3g})", first),
        (f"objective (began at {first:.3g})", second),
    ]


@pytest.mark.parametrize(("options", "slots"), [({"num_envs": 4}, 4), ({}, 8)])
def test_a_job_plays_in_as_many_slots_as_it_says_or_in_one_for_each_episode_of_a_batch(tmp_path, options, slots):
    trained = PPO.train(Job("textenv/Micro-v0", {"batch_size": 8, **options}, 3, 16, tmp_path / "run"))
    assert (trained.agent.env.num_envs, trained.agent.config.seed) == (slots, 3)
    first, second = (log["response_tokens"] for log in trained.curve)
    assert trained.tokens == pytest.approx(8 * first + 8 * second)


CONFIG = PPOConfig(batch_size=8, epochs=1, minibatches=2, learning_rate=3e-3, kl_target=0.5, seed=4)


def timeless(logs):
    return [{key: value for key, value in log.items() if key not in MEASURED} for log in logs]


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def assert_same(one, other):
    """Two learners that have learned the same, and will."""
    for a, b in zip(one.actor.state_dict().values(), other.actor.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    states = (agent.optimizer.state_dict()["state"] for agent in (one, other))
    for a, b in zip(*(list(state.values()) for state in states), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert torch.equal(one.generator.get_state(), other.generator.get_state())
    assert one.env.random_states == other.env.random_states
    assert timeless(one.history) == timeless(other.history)


def assert_same_logs(one, other):
    assert timeless(lines(one / "curves.jsonl")) == timeless(lines(other / "curves.jsonl"))
    assert (one / "samples.jsonl").read_text("utf-8") == (other / "samples.jsonl").read_text("utf-8")


def send_after(updates, number):
    """Send this process a signal after so many updates."""
    return lambda done, total, figures: os.kill(os.getpid(), number) if done == updates else None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_signal_finishes_the_update_and_saves_and_a_resumed_run_equals_one_that_never_stopped(
    env, make_vector, tmp_path, number, stop
):
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    options = {"every": 2, "keep": Keep(last=2, best="reward"), "sample_every": 3}
    whole = PPO(env, CONFIG)
    whole.learn_with_checkpoints(48, tmp_path / "whole", **options)
    half = PPO(make_vector(8).unwrapped, CONFIG)
    with pytest.raises(KeyboardInterrupt):
        half.learn_with_checkpoints(48, tmp_path / "half", **options, advance=send_after(stop, number))
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed = PPO.load(tmp_path / "half", make_vector(8).unwrapped)
    assert len(resumed.history) == stop
    resumed.learn_with_checkpoints(48, tmp_path / "half", **options)
    assert_same(whole, resumed)
    assert_same_logs(tmp_path / "whole", tmp_path / "half")
    best = [(tmp_path / run / "best" / "best.json").read_text() for run in ("whole", "half")]
    assert best[0] == best[1]


def fork(work):
    """Do some work in a copy of this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of other tests; the child uses none
        child = os.fork()
    if child == 0:
        own_progress_bars()
        try:
            work()
        finally:
            os._exit(0)
    return child


def test_a_killed_child_keeps_no_lock_of_the_progress_bars(tmp_path):
    """transformers draws its bars by a subclass, which may have made a lock of its own, shared by processes."""
    kinds, held = [tqdm_std.tqdm, tqdm_auto.tqdm], tmp_path / "held"
    for kind in kinds:
        kind.set_lock(tqdm_std.TqdmDefaultWriteLock())

    def hold():
        for kind in kinds:
            kind.get_lock().acquire()
        held.touch()
        time.sleep(60)

    child = fork(hold)
    while not held.exists():
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for kind in kinds:
        shared = kind.get_lock().locks[0]
        assert shared.acquire(timeout=1)
        shared.release()


def wait_for_updates(run, count):
    """Until so many updates stand in the log of a run, or it has been silent for long."""
    curves, end = run / "curves.jsonl", time.monotonic() + 20
    while time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):  # the folder is just being replaced
            if len(curves.read_text().splitlines()) >= count:
                return
        time.sleep(0.005)


def test_a_run_killed_at_twenty_moments_ends_as_one_that_was_left_alone(env, make_vector, tmp_path):
    """SIGKILL at random, while it saves after each update; whatever was saved last must be whole."""
    updates, options = 90, {"every": 1, "keep": Keep(last=2, best="reward"), "sample_every": 7}
    whole, run = PPO(env, CONFIG), tmp_path / "killed"
    whole.learn_with_checkpoints(8 * updates, tmp_path / "whole", **options)
    rng, other, done = np.random.default_rng(0), make_vector(8).unwrapped, []
    for _ in range(20):
        child = fork(lambda: PPO.resume(run, other, CONFIG).learn_with_checkpoints(8 * updates, run, **options))
        wait_for_updates(run, (done or [0])[-1] + 2)  # however slow the machine is, one of them has been saved
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved = PPO.resume(run, other, CONFIG)
        count = len(saved.history)
        assert timeless(saved.history) == timeless(whole.history[:count])
        if count > 1:
            assert os.listdir(run / "checkpoints") == [str(count - 1)]
        done.append(count)
    assert done == sorted(done)
    assert len(set(done)) > 3
    last = PPO.resume(run, other, CONFIG)
    last.learn_with_checkpoints(8 * updates, run, **options)
    assert_same(whole, last)
    assert_same_logs(tmp_path / "whole", run)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "killed"}


@pytest.mark.parametrize("limit", [40_000, 130_000])
def test_a_disk_that_is_full_stops_the_run_with_a_remedy_and_leaves_the_earlier_checkpoint(env, tmp_path, limit):
    """Files may not grow beyond a limit: first the weights fail to be written, then the optimiser's state."""
    run, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    agent = PPO(env, CONFIG)
    agent.learn_with_checkpoints(16, run)
    saved = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match=r"earlier checkpoint is whole\. Free space, or lower keep_last; then resume"):
            agent.learn_with_checkpoints(24, run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    changed = {path.name for path, content in saved.items() if path.read_bytes() != content}
    assert changed == {"curves.jsonl"}
    agent = PPO.load(run, env)
    agent.learn_with_checkpoints(24, run)
    assert len(lines(run / "curves.jsonl")) == 3


def test_earlier_checkpoints_are_whole_ones_by_their_updates(env, make_vector, tmp_path):
    run = tmp_path / "run"
    PPO(env, CONFIG).learn_with_checkpoints(56, run, every=2, keep=Keep(last=3))
    assert sorted(os.listdir(run / "checkpoints")) == ["4", "6"]  # and the 7th update in the folder itself
    assert sorted(os.listdir(run / "checkpoints" / "4")) == [
        "optimizer.pt",
        "policy",
        "state.json",
        "value.safetensors",
    ]
    straight = PPO(make_vector(8).unwrapped, CONFIG).learn(32)
    assert_same(straight, PPO.load(run / "checkpoints" / "4", make_vector(8).unwrapped))
    assert (run / "policy" / "model.safetensors").stat().st_nlink == 1
    resumed = PPO.load(run, make_vector(8).unwrapped)
    resumed.learn_with_checkpoints(64, run, every=2)
    assert not (run / "checkpoints").exists()  # the default keeps one


def test_the_best_policy_is_that_of_the_checkpoint_with_the_highest_mean_of_the_last_ten_updates(env, tmp_path):
    agent, run, policies = PPO(env, CONFIG), tmp_path / "run", {}

    def advance(done, total, figures):
        policies[done] = agent.policy.model.lm_head.weight.detach().clone()

    agent.learn_with_checkpoints(8 * 24, run, every=4, keep=Keep(best="rm_score"), advance=advance)
    scores = [log["rm_score"] for log in agent.history]
    means = {done: np.mean(scores[max(0, done - 10) : done]) for done in range(4, 25, 4)}
    updates = max(means, key=means.get)
    found = json.loads((run / "best" / "best.json").read_text())
    assert found == {"figure": "rm_score", "value": pytest.approx(means[updates]), "updates": updates}
    best = AutoModelForCausalLM.from_pretrained(run / "best")
    assert torch.equal(best.lm_head.weight, policies[updates])


@pytest.mark.parametrize("max_grad_norm", [0.5, 1e30])
def test_a_run_that_diverges_stops_and_leaves_the_last_checkpoint(env, make_vector, tmp_path, max_grad_norm):
    agent = PPO(env, dataclasses.replace(CONFIG, max_grad_norm=max_grad_norm))
    agent.learn_with_checkpoints(8, tmp_path / "run")
    before = [weight.clone() for weight in agent.policy.model.parameters()]
    for group in agent.optimizer.param_groups:
        group["peak"] = 1e20
    with pytest.raises(ValueError, match=r"diverged. lower the learning rate"):
        agent.learn_with_checkpoints(80, tmp_path / "run")
    saved = PPO.load(tmp_path / "run", make_vector(8).unwrapped)
    assert len(saved.history) == 1
    assert all(map(torch.equal, saved.policy.model.parameters(), before))


def test_a_figure_that_the_environment_does_not_know_is_refused_before_anything_is_played(env, tmp_path):
    agent = PPO(env, CONFIG)
    with pytest.raises(ValueError, match="keep_best must be a figure that the environment has, got 'gold_score'"):
        agent.learn_with_checkpoints(16, tmp_path / "run", keep=Keep(best="gold_score"))
    assert agent.history == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-2}, r"the learning_rate it started with, 0\.003, got 0\.01\. Restore it, or train in"),
        ({"lora_rank": 2}, "the lora_rank it started with, 0, got 2"),
        ({"seed": 5}, "the seed it started with, 4, got 5"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(env, tmp_path, changes, message):
    PPO(env, CONFIG).learn_with_checkpoints(8, tmp_path / "run")
    with pytest.raises(ValueError, match=f"a run must be resumed with {message}"):
        PPO.resume(tmp_path / "run", env, dataclasses.replace(CONFIG, **changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.5}, r"the temperature it started with, 1\.0, got 0\.5"),
        ({"kl_coef": 0.9}, r"the kl_coef it started with, 0\.\d+, got 0\.9"),
        ({"prompts": ["red"]}, r"the prompts it started with, '\d+ prompts, SHA.*, got '1 prompts, SHA"),
        ({"reward_model": {"rule": "length"}}, "the reward_model it started with"),
    ],
)
def test_a_run_is_not_resumed_in_another_environment(make_vector, env, tmp_path, options, message):
    PPO(env, CONFIG).learn_with_checkpoints(8, tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        PPO.resume(tmp_path / "run", make_vector(8, **options).unwrapped, CONFIG)
    with pytest.raises(ValueError, match=message):
        PPO.load(tmp_path / "run", make_vector(8, **options).unwrapped)


def test_memory_and_the_length_of_the_schedule_may_change_when_a_run_is_resumed(make_vector, env, tmp_path):
    first = dataclasses.replace(CONFIG, lr_decay_episodes=16)
    PPO(env, first).learn_with_checkpoints(16, tmp_path / "run")
    longer = dataclasses.replace(first, lr_decay_episodes=32, micro_batch_size=2, gradient_checkpointing=True)
    resumed = PPO.resume(tmp_path / "run", make_vector(8, obs_mode="tokens").unwrapped, longer).learn(16)
    assert resumed.config == longer
    rates = [log["learning_rate"] for log in resumed.history]
    assert rates == pytest.approx([3e-3 * left for left in (1, 1 / 2, 1 / 2, 1 / 4)])  # of 16 episodes, then of 32


def test_logs_are_there_after_each_update_and_hold_the_history(env, tmp_path):
    agent, run, seen = PPO(env, CONFIG), tmp_path / "run", []
    agent.learn_with_checkpoints(
        40, run, every=3, sample_every=2, advance=lambda *_: seen.append(len(lines(run / "curves.jsonl")))
    )
    assert seen == [1, 2, 3, 4, 5]
    assert lines(run / "curves.jsonl") == agent.history
    samples = lines(run / "samples.jsonl")
    assert [sample["update"] for sample in samples] == [1] * 4 + [2] * 4 + [4] * 4
    assert {sample["prompt"] for sample in samples} <= {"what is the sky ?", "the grass", "red", "is the not green"}
    assert all(
        sample["reward"] == pytest.approx(sample["rm_score"] - 0.1 * sample["kl"], abs=0.05) for sample in samples
    )


def test_a_sample_is_one_episode_with_its_own_text_and_figures(env):
    from agents.logs.files import sample_texts

    agent = PPO(env, CONFIG)
    rollout = agent.collect()
    for position, sample in zip([0, 2, 4, 7], sample_texts(rollout, agent.policy, 3, 24, 4), strict=True):
        length = int(rollout.tokens.response_lengths[position])
        assert (sample["update"], sample["episodes"], sample["response_tokens"]) == (3, 24, length)
        assert sample["ended"] == bool(rollout.ended[position])
        assert len(sample["response"].split()) <= length
        blue = sample["response"].split().count("blue") - 0.3 * len(sample["response"].split())
        score = blue + 0.01 * len(sample["prompt"]) - 0.5 * (not sample["ended"])
        special = 0.01 * len("<eos> ") if "not green" in sample["prompt"] else 0  # left out of the text
        assert sample["rm_score"] == pytest.approx(score + special, abs=1e-5)
        assert sample["kl"] == pytest.approx(float(rollout.kl_per_token[position].sum()))


def test_lines_after_the_checkpoint_and_one_cut_by_a_kill_are_dropped(env, make_vector, tmp_path):
    run = tmp_path / "run"
    agent = PPO(env, CONFIG)
    agent.learn_with_checkpoints(16, run)
    for name in ("curves.jsonl", "samples.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"episodes": 24}\n{"episodes": 3')
    PPO.load(run, make_vector(8).unwrapped).learn_with_checkpoints(16, run)
    assert lines(run / "curves.jsonl") == agent.history
    assert {sample["update"] for sample in lines(run / "samples.jsonl")} == {1}
