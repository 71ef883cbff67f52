"""The native vector environment against Gymnasium's SyncVectorEnv of single ones, and play against step."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from tests.conftest import tiny_model
from textenv.conformance.subject import difference
from textenv.vector import TextVectorEnv, make_vec

MODES = [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED]


def assert_same(got, want):
    assert difference(got, want) is None


@pytest.mark.parametrize("mode", MODES)
def test_with_an_attached_policy_the_native_vector_equals_gymnasiums_in_every_autoreset_mode(
    make_vector, text_options, mode
):
    policy = tiny_model(seed=3).model
    options = {**text_options, "missing_eos_penalty": 1.0, "gold": "colour"}
    native = make_vector(5, autoreset_mode=mode, missing_eos_penalty=1.0, gold="colour")
    single = lambda: gymnasium.make("textenv/Text-v0", disable_env_checker=True, **options)  # noqa: E731
    sync = SyncVectorEnv([single] * 5, autoreset_mode=mode)
    native.unwrapped.attach_policy(policy)
    for env in sync.envs:
        env.unwrapped.attach_policy(policy)
    rng = np.random.default_rng(0)
    assert_same(native.reset(seed=11), sync.reset(seed=11))
    ended = 0
    for _ in range(40):
        actions = rng.integers(0, 12, size=5) * rng.integers(0, 2, size=5)
        got, want = native.step(actions), sync.step(actions)
        assert_same(got, want)
        ended += int(got[2].sum())
        if mode is AutoresetMode.DISABLED and got[2].any():
            assert_same(
                native.reset(options={"reset_mask": got[2].copy()}), sync.reset(options={"reset_mask": got[2].copy()})
            )
    assert ended > 20


@pytest.mark.parametrize("mode", MODES)
def test_play_returns_what_the_last_step_of_each_slot_would_have(make_vector, mode):
    rng = np.random.default_rng(1)
    played, stepped = make_vector(6, autoreset_mode=mode), make_vector(6, autoreset_mode=mode)
    played.reset(seed=3)
    stepped.reset(seed=3)
    lengths = np.array([1, 2, 3, 6, 6, 4])
    ids = np.where(np.arange(6) < lengths[:, None], rng.integers(1, 11, size=(6, 6)), 9)
    ids[np.arange(6), lengths - 1] = [0, 0, 0, 5, 0, 0]
    logprobs = np.where(np.arange(6) < lengths[:, None], -rng.random((6, 6)), 7.0).astype(np.float32)

    observation, rewards, terminated, truncated, infos = played.unwrapped.play(ids, lengths, logprobs)
    assert terminated.all()
    assert not truncated.any()
    finals = infos["final_info"] if mode is AutoresetMode.SAME_STEP else infos
    # Step each slot to its end by hand; the other slots get filler tokens, and only first endings are read.
    seen = set()
    for t in range(6):
        actions = np.where(t < lengths, ids[:, t], 1)
        stepped.unwrapped.report_logprobs(np.where(t < lengths, logprobs[:, t], -1.0))
        if mode is not AutoresetMode.SAME_STEP and seen:
            break  # in these modes an ended slot must be reset first, which would disturb the comparison
        step_obs, step_rewards, ended, _, step_infos = stepped.step(actions)
        for slot in np.flatnonzero(ended):
            if slot in seen:
                continue
            seen.add(slot)
            final = step_infos["final_info"] if mode is AutoresetMode.SAME_STEP else step_infos
            assert rewards[slot] == pytest.approx(step_rewards[slot], abs=1e-5)
            for key in ("prompt", "response", "finish_reason", "response_length", "kl_source"):
                assert finals[key][slot] == final[key][slot]
            np.testing.assert_allclose(finals["kl_per_token"][slot], final["kl_per_token"][slot], atol=1e-5)
            if mode is AutoresetMode.SAME_STEP:
                assert_same(infos["final_obs"][slot], step_infos["final_obs"][slot])
            np.testing.assert_array_equal(observation["input_ids"][slot], step_obs["input_ids"][slot])
    assert seen == set(range(6)) if mode is AutoresetMode.SAME_STEP else seen


def test_play_equals_step_for_sampled_responses_and_their_kl(make_vector):
    from agents.core.agent import LanguageModelAgent

    env, twin = make_vector(8).unwrapped, make_vector(8).unwrapped
    agent = LanguageModelAgent(tiny_model(seed=4), env.task, seed=0)
    observation, _ = env.reset(seed=0)
    twin.reset(seed=0)
    sampled = agent.respond(observation)
    _, rewards, *_, infos = env.play(sampled.response_ids, sampled.response_lengths, sampled.logprobs)
    twin.attach_policy(agent.policy.model)
    got = np.full(8, np.nan)
    for t in range(6):
        actions = sampled.response_ids[:, t].numpy().copy()
        _, step_rewards, ended, _, _ = twin.step(actions)
        first = ended & np.isnan(got)
        got[first] = step_rewards[first]
    np.testing.assert_allclose(got, rewards, atol=1e-5)
    np.testing.assert_allclose(rewards, infos["final_info"]["rm_score"] - 0.1 * infos["final_info"]["kl"], atol=1e-6)


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        ([[1, 0, 1, 1, 1, 1]], [6], "rules end it at 2"),
        ([[1, 1, 1, 1, 1, 1]], [3], "rules end it at 6"),
        ([[1, 0]], [1], "rules end it at 6"),
        ([[1, 12, 0]], [3], "token of the vocabulary"),
        ([[1, 0], [1, 0]], [2, 2], "one response per slot"),
    ],
)
def test_play_refuses_responses_that_break_the_rules(make_vector, ids, lengths, message):
    env = make_vector(1).unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.play(np.array(ids), np.array(lengths))


def test_play_needs_fresh_episodes(make_vector):
    env = make_vector(1, autoreset_mode="NextStep").unwrapped
    env.reset(seed=0)
    env.play(np.array([[0]]), np.array([1]))
    with pytest.raises(ValueError, match="fresh episodes"):
        env.play(np.array([[0]]), np.array([1]))


class Counter(torch.nn.Module):
    """Counts the forward passes of a model."""

    def __init__(self, model):
        super().__init__()
        self.calls = 0
        model.register_forward_hook(self._count)
        model.base_model.register_forward_hook(self._count)

    def _count(self, *_):
        self.calls += 1


def test_a_step_on_which_nothing_ends_makes_no_model_call(make_vector):
    import textenv

    calls = []
    textenv.register_reward_model("counting", lambda prompts, completions: calls.append(1) or [0.0] * len(prompts))
    env = make_vector(4, reward_model="counting").unwrapped
    reference = env.reference.model
    counter = Counter(reference)
    env.attach_policy(reference)
    env.reset(seed=0)
    for _ in range(5):
        env.step(np.ones(4, dtype=int))
    assert counter.calls == 0
    assert not calls
    env.step(np.ones(4, dtype=int))
    assert counter.calls > 0
    assert calls == [1]


def test_a_vector_reset_seeds_slot_i_with_seed_plus_i(make_vector, text_options):
    native = make_vector(4)
    _, infos = native.reset(seed=20)
    for slot in range(4):
        single = gymnasium.make("textenv/Text-v0", **text_options)
        assert single.reset(seed=20 + slot)[1]["prompt_id"] == infos["prompt_id"][slot]
    assert native.unwrapped.np_random_seed == (20, 21, 22, 23)


def test_prompt_ids_can_be_given_a_slot_each(make_vector):
    env = make_vector(3)
    _, infos = env.reset(options={"prompt_id": [2, 0, 1]})
    assert infos["prompt_id"].tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="one per slot"):
        env.reset(options={"prompt_id": [2, 0]})


def test_stepping_an_ended_slot_without_autoreset_is_an_error(make_vector):
    env = make_vector(2, autoreset_mode="Disabled")
    env.reset(seed=0)
    env.step(np.array([0, 1]))
    with pytest.raises(ValueError, match=r"ended slots \[0\]"):
        env.step(np.array([1, 1]))


def test_the_next_step_mode_ignores_the_action_of_the_reset(make_vector):
    env = make_vector(1, autoreset_mode="NextStep")
    env.reset(seed=0)
    assert env.step(np.array([0]))[2][0]
    observation, rewards, terminated, _, infos = env.step(np.array([5]))
    assert observation["response_length"] == 0
    assert (rewards[0], terminated[0]) == (0.0, False)
    assert infos["_prompt"][0]


def test_actions_and_played_tokens_are_whole_numbers(make_vector):
    env = make_vector(2).unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions must be whole numbers.*1\.7"):
        env.step([1.7, 2.0])
    with pytest.raises(ValueError, match="response_ids must be whole numbers"):
        env.play(np.array([[1.5, 0], [0, 0]]), np.array([2, 1]))
    with pytest.raises(ValueError, match="response_lengths must be whole numbers"):
        env.play(np.array([[1, 0], [0, 0]]), np.array([2.0, 1.0]))


def test_make_vec_makes_text_environments_alone():
    assert type(make_vec("textenv/Micro-v0", 2)) is TextVectorEnv
    with pytest.raises(ValueError, match=r"must be that of a text environment, got 'CartPole-v1'"):
        make_vec("CartPole-v1", 2)


@pytest.mark.parametrize("actions", [np.array([1.0, 2.0]), np.array([1.7, 2.0]), [True, False], [-1, 0], [0, 99]])
def test_a_vector_step_refuses_what_is_no_token(make_vector, actions):
    env = make_vector(2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"whole numbers \(token ids\)|token of the vocabulary"):
        env.step(actions)
