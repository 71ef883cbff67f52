"""Action masks in MaskablePPO: against the stock buffers, and against plain transformers."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

from agents.sb3.masks import MaskableCausalLMPolicy, SharedMasks, SharedMasksDict
from tests.agents.conftest import RULED, Recorder, plain_logprobs
from tests.conftest import tiny_model


def maskable(env, buffer=SharedMasksDict, policy=MaskableCausalLMPolicy, **options):
    options = {"policy_kwargs": {"model": "gpt2-b"}, "n_epochs": 2, **options}
    return MaskablePPO(
        policy, env, n_steps=13, batch_size=13, seed=0, device="cpu", rollout_buffer_class=buffer, **options
    )


@pytest.mark.parametrize(("obs_mode", "buffer"), [("dict", SharedMasksDict), ("tokens", SharedMasks)])
def test_maskable_ppo_pays_the_kl_of_its_masked_policy(vec_env, obs_mode, buffer):
    env = vec_env(obs_mode=obs_mode, **RULED)
    assert is_masking_supported(env)
    agent, recorder = maskable(env, buffer, learning_rate=0.0), Recorder()
    agent.learn(1, callback=recorder)
    assert recorder.finished
    for prompt, episode, info in recorder.finished:
        tokens, stored, rewards = (list(column) for column in zip(*episode, strict=True))
        own, other = (plain_logprobs(tiny_model(seed=seed).model, prompt, tokens, 0.7, 2, (0, 9)) for seed in (5, 0))
        np.testing.assert_allclose(stored, own, atol=1e-5)
        assert info["kl_source"] == "reported"
        assert rewards[-1] == pytest.approx(info["rm_score"] - 0.1 * (own - other).sum(), abs=2e-5)
    mean, _ = evaluate_policy(agent, env, n_eval_episodes=5)
    assert np.isfinite(mean)


def test_masks_of_ones_own_renormalise_what_is_drawn_stored_and_trained(vec_env, monkeypatch):
    env = vec_env()
    allowed = np.isin(np.arange(12), [0, 3, 8])
    monkeypatch.setattr(env.unwrapped.env, "action_masks", lambda: np.tile(allowed, (5, 1)))
    agent, recorder = maskable(env, learning_rate=0.0), Recorder()
    agent.learn(1, callback=recorder)
    assert recorder.finished
    for prompt, episode, info in recorder.finished:
        tokens, stored, _ = (list(column) for column in zip(*episode, strict=True))
        forbidden = tuple(np.flatnonzero(~allowed))
        own = plain_logprobs(tiny_model(seed=5).model, prompt, tokens, 1.0, len(tokens), forbidden)
        np.testing.assert_allclose(stored, own, atol=1e-5)
        np.testing.assert_allclose(
            info["kl"], (own - plain_logprobs(tiny_model(seed=0).model, prompt, tokens)).sum(), atol=1e-5
        )
    for batch in agent.rollout_buffer.get(7):
        actions = batch.actions.long().flatten()
        assert set(actions.tolist()) <= {0, 3, 8}
        _, logprobs, entropy = agent.policy.evaluate_actions(batch.observations, actions, batch.action_masks)
        torch.testing.assert_close(logprobs, batch.old_log_prob, atol=1e-5, rtol=0)
        assert (entropy < np.log(3) + 1e-6).all()


@pytest.mark.parametrize("kind", ["box", "dict"])
def test_shared_masks_yield_the_samples_of_the_stock_buffers(kind):
    box = spaces.Box(0, 9, (3,), np.int64)
    space = box if kind == "box" else spaces.Dict(ids=box)
    mine, stock = (
        (SharedMasks, MaskableRolloutBuffer) if kind == "box" else (SharedMasksDict, MaskableDictRolloutBuffer)
    )
    buffers = [cls(6, space, spaces.Discrete(21), device="cpu", n_envs=4) for cls in (mine, stock)]
    for round_ in range(2):  # the second after a reset
        rng = np.random.default_rng(round_)
        masks = rng.random((3, 21)) < 0.5
        for step in range(6):
            ids, actions = rng.integers(0, 9, (4, 3)), rng.integers(0, 21, 4)
            given = None if step == 2 else masks[rng.integers(0, 3, 4)]
            for buffer in buffers:
                observation = ids if kind == "box" else {"ids": ids}
                value = torch.arange(4.0)
                buffer.add(observation, actions, np.ones(4), np.zeros(4), value, -value, action_masks=given)
        drawn = []
        for buffer in buffers:
            np.random.seed(0)  # noqa: NPY002  the stock buffers shuffle by the global generator
            drawn.append(list(buffer.get(5)))
            assert buffer.full
        for got, want in zip(*drawn, strict=True):
            np.testing.assert_array_equal(got.action_masks, want.action_masks)
            np.testing.assert_array_equal(got.actions.flatten(), want.actions.flatten())
            np.testing.assert_array_equal(got.old_log_prob, want.old_log_prob)
        if round_ == 1:
            assert len(buffers[0].masks) == 4  # three, and "all allowed"
        for buffer in buffers:
            buffer.reset()


def test_shared_masks_take_a_few_bytes_a_step_instead_of_four_a_token(vec_env):
    env = vec_env(**RULED)
    agent, stock = maskable(env), maskable(env, None)
    for one in (agent, stock):
        one.learn(1)
    bits = sum(len(mask) for mask in agent.rollout_buffer.masks)
    assert agent.rollout_buffer.action_masks.nbytes == 13 * 5 * 4
    assert bits == 2 * 2  # "all" and "none of the endings", of 12 tokens in 2 bytes each
    assert stock.rollout_buffer.action_masks.nbytes == 13 * 5 * 12 * 4


def test_stock_maskable_policies_take_shared_masks_too(vec_env):
    from agents.sb3 import TokenEmbedding

    env = vec_env(**RULED)
    kwargs = {"features_extractor_class": TokenEmbedding}
    agent = maskable(env, policy="MultiInputPolicy", policy_kwargs=kwargs)
    agent.learn(130)  # the environment refuses a forbidden token
    assert get_action_masks(env).shape == (5, 12)


def test_a_mask_that_forbids_everything_is_an_error(vec_env, monkeypatch):
    env = vec_env()
    masks = np.ones((5, 12), dtype=bool)
    masks[3] = False
    monkeypatch.setattr(env.unwrapped.env, "action_masks", lambda: masks)
    with pytest.raises(ValueError, match=r"got none of 12 in row 3\. Fix"):
        maskable(env).learn(1)
    ruled = vec_env(**RULED)
    only_endings = np.tile(np.isin(np.arange(12), [0, 9]), (5, 1))
    monkeypatch.setattr(ruled.unwrapped.env, "action_masks", lambda: only_endings)
    with pytest.raises(ValueError, match=r"got none of \d+ in row 0\."):
        maskable(ruled).learn(1)


def test_a_saved_maskable_agent_acts_the_same_when_loaded(vec_env, tmp_path):
    env = vec_env(**RULED)
    agent = maskable(env, learning_rate=1e-2).learn(65)
    agent.save(tmp_path / "agent.zip")
    loaded = MaskablePPO.load(tmp_path / "agent.zip", env=env, device="cpu")
    env.seed(0)
    observation = env.reset()
    for _ in range(6):
        masks = get_action_masks(env)
        actions, _ = agent.predict(observation, deterministic=True, action_masks=masks)
        again, _ = loaded.predict(observation, deterministic=True, action_masks=masks)
        np.testing.assert_array_equal(actions, again)
        observation, *_ = env.step(actions)
    loaded.learn(65)
