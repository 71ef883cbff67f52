"""Each learner's gradient, summed over every batch that it could draw, against the exact gradient of the objective.

All pairs of responses to each prompt are enumerated and weighted by their probability: groups, baselines, advantages
and losses are the learners' own, ∇J is that of the enumerated J, and nothing is estimated.
"""

import itertools

import gymnasium
import pytest
import torch

from agents.core.learner import MicroBatch
from agents.core.rollout import Rollout
from agents.grpo import GRPO, GRPOConfig
from agents.reinforce import Reinforce, ReinforceConfig, policy_gradient_loss
from agents.rloo import RLOO, RLOOConfig
from tests.agents.core.test_exact_gradient import every_response, moved, relative_error
from textenv.lm.load import wrap_language_model
from textenv.tasks.exact import exact_world

PLAIN = {"normalize_std": False, "normalize_length": False}


@pytest.fixture(scope="module")
def world():
    """The exact world with a budget of two tokens: 57 responses, 3,249 pairs of them a prompt."""
    return exact_world(gymnasium.make("textenv/Micro-v0", max_new_tokens=2))


@pytest.fixture(scope="module")
def policy(world):
    return moved(world)


@pytest.fixture(scope="module")
def gradient(world, policy):
    return world.gradient(policy)


@pytest.fixture
def learner(world, policy):
    def make(kind, config):
        env = gymnasium.make_vec("textenv/Micro-v0", num_envs=4, max_new_tokens=2).unwrapped
        copy = wrap_language_model(moved(world), world.reference.tokenizer)
        agent = kind(env, config, copy)
        agent.actor.double()
        return agent

    return make


def every_group(world, policy, size, kl_coef=0.3):
    """Every tuple of ``size`` responses to each prompt as one rollout, which response each row is, and its probability.

    A row's weight is that of its tuple, shared by the rows of the tuple and by the prompts.
    """
    prompts, count = world.rewards.shape
    tuples = torch.tensor(list(itertools.product(range(count), repeat=size)))
    row = (torch.arange(prompts)[:, None] * count + tuples.flatten()).flatten()
    token_logprobs = world.token_logprobs(policy).flatten(0, 1)
    kl = token_logprobs - world.ref_token_logprobs.flatten(0, 1)
    rewards = world.rewards.flatten() - kl_coef * kl.sum(1)
    probability = token_logprobs.sum(1).exp().view(prompts, count)
    weight = probability[:, tuples].prod(2) / prompts / size
    batch = every_response(world)
    rollout = Rollout(
        tokens=type(batch)(*(field[row] for field in batch)),
        logprobs=token_logprobs[row],
        values=torch.zeros_like(kl[row]),
        rewards=rewards[row],
        kl_per_token=kl[row],
        kl_coef=kl_coef,
        rm_scores=world.rewards.flatten()[row],
        gold=None,
        prompt_indices=row // count,
        ended=torch.ones_like(row, dtype=torch.bool),
        truncated=torch.zeros_like(row, dtype=torch.bool),
    )
    return rollout, row, weight.flatten().repeat_interleave(size)


def expected_gradient(agent, world, policy, *, size=1, kl_coef=0.3):
    """The gradient of the learner's loss, in expectation over all that it could have drawn; flat.

    Rows of one response are added up before the forward pass: at ratio 1 the loss is linear in the advantages.
    """
    rollout, row, weight = every_group(world, policy, size, kl_coef)
    batch = every_response(world)
    new = agent.actor.evaluate(batch, agent.task)
    values = new.values.detach()
    advantages = agent.advantages(rollout._replace(values=values[row])).advantages
    total = torch.zeros_like(values).index_add(0, row, advantages * weight[:, None])
    mask = batch.response_mask
    old = MicroBatch(new.logprobs.detach(), values, total, torch.zeros_like(values), mask, tokens=1, episodes=1)
    parameters = list(agent.policy.model.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(agent.loss(new, old).loss, parameters)])


def direction(vector):
    return vector / vector.norm()


@pytest.mark.parametrize(
    ("kind", "config", "factor"),
    [
        (RLOO, RLOOConfig(group_size=2), 1.0),
        (GRPO, GRPOConfig(group_size=2, **PLAIN), 0.5),  # (K − 1)/K: the mean holds the response itself
    ],
)
def test_group_baselines_leave_the_exact_gradient(learner, world, policy, gradient, kind, config, factor):
    got = expected_gradient(learner(kind, config), world, policy, size=2)
    # The loss is divided by the budget of two tokens.
    assert relative_error(got * 2 / factor, gradient) < 1e-9


@pytest.mark.parametrize("per_token_kl", [False, True], ids=["terminal KL", "KL per token"])
def test_reinforce_has_the_exact_gradient_with_any_values(learner, world, policy, gradient, per_token_kl):
    agent = learner(Reinforce, ReinforceConfig(per_token_kl=per_token_kl, value_coef=0.0))
    torch.nn.init.normal_(agent.actor.value_head.output.linear.weight, generator=torch.Generator().manual_seed(0))
    got = expected_gradient(agent, world, policy)
    assert relative_error(got * 2, gradient) < 1e-9


@pytest.mark.parametrize(("changed", "at_least"), [({"normalize_std": True}, 0.05), ({"normalize_length": True}, 0.05)])
def test_each_normalisation_of_grpo_turns_the_gradient(learner, world, policy, gradient, changed, at_least):
    agent = learner(GRPO, GRPOConfig(group_size=2, **{**PLAIN, **changed}))
    got = expected_gradient(agent, world, policy, size=2)
    assert (direction(got) + direction(gradient)).norm() > at_least


def test_groups_of_the_wrong_rows_or_no_kl_have_another_gradient(learner, world, policy, gradient, monkeypatch):
    agent = learner(RLOO, RLOOConfig(group_size=2))
    assert relative_error(expected_gradient(agent, world, policy, size=2, kl_coef=0.0) * 2, gradient) > 1e-2

    def strided(returns, size):
        return (returns.view(size, -1) - returns.view(size, -1).flip(0)).flatten()

    monkeypatch.setattr("agents.rloo.leave_one_out_advantages", strided)
    assert relative_error(expected_gradient(agent, world, policy, size=2) * 2, gradient) > 1e-2


def test_k3_in_the_loss_pulls_towards_another_divergence():
    """E_π[∇k3] with the samples held fixed is ∇KL(π_ref ‖ π): why the KL stays in the reward."""
    world = exact_world(gymnasium.make("textenv/Micro-v0", max_new_tokens=1))
    model = moved(world).double()
    parameters = list(model.parameters())
    logprobs, ref = world.differentiable_logprobs(model).sum(2), world.ref_logprobs
    prompts = len(world.prompts)

    def flat(loss):
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([grad.flatten() for grad in grads])

    k3 = (ref - logprobs).expm1() - (ref - logprobs)
    got = flat((logprobs.exp().detach() * k3).sum() / prompts)
    forward = flat((ref.exp() * (ref - logprobs)).sum() / prompts)
    wanted = flat((logprobs.exp() * (logprobs - ref)).sum() / prompts)
    torch.testing.assert_close(got, forward, atol=1e-12, rtol=1e-9)
    assert (got - wanted).norm() > 0.05 * wanted.norm()


@pytest.mark.parametrize("poison", [float("nan"), 1e6, float("inf")])
def test_poisoned_padding_leaves_the_plain_policy_gradient_bit_identical(poison):
    mask = torch.tensor([[True, True, True], [True, False, False]])
    generator = torch.Generator().manual_seed(0)
    advantages = torch.randn(2, 3, generator=generator)
    results = []
    for fill in (0.0, poison):
        leaf = torch.where(mask, torch.arange(6.0).view(2, 3), fill).requires_grad_()
        loss = policy_gradient_loss(leaf, torch.where(mask, advantages, fill), mask, normalizer=4)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    # −Σ Â log π over four real tokens
    sum_of_real = (advantages * torch.arange(6.0).view(2, 3))[mask].sum()
    torch.testing.assert_close(results[0][0], -sum_of_real / 4)
