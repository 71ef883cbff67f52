"""The loop that all learners share: the gradient clip, the decay of the learning rate, what is logged."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

from agents import GRPO, PPO, RLOO, OnlineDPO, Reinforce
from agents.logs.figures import rollout_log
from tests.conftest import tiny_model
from textenv.scoring import ReturnUnit

LEARNERS = [PPO, RLOO, GRPO, Reinforce, OnlineDPO]


@pytest.fixture
def learner(make_vector):
    def make(kind, policy=None, **config):
        settings = {"batch_size": 16, "learning_rate": 3e-3, "epochs": 1, "minibatches": 1, **config}
        return kind(make_vector(16).unwrapped, kind.config_type(**settings), policy)

    return make


def flat_gradient(agent):
    return torch.cat([p.grad.flatten() for p in agent.policy.model.parameters() if p.grad is not None])


def flat_weights(net):
    return torch.cat([p.detach().flatten().clone() for p in net.parameters()])


def rollout_returns(agent):
    """What the environment paid in the last batch."""
    return agent._played.rewards.numpy()


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_gradient_over_the_limit_is_scaled_down_to_it_and_the_log_has_its_norm_before(learner, kind):
    free = learner(kind, tiny_model(seed=5), max_grad_norm=1e6)
    log = free.update(free.collect())
    norm = float(flat_gradient(free).norm())
    assert log["grad_norm"] == pytest.approx(norm, rel=1e-5)
    held = learner(kind, tiny_model(seed=5), max_grad_norm=norm / 4)
    log = held.update(held.collect())
    assert log["grad_norm"] == pytest.approx(norm, rel=1e-5)
    torch.testing.assert_close(flat_gradient(held), flat_gradient(free) / 4, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_rollout_finds_no_gradient_of_the_last_update_in_memory(learner, kind):
    agent = learner(kind)
    agent.update(agent.collect())
    assert len(flat_gradient(agent))
    agent.collect()
    assert all(weight.grad is None for weight in agent.actor.parameters())


@pytest.mark.parametrize("kind", LEARNERS)
def test_the_learning_rate_falls_linearly_to_zero_and_stays_there(learner, kind):
    agent = learner(kind, lr_decay_episodes=4 * 16, learning_rate=0.8e-3)
    weights = [flat_weights(agent.learn(16).actor) for _ in range(6)]
    assert [log["learning_rate"] for log in agent.history] == pytest.approx([8e-4, 6e-4, 4e-4, 2e-4, 0, 0])
    moved = [not torch.equal(one, other) for one, other in itertools.pairwise(weights)]
    assert moved == [True, True, True, False, False]


def test_the_rate_rises_to_its_peak_over_the_warm_up_from_the_first_update_on_and_then_follows_the_schedule(learner):
    """A warm-up of half of eight updates: ¼, ½, ¾ and 1 of the peak at the end of each; then four parts of a cosine."""
    agent = learner(RLOO, lr_decay_episodes=8 * 16, warmup_ratio=0.5, lr_schedule="cosine", learning_rate=1e-3)
    falling = [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    expected = [0.25, 0.5, 0.75, 1.0, *falling, 0.0]
    assert [1e3 * log["learning_rate"] for log in agent.learn(9 * 16).history] == pytest.approx(expected, abs=1e-9)
    one = learner(RLOO, lr_decay_episodes=16, warmup_ratio=0.99, learning_rate=1e-3).learn(48)
    assert [log["learning_rate"] for log in one.history][::2] == [1e-3, 0.0]


@pytest.mark.parametrize(("decay", "rates"), [(1, [1, 0]), (24, [1, 1 / 3]), (40, [1, 0.6, 0.2, 0])])
def test_a_schedule_need_not_be_whole_updates(learner, decay, rates):
    agent = learner(PPO, lr_decay_episodes=decay, learning_rate=1e-3).learn(len(rates) * 16)
    assert [1e3 * log["learning_rate"] for log in agent.history] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("changed", "what"),
    [({"warmup_ratio": 0.1}, "warmup_ratio 0.1"), ({"lr_schedule": "cosine"}, "lr_schedule 'cosine'")],
)
def test_a_warm_up_or_a_cosine_needs_episodes_to_span(changed, what):
    rule = f"lr_decay_episodes must be given with {what}, which it spans, got None. Give the episodes of the run"
    with pytest.raises(ValueError, match=rule):
        RLOO.config_type(**changed)
    RLOO.config_type(lr_schedule="constant")
    RLOO.config_type(**changed, lr_decay_episodes=1)


@pytest.mark.parametrize("kind", LEARNERS)
def test_without_weight_decay_a_learner_takes_the_steps_of_adam_bit_for_bit(learner, kind):
    """Those of PyTorch's Adam over the same weights, the value head at ten times the rate."""
    ours, other = (learner(kind, tiny_model(seed=5), max_grad_norm=0.5) for _ in range(2))
    groups = [{"params": part, "peak": rate} for part, rate in zip(other.parts, (3e-3, 3e-2), strict=False)]
    other.optimizer = torch.optim.Adam(groups, fused=True)
    assert torch.equal(flat_weights(ours.learn(48).actor), flat_weights(other.learn(48).actor))
    assert not torch.equal(flat_weights(ours.actor), flat_weights(learner(kind, tiny_model(seed=5)).actor))


def test_weight_decay_shrinks_the_matrices_of_policy_and_value_head_at_their_own_rates(learner):
    """Decoupled: what it changes is −rate · decay · weight, whatever the gradient is."""
    agents = [learner(PPO, tiny_model(seed=5), weight_decay=decay, learning_rate=1e-2) for decay in (0.0, 0.5)]
    before = [weight.detach().clone() for weight in agents[0].actor.parameters()]
    plain, decayed = (list(agent.learn(16).actor.parameters()) for agent in agents)
    head = {id(weight) for weight in agents[0].actor.value_head.parameters()}
    for start, one, other in zip(before, plain, decayed, strict=True):
        shrunk = start * 0.5 * (0.1 if id(one) in head else 0.01) * (start.ndim > 1)
        torch.testing.assert_close(one - other, shrunk, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("value_function", ["head", "shared", "trunk"])
@pytest.mark.parametrize("kind", [PPO, Reinforce])
def test_the_first_updates_train_the_value_function_alone(learner, kind, value_function):
    agent = learner(kind, critic_warmup=2, value_function=value_function, entropy_coef=0.1, kl_target=1e-3)
    first = flat_weights(agent.actor.model)
    heads = [flat_weights(agent.actor.value_head)]
    for _ in range(2):
        log = agent.learn(16).history[-1]
        heads.append(flat_weights(agent.actor.value_head))
        assert torch.equal(flat_weights(agent.actor.model), first)
        assert not torch.equal(*heads[-2:])
        assert not any(agent.optimizer.state[weight] for weight in agent.actor.model.parameters())
        assert abs(log["kl"]) < 1e-5
        assert agent.env.kl_coef == 0.1  # a KL of 0 says nothing yet
    agent.learn(16)
    assert not torch.equal(flat_weights(agent.actor.model), first)
    assert agent.env.kl_coef < 0.1


@pytest.mark.parametrize(("kind", "options"), [(RLOO, {}), (Reinforce, {}), (Reinforce, {"per_token_kl": False})])
def test_scaled_rewards_divide_the_gradient_by_the_deviation_of_the_returns_and_leave_the_log_as_it_was(
    learner, kind, options
):
    """Score and KL alike, so the direction stays: β keeps its meaning."""
    agents = [
        learner(kind, tiny_model(seed=5), max_grad_norm=None, learning_rate=0.0, scale_rewards=scaled, **options)
        for scaled in (False, True)
    ]
    returns = []
    for _ in range(3):  # the deviation is that of all batches so far
        logs = [agent.learn(16).history[-1] for agent in agents]
        returns.append(rollout_returns(agents[0]))
        plain, scaled = map(flat_gradient, agents)
        torch.testing.assert_close(scaled * np.concatenate(returns).std(), plain, atol=1e-6, rtol=1e-4)
        for name in ("reward", "rm_score", "kl", "kl_coef"):
            assert logs[0][name] == logs[1][name]


def test_the_unit_of_returns_that_are_all_alike_is_one():
    unit = ReturnUnit()
    assert [unit.after(torch.full((3,), 2.0)), unit.after(torch.full((1,), 2.0))] == [1.0, 1.0]
    assert unit.after(torch.tensor([6.0, 2.0])) == pytest.approx(np.std([2, 2, 2, 2, 6, 2]))


def test_scaling_whitened_advantages_changes_the_values_alone(learner):
    agents = [
        learner(PPO, tiny_model(seed=5), learning_rate=0.0, scale_rewards=scaled, max_grad_norm=None)
        for scaled in (False, True)
    ]
    plain, scaled = [agent.learn(16).history[0] for agent in agents]
    torch.testing.assert_close(*map(flat_gradient, agents), atol=1e-6, rtol=1e-4)
    unit = rollout_returns(agents[0]).std()
    assert plain["value_loss"] == pytest.approx(scaled["value_loss"] * unit**2, rel=1e-4)
    assert plain["explained_variance"] == pytest.approx(scaled["explained_variance"], abs=1e-5)


def test_without_a_decay_the_learning_rate_stays(learner):
    agent = learner(PPO, learning_rate=0.8e-3).learn(3 * 16)
    assert [log["learning_rate"] for log in agent.history] == [0.8e-3] * 3


def test_the_logged_k1_and_k3_are_those_of_plain_forward_passes(learner):
    agent = learner(PPO, tiny_model(seed=5))
    policy, reference = copy.deepcopy(agent.policy.model), agent.env.reference.model
    rollout = agent.collect()
    tokens, k1, k3 = rollout.tokens, [], []
    for b in range(16):
        prompt = tokens.prompt_ids[b, -int(tokens.prompt_lengths[b]) :]
        response = tokens.response_ids[b, : int(tokens.response_lengths[b])]
        ids = torch.cat([prompt, response])[None]
        with torch.no_grad():
            own, ref = (m(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (policy, reference))
        d = (own - ref).gather(1, response[:, None]).double()
        k1.append(float(d.sum()))
        k3.append(float(((-d).exp() - 1 + d).sum()))
    log = rollout_log(rollout)
    assert log["kl"] == pytest.approx(np.mean(k1), rel=1e-4)
    assert log["kl_k3"] == pytest.approx(np.mean(k3), rel=1e-4)
    assert min(k1) < 0 < min(k3)  # so that the two are told apart
    assert log["nll"] == pytest.approx(-float(rollout.logprobs.sum() / tokens.response_lengths.sum()), rel=1e-5)
