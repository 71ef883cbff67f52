"""Checkpoints: what ``resume`` starts from, and what a job of an experiment plays."""

import pytest

from agents import PPO, PPOConfig
from agents.core.job import Job


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


@pytest.mark.parametrize(("options", "slots"), [({"num_envs": 4}, 4), ({}, 8)])
def test_a_job_plays_in_as_many_slots_as_it_says_or_in_one_for_each_episode_of_a_batch(tmp_path, options, slots):
    trained = PPO.train(Job("textenv/Micro-v0", {"batch_size": 8, **options}, 3, 16, tmp_path / "run"))
    assert (trained.agent.env.num_envs, trained.agent.config.seed) == (slots, 3)
    first, second = (log["response_tokens"] for log in trained.curve)
    assert trained.tokens == pytest.approx(8 * first + 8 * second)
