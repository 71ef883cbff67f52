"""PPO as software: ratios, checkpoints, determinism, errors. Exact worlds test that it learns."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import textenv
from agents.core.rollout import Stream
from agents.logs.figures import MEASURED
from agents.ppo import PPO, PPOConfig
from reward_models.scorers.transformer import TransformerRewardModel
from tests.agents.ppo.conftest import CONFIG, assert_equal_weights, short_reward_model, weights, wide_reward_model
from tests.conftest import WORDS, tiny_model
from textenv.episode import observation_tokens
from textenv.evaluation import evaluate
from textenv.lm import response_logprobs
from textenv.lm.load import wrap_language_model


@pytest.mark.parametrize("micro_batch_size", [None, 1, 3, 16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_with_learning_rate_zero_every_ratio_is_one_in_every_epoch(agent, micro_batch_size, temperature):
    env_options = {"temperature": temperature, "min_new_tokens": 2}
    learner = agent(tiny_model(seed=5), env_options=env_options, learning_rate=0.0, micro_batch_size=micro_batch_size)
    learner.actor.train()  # dropout stays off even so
    rollout = learner.collect()
    for rows in torch.randperm(32).split(7):
        with torch.no_grad():
            new = learner.actor.evaluate(rollout.tokens.select(rows), learner.task)
        old = rollout.logprobs[rows, : new.logprobs.shape[1]]
        torch.testing.assert_close((new.logprobs - old).exp(), torch.ones_like(old), atol=1e-5, rtol=0)
        torch.testing.assert_close(new.values, rollout.values[rows, : old.shape[1]], atol=1e-5, rtol=0)
    log = learner.update(rollout)
    assert log["clip_fraction"] == 0.0
    assert log["approx_kl"] < 1e-8


def test_answers_longer_than_the_reward_models_context_are_cut_and_counted_and_training_goes_on(agent):
    model = short_reward_model(("<eos>", *reversed(WORDS[1:])))
    textenv.register_reward_model("short", model)
    learner = agent(env_options={"reward_model": "short"}, batch_size=32).learn(64)
    cut = [log["truncated_responses"] for log in learner.history]
    assert 0 < cut[0] < 32
    assert sum(cut) == model.truncated_responses
    infos = learner.env.play(
        *learner.actor.act(learner.stream.observation, learner.task, generator=learner.generator)[:2]
    )[4]
    final = infos["final_info"]
    words = [len(response.split()) for response in final["response"]]
    assert final["truncated_response"].tolist() == [count > 3 for count in words]  # EOS is the fourth token


def test_a_budget_that_a_reward_model_of_the_same_tokens_cannot_read_is_refused(agent):
    textenv.register_reward_model("short", short_reward_model())
    with pytest.raises(ValueError, match=r"max_new_tokens must be below the reward model's context \(4\), got 4\."):
        agent(env_options={"reward_model": "short", "max_new_tokens": 4})
    agent(env_options={"reward_model": "short", "max_new_tokens": 3})


def test_bfloat16_holds_reference_and_reward_model_and_computes_over_float32_weights(agent, tmp_path):
    """bfloat16 keeps 8 bits: a probability is off by about a hundredth, never the losses' own precision."""
    TransformerRewardModel.from_language_model(tiny_model()).save_pretrained(tmp_path)
    options = {"reward_model": str(tmp_path), "dtype": "bfloat16"}
    learner = agent(env_options=options, learning_rate=0.0)
    task = learner.task
    assert task.reference.model.dtype == task.scorer._reward_model.model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in learner.actor.parameters()} == {torch.float32}
    rollout = learner.collect()
    new = learner.actor.evaluate(rollout.tokens, task)
    assert (new.logprobs.dtype, new.values.dtype, rollout.kl_per_token.dtype) == (torch.float32,) * 3
    assert (new.logprobs - rollout.logprobs).abs().max() < 0.1
    assert rollout.kl_per_token.abs().mean() < 0.05
    full = response_logprobs(learner.policy.model, rollout.tokens, task.rule)
    assert 0 < (full - new.logprobs).abs().max() < 0.1
    assert learner.update(rollout)["clip_fraction"] == 0.0


def test_the_kl_of_a_policy_that_is_the_reference_is_zero_in_bfloat16_too(agent):
    env = agent(env_options={"dtype": "bfloat16", "kl_source": "policy"}).env
    env.attach_policy(textenv.fresh_language_model(env.task.config.reference, dtype="bfloat16").model)
    played = env.task.respond(
        env.reference.model,
        observation_tokens(env.reset(seed=0)[0], env.task.prompt_width),
        generator=torch.Generator().manual_seed(0),
    )
    infos = env.play(played.response_ids, played.response_lengths)[4]
    assert (infos["final_info"]["kl_per_token"] == 0).all()


def test_a_policy_of_bfloat16_weights_is_not_trained(agent):
    policy = tiny_model()
    policy.model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"must have float32 weights, got torch\.bfloat16"):
        agent(policy)


def test_an_unknown_precision_is_refused_with_the_choices(agent):
    with pytest.raises(ValueError, match=r"dtype must be one of 'float32', 'bfloat16', got 'int8'\."):
        agent(env_options={"dtype": "int8"})
    with pytest.raises(ValueError, match=r"dtype must be one of 'float32', 'bfloat16', got 'int8'\."):
        textenv.language_model("micro-reference", dtype="int8")  # type: ignore[arg-type]


def test_attention_is_computed_as_asked_for_by_reference_and_policy(agent):
    learner = agent(env_options={"attn_implementation": "eager"})
    models = (learner.policy.model, learner.task.reference.model)
    assert [model.config._attn_implementation for model in models] == ["eager"] * 2
    with pytest.raises(ValueError, match="a language model must be"):
        agent(env_options={"attn_implementation": "nonsense"})


@pytest.mark.parametrize(
    "changed",
    [
        {"value_function": "trunk"},
        {
            "lr_schedule": "cosine",
            "warmup_ratio": 0.15,
            "weight_decay": 0.1,
            "adam_beta1": 0.8,
        },  # into the third update
        {"critic_warmup": 3, "value_function": "shared"},
        {"critic_warmup": 1, "scale_rewards": True, "dual_clip": 1.5},
        {"value_function": "reward-model"},
        {"value_function": "reward-model", "lora_rank": 2},
    ],
    ids=str,
)
def test_n_updates_saved_loaded_and_n_more_equal_two_n(agent, make_vector, tmp_path, changed):
    config = {"kl_target": 0.5, "kl_horizon": 100.0, "lr_decay_episodes": 500, **changed}
    textenv.register_reward_model("wide", wide_reward_model())
    world = {"reward_model": "wide"} if "reward-model" in changed.values() else {}
    whole = agent(env_options=world, **config)
    whole.learn(128)
    half = agent(env_options=world, **config)
    half.learn(64)
    half.save(tmp_path / "checkpoint")
    resumed = PPO.load(tmp_path / "checkpoint", make_vector(16, **world).unwrapped)
    assert resumed.config == half.config
    resumed.learn(64)
    assert_equal_weights(weights(whole), weights(resumed))
    assert whole.env.kl_coef == resumed.env.kl_coef != 0.1
    assert whole.episodes == resumed.episodes == 128
    timeless = lambda log: {k: v for k, v in log.items() if k not in MEASURED}  # noqa: E731
    assert [timeless(log) for log in whole.history] == [timeless(log) for log in resumed.history]


def test_the_saved_policy_is_a_plain_hugging_face_model(agent, tmp_path):
    learner = agent().learn(32)
    learner.save(tmp_path / "checkpoint")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint" / "policy")
    ids = torch.tensor([[1, 2, 3]])
    mask = torch.ones_like(ids)
    own = learner.policy.model
    torch.testing.assert_close(plain(ids, attention_mask=mask).logits, own(ids, attention_mask=mask).logits)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), own.parameters(), strict=True))
    assert not list(tmp_path.glob(".*"))


def test_saving_again_replaces_the_checkpoint_and_a_failed_save_leaves_the_old_one(agent, tmp_path, monkeypatch):
    learner = agent()
    learner.save(tmp_path / "checkpoint")
    learner.learn(32)
    monkeypatch.setattr("agents.core.checkpoint.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        learner.save(tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    monkeypatch.undo()
    learner.save(tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "state.json").read_text().find('"episodes": 32') > 0


def test_the_same_seed_learns_the_same_and_the_global_generators_are_left_alone(agent):
    torch_before, np_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one = weights(agent(seed=4).learn(64))
    assert torch.equal(torch.get_rng_state(), torch_before)
    np.testing.assert_array_equal(np.random.get_state()[1], np_before)  # noqa: NPY002
    torch.rand(3)
    assert_equal_weights(one, weights(agent(seed=4).learn(64)))


def test_the_reference_is_not_trained(agent):
    learner = agent()
    before = [p.clone() for p in learner.env.reference.model.parameters()]
    learner.learn(64)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.env.reference.model.parameters(), strict=True))
    assert all(p.grad is None for p in learner.env.reference.model.parameters())


@pytest.mark.parametrize(
    "config",
    [{}, {"per_token_kl": False}, {"value_function": "trunk"}, {"value_function": "shared"}, {"entropy_coef": 0.01}],
)
def test_a_few_updates_raise_the_reward(agent, config):
    learner = agent(batch_size=128, learning_rate=1e-2, **config)
    learner.learn(128 * 12)
    rewards = [log["reward"] for log in learner.history]
    assert np.mean(rewards[-3:]) > rewards[0] + 0.5


def test_predict_speaks_single_and_batched_observations_of_both_modes(make_vector):
    for obs_mode in ("dict", "tokens"):
        env = make_vector(4, obs_mode=obs_mode).unwrapped
        learner = PPO(env, PPOConfig(**{**CONFIG, "batch_size": 4}))
        observation, _ = env.reset(seed=0)
        observation, *_ = env.step(np.array([1, 2, 3, 4]))
        tokens, _ = learner.predict(observation, deterministic=True)
        assert tokens.shape == (4,)
        for slot in range(4):
            one = {k: v[slot] for k, v in observation.items()} if obs_mode == "dict" else observation[slot]
            assert learner.predict(one, deterministic=True)[0] == tokens[slot]


def test_evaluation_by_steps_and_by_whole_responses_agree_for_a_greedy_agent(agent, make_vector):
    learner = agent(tiny_model(seed=6))

    class StepsOnly:
        predict = staticmethod(learner.predict)

    env = make_vector(3).unwrapped
    fast = evaluate(learner, env, deterministic=True)
    slow = evaluate(StepsOnly(), make_vector(3).unwrapped, deterministic=True)
    assert fast.prompts == slow.prompts
    assert fast.responses == slow.responses
    np.testing.assert_allclose(fast.rm_scores, slow.rm_scores)
    assert fast.prompt_ids.tolist() == [0, 1, 2, 3]
    assert slow.kl is None
    assert fast.kl is not None
    summary = fast.summary()
    assert summary["rm_score"].mean == pytest.approx(fast.rm_scores.mean())
    assert summary["rm_score"].ci95 == pytest.approx(3.182446 * fast.rm_scores.std(ddof=1) / 2)


def test_learning_stops_when_the_callback_says_so(agent):
    assert len(agent().learn(32 * 10, callback=lambda log: log["episodes"] < 64).history) == 2


def test_bad_input_gets_one_clear_error(agent, make_vector, tmp_path):
    with pytest.raises(ValueError, match="batch_size must be a multiple of the environment's num_envs, got 32 and 5"):
        agent(num_envs=5).learn(32)
    with pytest.raises(ValueError, match="SameStep"):
        Stream(make_vector(2, autoreset_mode="Disabled").unwrapped, 0)
    with pytest.raises(ValueError, match="or less, got 64"):
        PPOConfig(batch_size=32, minibatches=64)
    with pytest.raises(ValueError, match=r"lam must be between 0 and 1, got 1\.5"):
        PPOConfig(lam=1.5)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="Name another checkpoint"):
        PPO.load(tmp_path / "checkpoint", make_vector(2).unwrapped)
    learner = agent()
    learner.save(tmp_path / "good")
    with pytest.raises(ValueError, match="that of the checkpoint, 16, got 2"):
        PPO.load(tmp_path / "good", make_vector(2).unwrapped)


def test_a_policy_with_another_vocabulary_is_refused(make_vector):
    from transformers import AutoConfig
    from transformers import AutoModelForCausalLM as Auto

    from tests.conftest import FAMILIES, word_tokenizer

    config = AutoConfig.for_model("gpt2", vocab_size=15, bos_token_id=0, eos_token_id=0, **FAMILIES["gpt2"])
    other = wrap_language_model(Auto.from_config(config), word_tokenizer(), name="other")
    with pytest.raises(ValueError, match="got 15 tokens in 'other' and 12 in "):
        PPO(make_vector(2).unwrapped, PPOConfig(**CONFIG), other)
