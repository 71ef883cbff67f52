"""Stable-Baselines3 on text environments, against plain transformers."""

import base64
import io
import json
import zipfile

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from transformers import AutoConfig

import textenv
from agents.sb3 import CausalLMPolicy, TokenEmbedding, TokenSpace, make_vec_env
from agents.sb3.policy import take_decision
from tests.agents.conftest import RULED, Recorder, first_observation, plain_logprobs, small
from tests.conftest import FAMILIES, tiny_model, word_tokenizer
from textenv.lm import TokenRule
from textenv.lm.load import wrap_language_model
from textenv.scoring import Scorer

# -- log-probabilities and rewards -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "family", "obs_mode"),
    [(PPO, "gpt2", "dict"), (PPO, "llama", "dict"), (PPO, "qwen2", "dict"), (A2C, "gpt2", "tokens")],
)
def test_stored_reported_and_teacher_forced_logprobs_agree_and_the_reward_is_score_minus_beta_kl(
    vec_env, algorithm, obs_mode, family
):
    env = vec_env(reference=f"{family}-a", obs_mode=obs_mode, **RULED)
    agent = small(algorithm, env, n_steps=13, learning_rate=0.0, policy_kwargs={"model": f"{family}-b"})
    recorder = Recorder()
    agent.learn(1, callback=recorder)
    reference, policy = tiny_model(family, seed=0).model, tiny_model(family, seed=5).model
    assert len(recorder.finished) >= 10
    lengths = set()
    for prompt, episode, info in recorder.finished:
        tokens, stored, rewards = (list(column) for column in zip(*episode, strict=True))
        lengths.add(len(tokens))
        rule = (0.7, 2, (0, 9))
        own, other = (plain_logprobs(model, prompt, tokens, *rule) for model in (policy, reference))
        np.testing.assert_allclose(stored, own, atol=1e-5)
        np.testing.assert_allclose(info["kl_per_token"][: len(tokens)], own - other, atol=1e-5)
        assert info["kl_source"] == "reported"
        assert info["reward_terms"].keys() == {"reward_model", "kl"}
        assert rewards[:-1] == [0.0] * (len(tokens) - 1)
        assert rewards[-1] == pytest.approx(info["rm_score"] - 0.1 * (own - other).sum(), abs=2e-5)
        assert info["episode"]["r"] == pytest.approx(rewards[-1])
    assert len(lengths) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_with_learning_rate_zero_the_first_ratio_is_one(vec_env, family):
    agent = small(PPO, vec_env(reference=f"{family}-a", **RULED), learning_rate=0.0)
    torch.nn.init.normal_(agent.policy.value_head.linear.weight)  # it starts at 0, which would show nothing
    agent.learn(1)
    agent.policy.set_training_mode(True)
    for batch in agent.rollout_buffer.get(7):
        values, logprobs, entropy = agent.policy.evaluate_actions(batch.observations, batch.actions.long().flatten())
        torch.testing.assert_close(logprobs, batch.old_log_prob, atol=1e-5, rtol=0)
        torch.testing.assert_close(values.flatten(), batch.old_values, atol=1e-5, rtol=0)
        table = agent.policy.get_distribution(batch.observations).distribution.probs
        expected = -torch.special.xlogy(table, table).sum(1)
        torch.testing.assert_close(entropy, expected, atol=1e-5, rtol=0)


def test_the_drawn_distribution_is_the_scored_one(vec_env):
    env = vec_env(1, **RULED)
    agent = small(PPO, env, batch_size=13)
    env.set_options({"prompt_id": 1})
    with torch.no_grad():
        observation = {key: torch.from_numpy(value.repeat(4096, 0)) for key, value in env.reset().items()}
        actions, _, logprobs = agent.policy(observation)
    expected = [
        np.exp(plain_logprobs(tiny_model(seed=5).model, "the grass", [a], 0.7, 2, (0, 9))[0]) for a in range(12)
    ]
    assert expected[0] == expected[9] == 0
    counts = torch.bincount(actions, minlength=12).numpy()
    assert counts[0] == counts[9] == 0
    likely = np.array(expected) > 0
    chi2 = (((counts - 4096 * np.array(expected)) ** 2)[likely] / (4096 * np.array(expected)[likely])).sum()
    assert chi2 < 27.9  # 99.9 % point of χ² with 9 degrees of freedom
    np.testing.assert_allclose(logprobs.exp().numpy(), np.array(expected)[actions.numpy()], atol=1e-5)


def test_the_kl_survives_set_env_load_and_evaluation(vec_env, tmp_path):
    agent = small(PPO, vec_env()).learn(65)
    agent.set_env(vec_env())
    first, second, third = Recorder(), Recorder(), Recorder()
    agent.learn(65, callback=first)
    agent.save(tmp_path / "agent.zip")
    loaded = PPO.load(tmp_path / "agent.zip", env=vec_env(7), device="cpu")
    loaded.learn(91, callback=second)
    loaded.learn(91, callback=third, reset_num_timesteps=False)
    for recorder in (first, second):
        assert recorder.finished
        assert all(info["kl_source"] == "reported" for *_, info in recorder.finished)
        assert any(abs(info["kl"]) > 0.01 for *_, info in recorder.finished)

    infos = []
    keep = lambda now, _: infos.append(now["info"]) if now["done"] else None  # noqa: E731
    mean, _ = evaluate_policy(loaded, vec_env(3), n_eval_episodes=12, deterministic=False, callback=keep)
    assert len(infos) == 12
    assert {info["kl_source"] for info in infos} == {"reported"}
    assert mean == pytest.approx(np.mean([info["rm_score"] - 0.1 * info["kl"] for info in infos]), abs=1e-5)


def test_evaluating_another_environment_in_the_middle_of_a_rollout_disturbs_nothing(vec_env):
    other = vec_env()

    class Disturb(Recorder):
        def _on_step(self):
            evaluate_policy(self.model, other, n_eval_episodes=2)
            return super()._on_step()

    recorder = Disturb()
    small(PPO, vec_env()).learn(1, callback=recorder)
    assert recorder.finished
    for prompt, episode, info in recorder.finished:
        assert info["kl_source"] == "reported"
        tokens, stored, _ = (list(column) for column in zip(*episode, strict=True))
        np.testing.assert_allclose(stored, plain_logprobs(tiny_model(seed=5).model, prompt, tokens), atol=1e-5)


def test_stock_policies_bring_no_kl_and_the_log_says_so(vec_env, caplog, monkeypatch):
    monkeypatch.setattr(Scorer, "warned", False)
    recorder = Recorder()
    kwargs = {"features_extractor_class": TokenEmbedding}
    with caplog.at_level("WARNING", logger="textenv"):
        small(PPO, vec_env(), "MultiInputPolicy", policy_kwargs=kwargs).learn(65, callback=recorder)
    assert len(caplog.records) == 1
    assert {info["kl_source"] for *_, info in recorder.finished} == {"none"}
    assert {info["reward_terms"].keys() == {"reward_model"} for *_, info in recorder.finished} == {True}


def test_the_kl_is_counted_once_whatever_the_source(vec_env):
    for source, terms in [
        ("auto", {"reward_model", "kl"}),
        ("policy", {"reward_model", "kl"}),
        ("reference", {"reward_model", "reference_logprob"}),
    ]:
        env = vec_env(kl_source=source)
        agent, recorder = small(PPO, env, learning_rate=0.0), Recorder()
        env.env_method("attach_policy", agent.policy.model)
        agent.learn(1, callback=recorder)
        for prompt, episode, info in recorder.finished:
            tokens = [token for token, *_ in episode]
            own, other = (plain_logprobs(tiny_model(seed=seed).model, prompt, tokens).sum() for seed in (5, 0))
            paid = -0.1 * (own - other) if source != "reference" else 0.1 * other
            assert info["reward_terms"].keys() == terms
            assert episode[-1][2] == pytest.approx(info["rm_score"] + paid, abs=2e-5)


def test_a_decision_is_taken_once_and_only_for_its_observation_and_actions(vec_env):
    env = vec_env(3)
    agent = small(PPO, env)
    observation = first_observation(env)
    actions, _ = agent.predict(observation)
    moved = {**observation, "prompt_length": observation["prompt_length"] + 1}
    assert take_decision(observation, (actions + 1) % 12) is None
    assert take_decision(moved, actions) is None
    assert take_decision(observation["input_ids"], actions) is None
    assert take_decision(observation, actions) is not None
    assert take_decision(observation, actions) is None


def test_an_agent_that_was_asked_but_did_not_act_reports_nothing(vec_env):
    env = vec_env(3, max_new_tokens=1)
    agent = small(PPO, env)
    actions, _ = agent.predict(first_observation(env))
    *_, infos = env.step((actions + 1) % 12)
    assert {info["kl_source"] for info in infos} == {"none"}


# -- training ----------------------------------------------------------------------------------------------------------


def test_gradients_are_finite_with_masks_and_an_entropy_bonus(vec_env):
    agent = small(PPO, vec_env(**RULED), ent_coef=0.1, learning_rate=1e-3).learn(130)
    assert all(p.isfinite().all() for p in agent.policy.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in agent.policy.parameters())


def test_the_reference_is_neither_part_of_the_policy_nor_trained(vec_env):
    env = vec_env(reference="gpt2-a")
    reference = env.unwrapped.env.reference.model
    before = [p.clone() for p in reference.parameters()]
    agent = small(PPO, env, policy_kwargs=None, learning_rate=1e-2)
    assert not {p.data_ptr() for p in agent.policy.parameters()} & {p.data_ptr() for p in reference.parameters()}
    assert all(module is not reference for module in agent.policy.modules())
    observation = first_observation(env)
    start = agent.policy.get_distribution({k: torch.from_numpy(v) for k, v in observation.items()}).distribution.probs
    agent.learn(65)
    assert all(torch.equal(a, b) for a, b in zip(before, reference.parameters(), strict=True))
    assert all(p.grad is None for p in reference.parameters())
    end = agent.policy.get_distribution({k: torch.from_numpy(v) for k, v in observation.items()}).distribution.probs
    assert not torch.allclose(start, end, atol=1e-3)


def test_the_same_seed_learns_the_same_weights_with_the_cache_or_without(vec_env):
    weights = []
    for use_cache in (True, True, False):
        agent = small(PPO, vec_env(), policy_kwargs={"model": "gpt2-b", "use_cache": use_cache}).learn(130)
        weights.append(agent.policy.parameters_to_vector())
    np.testing.assert_array_equal(weights[0], weights[1])
    np.testing.assert_allclose(weights[0], weights[2], atol=1e-3)


@pytest.mark.parametrize("obs_mode", ["dict", "tokens"])
def test_single_observations_are_answered_like_batched_ones(vec_env, obs_mode):
    env = vec_env(4, obs_mode=obs_mode)
    agent = small(PPO, env)
    env.reset()
    observation, *_ = env.step(np.array([1, 2, 3, 4]))
    tokens, _ = agent.predict(observation, deterministic=True)
    for slot in range(4):
        one = {k: v[slot] for k, v in observation.items()} if obs_mode == "dict" else observation[slot]
        assert agent.predict(one, deterministic=True)[0] == tokens[slot]


# -- saving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("obs_mode", ["dict", "tokens"])
def test_a_saved_agent_holds_weights_and_no_module_and_acts_the_same_when_loaded(vec_env, tmp_path, obs_mode):
    env = vec_env(obs_mode=obs_mode, **RULED)
    agent = small(PPO, env, learning_rate=1e-2).learn(130)
    path = tmp_path / "agent.zip"
    agent.save(path)
    weights = sum(p.numel() * 4 for p in agent.policy.parameters())
    assert path.stat().st_size < 3 * weights + 60_000  # weights and two moments
    with zipfile.ZipFile(path) as archive:
        data = json.loads(archive.read("data"))
        saved = torch.load(io.BytesIO(archive.read("policy.pth")), weights_only=True)
        assert len(archive.read("data")) < 60_000
    assert saved.keys() == agent.policy.state_dict().keys()
    for key, value in data.items():
        if isinstance(value, dict) and ":serialized:" in value:
            pickled = base64.b64decode(value[":serialized:"])
            assert b"transformers" not in pickled, key
            assert b"torch.nn" not in pickled, key
            assert b"TextVec" not in pickled, key
    loaded = PPO.load(path, device="cpu")
    observation = first_observation(env)
    for _ in range(8):
        actions, _ = agent.predict(observation, deterministic=True)
        np.testing.assert_array_equal(actions, loaded.predict(observation, deterministic=True)[0])
        observation, *_ = env.step(actions)
    assert loaded.policy.rule == env.unwrapped.task.rule


def test_a_policy_alone_can_be_saved_and_loaded(vec_env, tmp_path):
    env = vec_env()
    agent = small(PPO, env, learning_rate=1e-2).learn(65)
    agent.policy.save(str(tmp_path / "policy.pt"))
    loaded = CausalLMPolicy.load(str(tmp_path / "policy.pt"), device="cpu")
    observation = first_observation(env)
    np.testing.assert_array_equal(
        agent.predict(observation, deterministic=True)[0], loaded.predict(observation, deterministic=True)[0]
    )


# -- other agents and pieces -------------------------------------------------------------------------------------------


def test_large_token_ids_survive_the_rollout_buffers():
    top = 2**24 - 1
    box = spaces.Box(0, top, (3,), np.int64)
    for space, buffer in [
        (box, RolloutBuffer(1, box, spaces.Discrete(top + 1), device="cpu")),
        (None, DictRolloutBuffer(1, spaces.Dict(input_ids=box), spaces.Discrete(top + 1), device="cpu")),
    ]:
        ids = np.array([[top, top - 1, 1]])
        observation = ids if space else {"input_ids": ids}
        zero = torch.zeros(1)
        buffer.add(observation, np.array([[top]]), np.zeros(1), np.zeros(1), zero, zero)
        batch = next(iter(buffer.get()))
        stored = batch.observations if space else batch.observations["input_ids"]
        assert stored.dtype == torch.int64
        np.testing.assert_array_equal(stored, ids)
        assert batch.actions.long().item() == top


@pytest.mark.parametrize("obs_mode", ["dict", "tokens"])
def test_token_embeddings_see_every_real_token_and_no_padding(vec_env, obs_mode):
    env = vec_env(2, obs_mode=obs_mode)
    extractor = TokenEmbedding(env.observation_space, dim=3)
    assert extractor.features_dim == 13 * 3
    env.set_options({"prompt": "is the <eos> not green"})
    observation = env.reset()
    floats = lambda obs: (  # noqa: E731
        {k: torch.from_numpy(v).float() for k, v in obs.items()}
        if obs_mode == "dict"
        else torch.from_numpy(obs).float()
    )
    features = extractor(floats(observation)).view(2, 13, 3)
    weight = extractor.embedding.weight
    torch.testing.assert_close(features[0, 2:7], weight[[6, 7, 0, 10, 2]])
    assert (features[0, :2] == 0).all()
    assert (features[0, 7:] == 0).all()
    observation, *_ = env.step(np.array([6, 3]))
    features = extractor(floats(observation)).view(2, 13, 3)
    torch.testing.assert_close(features[:, 7], weight[[6, 3]])


@pytest.mark.parametrize(("obs_mode", "policy"), [("dict", "MultiInputPolicy"), ("tokens", "MlpPolicy")])
def test_stock_perceptrons_learn_on_token_embeddings(vec_env, obs_mode, policy):
    env = vec_env(16, obs_mode=obs_mode, kl_source="reference")
    kwargs = {"features_extractor_class": TokenEmbedding, "features_extractor_kwargs": {"dim": 8}}
    agent = PPO(
        policy,
        env,
        n_steps=16,
        n_epochs=4,
        batch_size=64,
        learning_rate=1e-2,
        policy_kwargs=kwargs,
        seed=0,
        device="cpu",
    )
    before, _ = evaluate_policy(agent, env, n_eval_episodes=64, deterministic=False)
    agent.learn(16 * 16 * 4)
    after, _ = evaluate_policy(agent, env, n_eval_episodes=64, deterministic=False)
    assert after > before + 0.3


def test_dqn_runs_on_the_exact_world_with_the_references_logprob_as_reward():
    env = make_vec_env("textenv/Micro-v0", 8, kl_source="reference")
    kwargs = {"features_extractor_class": TokenEmbedding}
    options = {"learning_starts": 100, "buffer_size": 1000, "train_freq": 4, "policy_kwargs": kwargs, "seed": 0}
    agent = DQN("MultiInputPolicy", env, device="cpu", **options)
    agent.learn(800)
    assert agent._n_updates > 10
    mean, _ = evaluate_policy(agent, env, n_eval_episodes=8)
    assert np.isfinite(mean)
    assert {info["kl_source"] for info in env.unwrapped.step(np.zeros(8, dtype=int))[3] if info} == {"reference"}


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_policy_with_another_vocabulary_is_refused(vec_env):
    config = AutoConfig.for_model("gpt2", vocab_size=15, bos_token_id=0, eos_token_id=0, **FAMILIES["gpt2"])
    from transformers import AutoModelForCausalLM

    make = lambda: wrap_language_model(AutoModelForCausalLM.from_config(config), word_tokenizer())  # noqa: E731
    textenv.register_language_model("fifteen", make)
    with pytest.raises(ValueError, match=r"got 15 tokens in 'fifteen' and 12 actions\. Start the policy from"):
        small(PPO, vec_env(), policy_kwargs={"model": "fifteen"})


def test_what_a_plain_environment_does_not_tell_must_be_given(vec_env, text_options):
    vec_env()
    plain = DummyVecEnv([lambda: gymnasium.make("textenv/Text-v0", obs_mode="tokens", **text_options)])
    for known, name in [
        ({}, "model"),
        ({"model": "gpt2-a"}, "rule"),
        ({"model": "gpt2-a", "rule": TokenRule()}, "prompt_width"),
    ]:
        with pytest.raises(ValueError, match=rf"{name} must be given .*make_vec_env, or pass policy_kwargs=.*{name}"):
            small(PPO, plain, policy_kwargs=known)
    given = {"model": "gpt2-a", "rule": TokenRule(stop_ids=(0,)), "prompt_width": 7}
    small(PPO, plain, policy_kwargs=given).learn(13)


def test_a_rule_that_differs_from_the_environments_is_an_error_before_the_step(vec_env, tmp_path):
    small(PPO, vec_env()).save(tmp_path / "agent.zip")
    loaded = PPO.load(tmp_path / "agent.zip", env=vec_env(temperature=0.5), device="cpu")
    with pytest.raises(ValueError, match=r"environment's rule, .*temperature=0\.5.*, got .*temperature=1\.0"):
        loaded.learn(65)


def test_other_misuse_gets_one_clear_error(vec_env):
    with pytest.raises(ValueError, match="use_sde must be off"):
        CausalLMPolicy(vec_env().observation_space, vec_env().action_space, lambda _: 1e-3, use_sde=True)
    with pytest.raises(ValueError, match="norm_obs=False"):
        small(PPO, VecNormalize(vec_env(), norm_obs_keys=["input_ids"])).learn(65)
    with pytest.raises(TypeError, match="net_arch"):
        small(PPO, vec_env(), policy_kwargs={"net_arch": [64]})


def test_the_action_space_equals_a_plain_one(vec_env):
    space = vec_env().action_space
    assert isinstance(space, TokenSpace)
    assert space == spaces.Discrete(12)
    assert spaces.Discrete(12) == space
