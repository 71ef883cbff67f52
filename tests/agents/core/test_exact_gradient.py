"""The gradient of PPO's surrogate, summed over every response, equals the exact gradient of the objective.

With each response weighted by its probability nothing is estimated: at ratio 1 the surrogate's gradient must be −∇J to
rounding, for λ = 1 with any baseline and for any λ with the exact values. Rewards, advantages, log-probabilities and
loss are those of the package; ∇J comes from automatic differentiation of the enumerated J, which knows none of them.
Runs that converge prove less: many of the mistakes below still learn.
"""

import copy

import gymnasium
import pytest
import torch

from agents.core.losses import ppo_policy_loss
from agents.core.returns import generalized_advantages
from tests.conftest import kl_k2
from textenv.kl import kl_k1, kl_k3
from textenv.lm import Responses, ScalarHead, TokenRule, gather_predictions, pad_left, response_scores
from textenv.lm.packing import packed
from textenv.scoring import spread_kl
from textenv.tasks.exact import exact_world

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


@pytest.fixture(scope="module")
def world():
    """The exact world with a budget of three tokens: 400 responses per prompt are enough to tell right from wrong."""
    return exact_world(gymnasium.make("textenv/Micro-v0", max_new_tokens=3))


@pytest.fixture(scope="module")
def policy(world):
    return moved(world)


@pytest.fixture(scope="module")
def gradient(world, policy):
    return world.gradient(policy)


@pytest.fixture(scope="module")
def batch(world):
    return every_response(world)


def moved(world):
    """A copy of the reference with every weight moved, so that no KL is 0."""
    model = copy.deepcopy(world.reference.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    assert 0.02 < world.kl(world.sequence_logprobs(model)) < 0.5
    return model


def every_response(world):
    """Every response to every prompt, as the record that learners train on."""
    ids, lengths = pad_left([world.reference.encode_prompt(prompt) for prompt in world.prompts], 0)
    count = len(world.lengths)
    return Responses(
        ids.repeat_interleave(count, 0),
        lengths.repeat_interleave(count),
        world.response_ids.repeat(len(lengths), 1),
        world.lengths.repeat(len(lengths)),
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_passes_of_these_tests_have_no_padding(policy, batch, dtype):
    assert packed(copy.deepcopy(policy).to(dtype), batch)


def random_values(model, batch):
    """An arbitrary baseline: a random head on the trunk, a function of the state and of nothing else."""
    hidden = response_scores(model, batch, TokenRule(stop_ids=(0,))).hidden
    head = ScalarHead(hidden.shape[1]).to(hidden.dtype)
    torch.nn.init.normal_(head.linear.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return gather_predictions(head(hidden), batch)


def exact_values(world, model, *, per_token_kl):
    return world.values(world.token_logprobs(model), per_token_kl=per_token_kl).flatten(0, 1)


def surrogate_gradient(
    world,
    policy,
    batch,
    dtype=torch.float64,
    *,
    lam=1.0,
    per_token_kl=False,
    exact_baseline=False,
    # What the mutants change:
    gamma=1.0,
    kl_coef=0.3,
    estimator=kl_k1,
    mean_kl=False,
    score_shift=0,
    advantage_shift=0,
    eos_counts=True,
    temperature=1.0,
):
    """The gradient that a PPO update sees before its first step, in expectation; flat, of the *loss*."""
    model = copy.deepcopy(policy).to(dtype)
    rule = TokenRule(stop_ids=(0,), temperature=temperature)
    lengths, mask = batch.response_lengths, batch.response_mask
    logprobs = gather_predictions(response_scores(model, batch, rule).logprobs, batch)
    with torch.no_grad():
        reference = copy.deepcopy(world.reference.model).to(dtype)
        ref_logprobs = gather_predictions(response_scores(reference, batch, TokenRule(stop_ids=(0,))).logprobs, batch)
        kl = torch.from_numpy(estimator(logprobs.detach().numpy(), ref_logprobs.numpy()))
        if mean_kl:
            kl = kl / lengths[:, None]
        values = (
            exact_values(world, policy, per_token_kl=per_token_kl) if exact_baseline else random_values(model, batch)
        )
        scores = world.rewards.flatten().to(dtype)
        rewards = spread_kl(scores, kl, kl_coef, lengths, per_token=per_token_kl)
        if score_shift:
            alone = spread_kl(scores, torch.zeros_like(kl), 0.0, lengths, per_token=False)
            rewards = rewards - alone + shifted(alone, score_shift)
        advantages, _ = generalized_advantages(rewards, values.to(dtype), mask, gamma=gamma, lam=lam)
        advantages = shifted(advantages, advantage_shift)
        # In place of sampling: each response counts with its probability, each prompt alike.
        weight = world.sequence_logprobs(policy).exp().flatten() / len(world.prompts)
        advantages = advantages * weight[:, None].to(dtype)
    if not eos_counts:
        mask = mask & (batch.response_ids != 0)
    loss = ppo_policy_loss(logprobs, logprobs.detach(), advantages, mask, clip_range=0.2, normalizer=1.0).loss
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))]).double()


def shifted(x, steps):
    """Columns moved right by ``steps``; what leaves the row is lost."""
    moved = torch.zeros_like(x)
    width = x.shape[1] - abs(steps)
    moved[:, max(steps, 0) :][:, :width] = x[:, max(-steps, 0) :][:, :width]
    return moved


def relative_error(got, gradient):
    """‖g + ∇J‖ / ‖∇J‖: the loss falls where the objective rises."""
    return float((got + gradient).norm() / gradient.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("per_token_kl", [False, True], ids=["terminal KL", "KL per token"])
@pytest.mark.parametrize(
    ("lam", "exact_baseline"), [(1.0, False), (0.9, True)], ids=["λ=1, any baseline", "λ=0.9, exact values"]
)
def test_the_surrogate_has_the_exact_gradient(world, policy, batch, gradient, dtype, per_token_kl, lam, exact_baseline):
    got = surrogate_gradient(
        world, policy, batch, dtype, lam=lam, per_token_kl=per_token_kl, exact_baseline=exact_baseline
    )
    error = relative_error(got, gradient)
    assert error < TOLERANCE[dtype]


def test_bootstrapping_from_wrong_values_has_another_gradient(world, policy, batch, gradient):
    """λ < 1 trusts the values: with an arbitrary baseline it is biased, so the case above does test them."""
    assert relative_error(surrogate_gradient(world, policy, batch, lam=0.9), gradient) > 1e-2


MUTANTS = {
    "EOS masked out of the loss": {"eos_counts": False},
    "score one token early": {"score_shift": -1},
    "score one token late": {"score_shift": 1},
    "advantages one token late": {"advantage_shift": 1},
    "advantages one token early": {"advantage_shift": -1},
    "policy scored at temperature 0.9": {"temperature": 0.9},
    "k2 in the reward": {"estimator": kl_k2},
    "k3 in the reward": {"estimator": kl_k3},
    "β 10 % too high": {"kl_coef": 0.33},
    "KL averaged over the length": {"mean_kl": True},
    "γ = 0.99": {"gamma": 0.99},
}


@pytest.mark.parametrize("per_token_kl", [False, True], ids=["terminal KL", "KL per token"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_known_mistake_has_another_gradient(world, policy, batch, gradient, mutant, per_token_kl):
    got = surrogate_gradient(world, policy, batch, per_token_kl=per_token_kl, **MUTANTS[mutant])
    error = relative_error(got, gradient)
    # γ = 0.99 discounts but three steps here and has the smallest error, about 1 %; all others have 4 % or more.
    assert error > (5e-3 if "gamma" in MUTANTS[mutant] else 1e-2)


def test_the_mutants_that_shift_do_shift():
    rows = torch.tensor([[1.0, 2.0, 3.0]])
    assert [shifted(rows, steps).tolist()[0] for steps in (-1, 0, 1)] == [[2, 3, 0], [1, 2, 3], [0, 1, 2]]


def test_the_registered_world_has_the_exact_gradient_in_the_precision_it_is_trained_in():
    """All 6 × 2,801 responses of textenv/Micro-v0 in float32."""
    whole = exact_world(gymnasium.make("textenv/Micro-v0"))
    policy = moved(whole)
    got = surrogate_gradient(whole, policy, every_response(whole), torch.float32)
    assert relative_error(got, whole.gradient(policy)) < 1e-4
