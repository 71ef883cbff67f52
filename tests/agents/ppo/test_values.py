"""The value function of PPO: what it reads, what it trains, and how fast."""

import copy

import pytest
import torch

import textenv
from agents.core.returns import Advantages
from agents.logs.figures import explained_variance
from tests.agents.ppo.conftest import assert_equal_weights, short_reward_model, wide_reward_model
from tests.conftest import WORDS, tiny_model


def test_the_explained_variance_is_that_of_the_values_that_were_held_while_playing(agent):
    learner = agent(tiny_model(seed=5), learning_rate=0.0, per_token_kl=False)
    rollout = learner.collect()
    assert learner.update(rollout)["explained_variance"] == pytest.approx(0.0, abs=1e-6)  # values of 0
    half = torch.where(rollout.tokens.response_mask, 0.5 * rollout.rewards[:, None], 0.0)
    # Half of every return is left over, and a quarter of the variance.
    assert learner.update(rollout._replace(values=half))["explained_variance"] == pytest.approx(0.75, abs=1e-5)


@pytest.mark.parametrize("reward", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_returns_that_are_alike_have_no_variance_to_explain(agent, reward, noise):
    """Rounding is no variance: an error of 0.1 over that of 1e-7 would be an explained variance of −1e12."""
    rollout = agent(tiny_model(seed=5)).collect()
    values = torch.randn(rollout.values.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    returns = reward * (1.0 + noise * torch.randn(values.shape, generator=torch.Generator().manual_seed(1)))
    targets = Advantages(torch.zeros_like(returns), returns)
    assert explained_variance(rollout._replace(values=values), targets) == {}
    far = targets._replace(returns=returns + values)  # whose variance is the values', and so is explained
    found = explained_variance(rollout._replace(values=values), far)
    assert found["explained_variance"] == pytest.approx(1.0, abs=1e-3)


def states(tokens):
    """``(b, t, ids [1, n])``: what stands before token t of response b, without padding."""
    for b, length in enumerate(tokens.response_lengths.tolist()):
        prompt = tokens.prompt_ids[b, -tokens.prompt_lengths[b] :]
        for t in range(length):
            yield b, t, torch.cat([prompt, tokens.response_ids[b, :t]])[None]


def test_a_critic_of_its_own_values_the_state_before_each_token(agent):
    learner = agent(tiny_model(seed=5), value_function="trunk")
    head = learner.actor.value_head
    with torch.no_grad():
        head.output.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    rollout = learner.collect()
    for b, t, before in states(rollout.tokens):
        with torch.no_grad():
            value = head(learner.actor.critic(input_ids=before).last_hidden_state[0, -1])
        assert rollout.values[b, t].item() == pytest.approx(value.item(), abs=1e-5)


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
    for b, t, ids in states(rollout.tokens):
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
