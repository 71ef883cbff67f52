"""PPO as software: ratios, micro-batches, checkpoints, determinism, errors. Exact worlds test that it learns."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import textenv
from agents.core.actor import Evaluated
from agents.core.learner import MicroBatch
from agents.core.returns import Advantages
from agents.core.rollout import Rollout, Stream
from agents.logs.figures import MEASURED
from agents.ppo import PPO, PPOConfig
from reward_models.scorers.transformer import TransformerRewardModel
from tests.conftest import WORDS, tiny_model
from textenv.episode import observation_tokens
from textenv.evaluation import evaluate
from textenv.lm import Responses, response_logprobs
from textenv.lm.load import word_level_tokenizer, wrap_language_model

CONFIG = {"batch_size": 32, "epochs": 2, "minibatches": 2, "learning_rate": 3e-3, "seed": 0}


@pytest.fixture
def agent(make_vector):
    def make(policy=None, num_envs=16, env_options=(), **config):
        env = make_vector(num_envs, **dict(env_options)).unwrapped
        return PPO(env, PPOConfig(**{**CONFIG, **config}), policy)

    return make


def weights(agent):
    return {name: tensor.clone() for name, tensor in agent.actor.state_dict().items()}


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


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


def short_reward_model(words=WORDS):
    """A random reward model that reads 4 tokens, over ``words``."""
    model = TransformerRewardModel.from_language_model(tiny_model())
    torch.nn.init.normal_(model.model.score.weight, generator=torch.Generator().manual_seed(0))
    model.model.config.n_positions = 4
    model.tokenizer = word_level_tokenizer(words)
    return model


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


def test_the_size_of_micro_batches_changes_no_gradient(agent):
    gradients = []
    for micro in (None, 1, 5):
        learner = agent(tiny_model(seed=5), micro_batch_size=micro, max_grad_norm=1e9)
        rollout = learner.collect()
        advantages = torch.randn(rollout.values.shape, generator=torch.Generator().manual_seed(0))
        learner.step(rollout, Advantages(advantages, advantages), torch.arange(20))
        gradients.append(torch.cat([p.grad.flatten() for p in learner.actor.parameters() if p.grad is not None]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-4)


def test_every_pass_learns_once_from_every_episode_of_the_batch(agent):
    learner = agent(tiny_model(seed=5), learning_rate=0.0, epochs=2, minibatches=4, micro_batch_size=3)
    rollout, seen = learner.collect(), []
    evaluate_batch = learner.actor.evaluate

    def spy(batch, *args, **kwargs):
        for prompt, count, response, length in zip(*batch, strict=True):
            seen.append((tuple(prompt[len(prompt) - count :].tolist()), tuple(response[:length].tolist())))
        return evaluate_batch(batch, *args, **kwargs)

    learner.actor.evaluate = spy
    learner.update(rollout)
    tokens = rollout.tokens
    played = [
        (tuple(tokens.prompt_ids[b, -tokens.prompt_lengths[b] :].tolist()), tuple(row[:length].tolist()))
        for b, (row, length) in enumerate(zip(tokens.response_ids, tokens.response_lengths, strict=True))
    ]
    assert sorted(seen) == sorted(played * 2)


def two_episodes():
    """Of two tokens and of one, which earned 3 and −1, with values that a critic might have given."""
    ids, zeros = torch.ones(2, 2, dtype=torch.int64), torch.zeros(2, 2)
    lengths, rewards, yes = torch.tensor([2, 1]), torch.tensor([3.0, -1.0]), torch.ones(2, dtype=torch.bool)
    values = torch.tensor([[1.0, 0.5], [2.0, 0.0]])
    tokens = Responses(ids, torch.tensor([2, 2]), ids, lengths)
    return Rollout(tokens, zeros, values, rewards, zeros, 0.0, rewards, None, lengths, yes, ~yes)


def test_advantages_are_those_of_the_discount_and_the_lambda_of_the_config(agent):
    """γ = λ = ½. The second token: 3 − ½; the first: (½ · ½ − 1) + ¼ · 2.5. The other episode: −1 − 2."""
    learner = agent(gamma=0.5, lam=0.5, whiten_advantages=False)
    found = learner.advantages(two_episodes())
    assert found.advantages.tolist() == [[-0.125, 2.5], [-3.0, 0.0]]
    assert found.returns.tolist() == [[0.875, 3.0], [-1.0, 0.0]]


def test_by_default_each_token_pays_its_own_kl_and_advantages_are_returns_minus_values(agent):
    """Two nats, one a token, at β = ½ and a return of 3: the tokens earn −½ and 3½, so 3 and 3½ are still to come."""
    nats = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    found = agent(whiten_advantages=False).advantages(two_episodes()._replace(kl_per_token=nats, kl_coef=0.5))
    assert found.returns.tolist() == [[3.0, 3.5], [-1.0, 0.0]]
    assert found.advantages.tolist() == [[2.0, 3.0], [-3.0, 0.0]]


def test_advantages_are_whitened_over_the_real_tokens_and_returns_are_not(agent):
    """Mean −0.625 / 3, squares around it 0.0069444 + 7.3350694 + 7.7934028."""
    found = agent(gamma=0.5, lam=0.5).advantages(two_episodes())
    deviation = (15.1354167 / 3) ** 0.5
    expected = [0.0833333 / deviation, 2.7083333 / deviation, -2.7916667 / deviation, 0.0]
    assert found.advantages.flatten().tolist() == pytest.approx(expected, abs=1e-5)
    assert found.returns.tolist() == [[0.875, 3.0], [-1.0, 0.0]]


def test_the_loss_clips_ratios_and_values_and_weighs_the_values_as_the_config_says(agent):
    mask, zeros = torch.tensor([[True, True], [True, False]]), torch.zeros(2, 2)
    advantages, returns = torch.tensor([[1.0, 1.0], [-1.0, 0.0]]), torch.tensor([[2.0, 0.5], [-1.0, 0.0]])
    old = MicroBatch(zeros, torch.tensor([[0.0, 0.5], [0.0, 0.0]]), advantages, returns, mask, tokens=3, episodes=2)
    new = Evaluated(torch.tensor([[1.5, 1.0], [0.8, 1.0]]).log(), torch.tensor([[1.0, 0.5], [0.1, 0.0]]), None)
    # At most 1.1 for the good token; the bad one costs 0.9 at least.
    policy = -(1.1 + 1.0 - 0.9) / 3
    loss, log = agent(clip_range=0.1, value_coef=0.5).loss(new, old)
    assert log["policy_loss"].item() == pytest.approx(policy)
    assert log["clip_fraction"].item() == pytest.approx(2 / 3)
    assert log["value_loss"].item() == pytest.approx(0.5 * (1.0 + 0.0 + 1.1**2) / 3)
    assert loss.item() == pytest.approx(policy + 0.5 * 0.5 * (1.0 + 0.0 + 1.1**2) / 3)
    # Twice as bad a token costs no more than 1.05 with a dual clip of that.
    risen = new._replace(logprobs=torch.tensor([[1.5, 1.0], [2.0, 1.0]]).log())
    for dual_clip, cost in ((None, 2.0), (1.05, 1.05)):
        _, log = agent(clip_range=0.1, dual_clip=dual_clip).loss(risen, old)
        assert log["policy_loss"].item() == pytest.approx(-(1.1 + 1.0 - cost) / 3)
    # The first value may move by a quarter: 0.25, which is 1.75 from its target.
    loss, log = agent(clip_range=0.1, value_coef=0.5, value_clip_range=0.25).loss(new, old)
    assert log["value_loss"].item() == pytest.approx(0.5 * (1.75**2 + 0.0 + 1.1**2) / 3)
    assert loss.item() == pytest.approx(policy + 0.5 * 0.5 * (1.75**2 + 0.0 + 1.1**2) / 3)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_the_entropy_bonus_raises_the_mean_entropy_of_the_allowed_tokens(agent, micro_batch_size):
    options = {"entropy_coef": 0.5, "value_coef": 0.0, "max_grad_norm": 1e9, "micro_batch_size": micro_batch_size}
    learner = agent(tiny_model(seed=5), env_options={"min_new_tokens": 1}, **options)
    rollout = learner.collect()
    nothing = torch.zeros_like(rollout.values)
    learner.step(rollout, Advantages(nothing, nothing), torch.arange(8))
    model, tokens, entropies = tiny_model(seed=5).model, rollout.tokens, []
    for b in range(8):
        prompt = tokens.prompt_ids[b, -int(tokens.prompt_lengths[b]) :]
        response = tokens.response_ids[b, : int(tokens.response_lengths[b])]
        logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0]
        for t in range(len(response)):
            allowed = logits[len(prompt) + t - 1, 1 if t == 0 else 0 :]  # EOS, number 0, must not come first
            entropies.append(torch.distributions.Categorical(logits=allowed).entropy())
    (-0.5 * torch.stack(entropies).mean()).backward()
    expected = dict(model.named_parameters())
    for name, parameter in learner.policy.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-6, rtol=1e-3)


def test_the_explained_variance_is_that_of_the_values_that_were_held_while_playing(agent):
    learner = agent(tiny_model(seed=5), learning_rate=0.0, per_token_kl=False)
    rollout = learner.collect()
    assert learner.update(rollout)["explained_variance"] == pytest.approx(0.0, abs=1e-6)  # values of 0
    half = torch.where(rollout.tokens.response_mask, 0.5 * rollout.rewards[:, None], 0.0)
    # Half of every return is left over, and a quarter of the variance.
    assert learner.update(rollout._replace(values=half))["explained_variance"] == pytest.approx(0.75, abs=1e-5)


def test_every_pass_has_an_order_of_its_own(agent):
    learner, seen = agent(epochs=3, minibatches=2), []
    log = dict.fromkeys(("ratio_max", "ratio_min", "update_tokens", "update_positions"), 1.0)
    learner.step = lambda rollout, targets, index: seen.append(index.tolist()) or log
    learner.update(learner.collect())
    assert [len(part) for part in seen] == [16] * 6
    passes = [seen[i] + seen[i + 1] for i in (0, 2, 4)]
    assert all(sorted(order) == list(range(32)) for order in passes)
    assert len({tuple(order) for order in passes}) == 3


def test_losses_are_means_over_the_real_tokens_of_the_minibatch(agent):
    learner = agent(tiny_model(seed=5), learning_rate=0.0, epochs=1, minibatches=1, per_token_kl=False)
    rollout = learner.collect()
    # Values start at 0 and the reward stands at the end, so the target of every token is its episode's reward.
    squares = sum(n * r**2 for n, r in zip(rollout.tokens.response_lengths.tolist(), rollout.rewards.tolist()))
    expected = 0.5 * squares / rollout.tokens.response_lengths.sum().item()
    assert learner.update(rollout)["value_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_critic_of_its_own_values_the_state_before_each_token(agent):
    learner = agent(tiny_model(seed=5), value_function="trunk")
    head = learner.actor.value_head
    with torch.no_grad():
        head.output.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    rollout = learner.collect()
    tokens = rollout.tokens
    for b in range(4):
        prompt = tokens.prompt_ids[b, -tokens.prompt_lengths[b] :]
        for t in range(int(tokens.response_lengths[b])):
            before = torch.cat([prompt, tokens.response_ids[b, :t]])[None]
            with torch.no_grad():
                value = head(learner.actor.critic(input_ids=before).last_hidden_state[0, -1])
            assert rollout.values[b, t].item() == pytest.approx(value.item(), abs=1e-5)


def wide_reward_model(seed=3, words=WORDS):
    """A random reward model with hidden states twice as wide as those of the policy, with a padding token besides."""
    lm = tiny_model("llama", seed)
    config = copy.deepcopy(lm.model.config)
    config.hidden_size, config.head_dim = 64, 16
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wide = wrap_language_model(AutoModelForCausalLM.from_config(config), word_level_tokenizer(words))
    model = TransformerRewardModel.from_language_model(wide)
    torch.nn.init.normal_(model.model.score.weight, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize(
    "options", [{}, {"lora_rank": 2}, {"train_layers": 1, "gradient_checkpointing": True}], ids=str
)
def test_a_value_function_from_the_reward_model_reads_its_trunk_and_leaves_it_alone(agent, options):
    reward_model = wide_reward_model()
    textenv.register_reward_model("wide", reward_model)
    before = copy.deepcopy(reward_model.model.state_dict())
    learner = agent(env_options={"reward_model": "wide"}, value_function="reward-model", **options)
    with torch.no_grad():
        learner.actor.value_head.output.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    rollout = learner.collect()
    tokens = rollout.tokens
    for b in range(4):
        prompt = tokens.prompt_ids[b, -tokens.prompt_lengths[b] :]
        for t in range(int(tokens.response_lengths[b])):
            ids = torch.cat([prompt, tokens.response_ids[b, :t]])[None]
            with torch.no_grad():
                hidden = reward_model.model.base_model(input_ids=ids).last_hidden_state[0, -1]
                assert hidden.shape == (64,)
                assert rollout.values[b, t].item() == pytest.approx(learner.actor.value_head(hidden).item(), abs=1e-4)
    frozen = [weight for weight in learner.actor.critic.layers[0].parameters() if not weight.requires_grad]
    assert bool(frozen) == bool(options)
    critic = [weight.detach().clone() for weight in learner.actor.critic.parameters()]
    learner.learn(64)
    assert any(not torch.equal(*pair) for pair in zip(critic, learner.actor.critic.parameters(), strict=True))
    assert_equal_weights(before, dict(reward_model.model.state_dict()))


@pytest.mark.parametrize(
    ("reward_model", "message"),
    [
        (
            lambda prompts, completions: [0.0] * len(prompts),
            r"needs a reward model that is a decoder .*, got <lambda>\.",
        ),
        (lambda: wide_reward_model(words=("<eos>", *reversed(WORDS[1:]))), "got 'unnamed', which has others"),
        (lambda: short_reward_model(), r"and reads \d+ of them, got one of 4"),
    ],
    ids=["rule", "other tokens", "short"],
)
def test_a_reward_model_that_cannot_become_the_value_function_is_refused(agent, reward_model, message):
    made = reward_model() if not reward_model.__code__.co_argcount else reward_model
    textenv.register_reward_model("other", made)
    with pytest.raises(ValueError, match=f"{message}.*Use value_function='trunk'"):
        agent(env_options={"reward_model": "other", "max_new_tokens": 3}, value_function="reward-model")


@pytest.mark.parametrize(("target_kl", "passes"), [(None, 4), (1e-9, 1), (1e9, 4)])
def test_passes_over_a_batch_end_once_the_policy_is_too_far_from_the_one_that_drew_it(agent, target_kl, passes):
    learner, steps = agent(learning_rate=1e-2, epochs=4, minibatches=2, target_kl=target_kl), []
    step = learner.step
    learner.step = lambda *args: steps.append(args) or step(*args)
    learner.update(learner.collect())
    assert len(steps) == 2 * passes


def seen_lengths(learner):
    """The lengths of the episodes of each pass that trains, from now on."""
    sizes, evaluate = [], learner.actor.evaluate

    def spy(batch, *args, **options):
        sizes.append(batch.total_lengths)
        return evaluate(batch, *args, **options)

    learner.actor.evaluate = spy
    return sizes


def test_passes_of_few_tokens_have_the_gradient_of_one_pass(agent):
    gradients, passes = [], []
    for most in (10_000, 20, 1):
        learner = agent(tiny_model(seed=5), learning_rate=0.0, epochs=1, minibatches=1, max_tokens_per_pass=most)
        sizes = seen_lengths(learner)
        learner.update(learner.collect())
        assert all(len(lengths) == 1 or lengths.sum() <= most for lengths in sizes)
        passes.append(len(sizes))
        gradients.append(torch.cat([weight.grad.flatten() for weight in learner.policy.model.parameters()]))
    assert passes[0] == 1 < passes[1] < passes[2] == 32
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-6, rtol=1e-4)


def after_a_value_loss_alone(agent, **config):
    """Which weights a batch without advantages has moved: ``(policy, critic of its own, value head)``."""
    learner = agent(tiny_model(seed=5), learning_rate=1e-2, minibatches=1, **config)
    nets = learner.actor.model, learner.actor.critic or torch.nn.Module(), learner.actor.value_head
    before = [[weight.detach().clone() for weight in net.parameters()] for net in nets]
    rollout = learner.collect()
    targets = learner.advantages(rollout)
    for _ in range(2):  # the first step moves the output of the head, which starts at 0
        learner.step(rollout, targets._replace(advantages=torch.zeros_like(rollout.values)), torch.arange(32))
    after = [list(net.parameters()) for net in nets]
    return [any(not torch.equal(*pair) for pair in zip(*both, strict=True)) for both in zip(before, after, strict=True)]


@pytest.mark.parametrize(
    ("value_function", "moved"), [("head", [0, 0, 1]), ("shared", [1, 0, 1]), ("trunk", [0, 1, 1])]
)
def test_the_value_loss_trains_the_policy_only_where_they_share_a_trunk(agent, value_function, moved):
    assert after_a_value_loss_alone(agent, value_function=value_function, entropy_coef=0.0) == moved


def test_the_value_head_learns_at_its_own_rate_which_falls_with_that_of_the_policy(agent):
    for config, expected in (({}, 0.01), ({"value_learning_rate": 0.5}, 0.5)):
        learner = agent(learning_rate=0.001, lr_decay_episodes=64, **config)
        rates = []
        for _ in range(2):
            learner.learn(32)
            rates.append([group["lr"] for group in learner.optimizer.param_groups[::2]])  # matrices, then vectors
        assert rates == [pytest.approx([0.001, expected]), pytest.approx([0.0005, expected / 2])]


def test_the_gradient_of_the_values_does_not_shrink_that_of_the_policy(agent):
    gradients = []
    for value_coef in (0.0, 1e6):
        learner = agent(tiny_model(seed=5), learning_rate=0.0, value_coef=value_coef, max_grad_norm=0.1, seed=3)
        learner.update(learner.collect())
        gradients.append(torch.cat([weight.grad.flatten() for weight in learner.policy.model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_the_rewards_a_learner_sees_are_score_minus_beta_kl_on_the_last_token(agent):
    from textenv.scoring import spread_kl

    learner = agent(tiny_model(seed=5))
    rollout = learner.collect()
    assert (rollout.kl_per_token.sum(1).abs() > 0.01).float().mean() > 0.9
    torch.testing.assert_close(rollout.scores, rollout.rm_scores, atol=1e-4, rtol=0)
    lengths = rollout.tokens.response_lengths
    for per_token in (False, True):
        rewards = spread_kl(rollout.scores, rollout.kl_per_token, 0.1, lengths, per_token=per_token)
        torch.testing.assert_close(rewards.sum(1), rollout.rewards, atol=1e-5, rtol=0)
        after = torch.arange(rewards.shape[1]) >= lengths[:, None]
        assert (rewards[after] == 0).all()
        before = torch.arange(rewards.shape[1]) < (lengths - 1)[:, None]
        if not per_token:
            assert (rewards[before] == 0).all()
        else:
            torch.testing.assert_close(rewards[before], -0.1 * rollout.kl_per_token[before])


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
