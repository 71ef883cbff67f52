"""Wrappers and vectorisers of others around our ids: what they report is what the environment paid."""

import gymnasium
import numpy as np
import pytest
from gymnasium.wrappers import RecordEpisodeStatistics, TransformReward
from gymnasium.wrappers import vector as vector_wrappers
from packaging.version import Version
from stable_baselines3.common.env_util import make_vec_env

from tests.conftest import tiny_model
from textenv.env import TextEnv

counts_every_episode = pytest.mark.skipif(
    Version(gymnasium.__version__) < Version("1.4"),
    reason="before Gymnasium 1.4 they take the first step of an episode for a reset, though the mode is SameStep",
)


def play(env, steps=30, seed=5):
    """Random tokens, EOS often: what each step returned."""
    rng = np.random.default_rng(seed)
    env.reset(seed=seed)
    for _ in range(steps):
        yield env.step(rng.integers(0, 12, env.num_envs) * rng.integers(0, 2, env.num_envs))


@pytest.fixture
def wrapped(make_vector):
    """The environment inside a wrapper, and the same one bare; both with a policy whose KL is not 0."""

    def make(wrap, **options):
        inside, bare = make_vector(4, **options), make_vector(4, **options)
        for env in (inside, bare):
            env.unwrapped.attach_policy(tiny_model(seed=3).model)
        return wrap(inside), bare

    return make


@counts_every_episode
def test_recorded_returns_and_lengths_are_the_rewards_and_response_lengths(wrapped):
    env, bare = wrapped(vector_wrappers.RecordEpisodeStatistics)
    episodes = 0
    for (_, rewards, ended, _, infos), (_, paid, _, _, known) in zip(play(env), play(bare), strict=True):
        np.testing.assert_allclose(rewards, paid)
        for slot in np.flatnonzero(ended):
            episodes += 1
            final = infos["final_info"]
            assert infos["episode"]["r"][slot] == pytest.approx(paid[slot], abs=1e-5)
            assert infos["episode"]["l"][slot] == known["final_info"]["response_length"][slot]
            terms = [values[slot] for name, values in final["reward_terms"].items() if name[0] != "_"]
            assert sum(terms) == pytest.approx(paid[slot], abs=1e-6)
            assert final["kl"][slot] != 0
    assert episodes > 20


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (lambda env: vector_wrappers.ClipReward(env, -0.25, 0.25), lambda paid: np.clip(paid, -0.25, 0.25)),
        (lambda env: vector_wrappers.TransformReward(env, lambda r: 3.0 * r - 1.0), lambda paid: 3.0 * paid - 1.0),
    ],
)
def test_reward_wrappers_transform_what_is_paid_and_leave_the_info_alone(wrapped, wrap, expected):
    env, bare = wrapped(wrap)
    for (_, rewards, _, _, infos), (_, paid, _, _, known) in zip(play(env), play(bare), strict=True):
        np.testing.assert_allclose(rewards, expected(paid), atol=1e-6)
        if "final_info" in known:
            np.testing.assert_array_equal(infos["final_info"]["rm_score"], known["final_info"]["rm_score"])


@counts_every_episode
def test_normalised_rewards_are_the_paid_ones_over_the_spread_of_discounted_returns(wrapped):
    env, bare = wrapped(lambda env: vector_wrappers.NormalizeReward(env, gamma=0.9))
    running, seen = np.zeros(4), []
    for (_, rewards, ended, _, _), (_, paid, *_) in zip(play(env, steps=60), play(bare, steps=60), strict=True):
        running = 0.9 * running + paid
        seen.append(running.copy())
        running = np.where(ended, 0.0, running)
        assert (np.sign(rewards) == np.sign(paid)).all()
        assert ((rewards == 0) == (paid == 0)).all()
        if paid.any():
            # The running variance starts from 1e-4 pseudo-counts around (0, 1): nothing beside real returns.
            last = (paid[paid != 0] / rewards[paid != 0], np.std(seen))
    np.testing.assert_allclose(*last, rtol=1e-3)


def test_infos_as_a_list_hold_each_slots_own_entries(wrapped):
    env, bare = wrapped(vector_wrappers.DictInfoToList)
    ends = 0
    for (_, _, ended, _, infos), (_, paid, _, _, known) in zip(play(env), play(bare), strict=True):
        assert len(infos) == 4
        for slot, info in enumerate(infos):
            assert ("final_info" in info) == bool(ended[slot])
            if ended[slot]:
                ends += 1
                final = info["final_info"]
                assert final["response"] == known["final_info"]["response"][slot]
                assert sum(final["reward_terms"].values()) == pytest.approx(paid[slot], abs=1e-6)
    assert ends > 20


def test_single_environments_keep_their_reward_through_wrappers(text_options):
    policy = tiny_model(seed=3).model
    bare = gymnasium.make("textenv/Text-v0", **text_options)
    env = TransformReward(RecordEpisodeStatistics(gymnasium.make("textenv/Text-v0", **text_options)), lambda r: 2 * r)
    for one in (bare, env):
        one.unwrapped.attach_policy(policy)
        one.reset(seed=1)
    for actions in ([3, 6, 0], [4, 4, 4, 4, 4, 4], [0]):
        for action in actions:
            _, paid, ended, _, _ = bare.step(action)
            _, doubled, _, _, info = env.step(action)
        assert ended
        assert doubled == pytest.approx(2 * paid)
        assert info["episode"]["r"] == pytest.approx(paid, abs=1e-5)
        assert info["episode"]["l"] == len(actions) == info["response_length"]
        bare.reset()
        env.reset()


def test_a_time_limit_of_the_budget_changes_nothing(text_options):
    """The registry sets none; one put on by hand at the budget ends what has ended anyway."""
    assert gymnasium.spec("textenv/Text-v0").max_episode_steps is None
    env = gymnasium.make("textenv/Text-v0", max_episode_steps=6, **text_options)
    env.reset(seed=0)
    for _ in range(5):
        assert env.step(4)[1:4] == (0.0, False, False)
    _, reward, terminated, _, info = env.step(4)
    assert terminated
    assert reward == pytest.approx(info["rm_score"])


def test_stable_baselines_own_vectoriser_takes_our_ids(text_options):
    """It tries ``render_mode="rgb_array"`` first, and without after a TypeError."""
    with pytest.warns(UserWarning, match="render_mode='rgb_array'"):
        env = make_vec_env("textenv/Text-v0", 2, env_kwargs=text_options, seed=0)
    assert env.reset()["input_ids"].shape == (2, 13)
    *_, infos = env.step(np.array([0, 4]))
    assert infos[0]["episode"]["r"] == pytest.approx(infos[0]["rm_score"])
    for error in (ValueError, TypeError):
        with pytest.raises(error, match="unexpected keyword argument 'frameskip'"):
            TextEnv(frameskip=4, **text_options)


@pytest.mark.slow
def test_environments_in_processes_of_their_own_return_what_those_in_this_one_do():
    options = {"num_envs": 2, "vector_kwargs": {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}}
    apart = {**options, "vector_kwargs": {**options["vector_kwargs"], "context": "spawn"}}
    envs = [
        gymnasium.make_vec("textenv/Micro-v0", vectorization_mode="async", **apart),
        gymnasium.make_vec("textenv/Micro-v0", vectorization_mode="sync", **options),
    ]
    try:
        first, second = (env.reset(seed=3)[0] for env in envs)
        np.testing.assert_array_equal(first["input_ids"], second["input_ids"])
        rng = np.random.default_rng(0)
        ended = 0
        for _ in range(12):
            actions = rng.integers(0, 8, 2)
            for env in envs:
                env.call("report_logprobs", -1.5)
            one, other = (env.step(actions) for env in envs)
            np.testing.assert_array_equal(one[0]["input_ids"], other[0]["input_ids"])
            np.testing.assert_allclose(one[1], other[1], atol=1e-6)
            np.testing.assert_array_equal(one[2], other[2])
            ended += int(one[2].sum())
            if one[2].any():
                np.testing.assert_allclose(one[4]["final_info"]["kl"], other[4]["final_info"]["kl"], atol=1e-5)
                assert (one[4]["final_info"]["kl"][one[2]] != 0).all()
        assert ended > 3
    finally:
        for env in envs:
            env.close()
