"""Text environments as Stable-Baselines3's vector environment, against its own DummyVecEnv."""

import gymnasium
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv

import textenv
from agents.sb3 import TextVecEnv
from tests.conftest import tiny_model


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert type(got[key]) is type(value), key
        if isinstance(value, dict):
            assert_same(got[key], value)
        elif isinstance(value, np.ndarray):
            assert got[key].dtype == value.dtype
            np.testing.assert_allclose(got[key], value, atol=1e-5, err_msg=key)
        else:
            assert got[key] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value), key


@pytest.mark.parametrize("obs_mode", ["dict", "tokens"])
def test_it_returns_what_stable_baselines_own_environment_of_single_ones_returns(text_options, obs_mode):
    options = {**text_options, "obs_mode": obs_mode, "gold": "colour", "missing_eos_penalty": 1.0}
    native = TextVecEnv(gymnasium.make_vec("textenv/Text-v0", num_envs=5, **options))
    dummy = DummyVecEnv([lambda: gymnasium.make("textenv/Text-v0", **options)] * 5)
    policy = tiny_model(seed=3).model
    assert native.observation_space == dummy.observation_space
    assert native.action_space == dummy.action_space
    ended = 0
    rng = np.random.default_rng(0)
    for env in (native, dummy):
        env.seed(11)
        env.set_options([{}, {"prompt_id": 2}, {}, {"prompt": "the grass"}, {"prompt_id": 2}])
        env.env_method("attach_policy", policy)
    pair = [env.reset() for env in (native, dummy)]
    assert native.reset_infos == dummy.reset_infos
    assert native.reset_infos[1]["prompt_id"] == 2
    for _ in range(40):
        for one, other in [(p[0], p[1]) for p in [pair]]:
            one, other = (x if isinstance(x, dict) else {"": x} for x in (one, other))
            assert_same(dict(one), dict(other))
        actions = rng.integers(0, 12, size=5) * rng.integers(0, 2, size=5)
        (obs, rewards, dones, infos), (obs2, rewards2, dones2, infos2) = native.step(actions), dummy.step(actions)
        pair = [obs, obs2]
        assert (rewards.dtype, dones.dtype) == (rewards2.dtype, dones2.dtype)
        np.testing.assert_allclose(rewards, rewards2, atol=1e-5)
        np.testing.assert_array_equal(dones, dones2)
        for done, info, info2 in zip(dones, infos, infos2, strict=True):
            if not done:
                assert (info, info2) == ({}, {"TimeLimit.truncated": False})
                continue
            ended += 1
            terminal, terminal2 = info.pop("terminal_observation"), info2.pop("terminal_observation")
            assert_same(info, info2)
            np.testing.assert_equal(terminal, terminal2)
        assert native.reset_infos == dummy.reset_infos
    assert ended > 20


def test_seeds_and_options_are_used_once_and_infos_do_not_alias(vec_env):
    env = vec_env(3)
    env.seed(4)
    env.set_options({"prompt_id": 1})
    env.reset()
    assert [info["prompt_id"] for info in env.unwrapped.reset_infos] == [1, 1, 1]
    drawn = []
    for _ in range(2):
        env.seed(7)
        env.reset()
        drawn.append([info["prompt_id"] for info in env.unwrapped.reset_infos])
    assert drawn[0] == drawn[1]
    *_, infos = env.step(np.array([1, 1, 1]))
    infos[0]["mine"] = 1
    assert infos[1] == {}
    assert env.step(np.array([1, 1, 1]))[3][0] == {}


def test_attributes_and_methods_reach_the_environment_through_wrappers(vec_env):
    env = vec_env(3, render_mode="ansi", min_new_tokens=2)
    env.seed(0)
    env.reset()
    assert env.get_attr("kl_coef") == [0.1] * 3
    assert env.get_attr("num_envs", indices=1) == [3]
    env.set_attr("kl_coef", 0.7)
    assert env.kl_coef == env.unwrapped.env.kl_coef == 0.7
    masks = env.env_method("action_masks")
    np.testing.assert_array_equal(np.stack(masks), env.unwrapped.action_masks())
    assert not masks[0][0]
    assert env.env_method("attach_policy", None, indices=[0, 2]) == [None, None]
    assert env.env_is_wrapped(gymnasium.Wrapper) == [False] * 3
    assert env.render().count("→") == 3
    assert env.has_attr("action_masks")
    assert not env.has_attr("no_such_thing")
    assert env.unwrapped.spec.id == "textenv/Text-v0"
    for wrong in (
        lambda: env.set_attr("kl_coeff", 1.0),
        lambda: env.set_attr("kl_coef", 1.0, indices=[0]),
        lambda: env.env_method("reset"),
    ):
        with pytest.raises(ValueError, match=r"for all slots|do not move the episodes"):
            wrong()


def test_an_environment_that_it_cannot_stand_for_is_refused(text_options):
    make = lambda **more: gymnasium.make_vec("textenv/Text-v0", num_envs=2, **text_options, **more)  # noqa: E731
    with pytest.raises(ValueError, match=r"autoreset_mode must be 'SameStep' for .*, got 'NextStep'"):
        TextVecEnv(make(autoreset_mode="NextStep"))
    with pytest.raises(ValueError, match="wrappers around TextVecEnv"):
        TextVecEnv(gymnasium.wrappers.vector.RecordEpisodeStatistics(make()))


def test_a_step_on_which_nothing_ends_scores_nothing(vec_env):
    calls = []
    textenv.register_reward_model("counting", lambda prompts, completions: calls.append(1) or [0.0] * len(prompts))
    env = vec_env(4, reward_model="counting")
    reference = env.unwrapped.env.reference.model
    hook = reference.base_model.register_forward_hook(lambda *_: calls.append(2))
    env.env_method("attach_policy", reference)
    env.reset()
    for _ in range(5):
        env.step(np.ones(4, dtype=int))
    assert not calls
    env.step(np.ones(4, dtype=int))
    hook.remove()
    assert sorted(set(calls)) == [1, 2]
