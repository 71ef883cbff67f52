"""The exact frontier of reward and KL, and best-of-n, against closed forms, other policies and sampling."""

import math

import numpy as np
import pytest
import torch

from tests.textenv.tasks.test_exact import random_policies
from textenv.lm import TokenRule
from textenv.tasks import micro
from textenv.tasks.exact import ExactWorld


def test_the_frontier_rises_with_falling_slope_and_ends_at_the_highest_reward(world):
    kls = np.linspace(0, 12, 60)
    rewards = np.array([world.frontier_reward_at(float(kl)) for kl in kls])
    assert rewards[0] == pytest.approx(world.expected_reward(world.ref_logprobs), abs=1e-6)
    assert rewards[-1] == pytest.approx(float(world.rewards.max(1).values.mean()), abs=1e-6)
    steps = np.diff(rewards)
    assert (steps >= -1e-9).all()
    assert (np.diff(steps) <= 1e-7).all()
    assert (steps[:12] > 1e-3).all()
    assert world.frontier_reward_at(-0.01) == pytest.approx(rewards[0], abs=1e-6)  # a noisy estimate


@pytest.mark.parametrize("kl_coef", [0.05, 0.1, 0.3, 1.0, 10.0])
def test_tilted_policies_lie_on_the_frontier(world, kl_coef):
    tilted = world.tilted(kl_coef)
    assert world.frontier_reward_at(world.kl(tilted)) == pytest.approx(world.expected_reward(tilted), abs=1e-9)


def test_every_other_policy_lies_under_the_frontier(world):
    below = 0
    for logprobs in random_policies(world, seed=1):
        gap = world.frontier_reward_at(world.kl(logprobs)) - world.expected_reward(logprobs)
        assert gap > -1e-8
        below += gap > 1e-3
    assert below >= 8


def coin(count=8):
    """A uniform model and a reward of 1 for the half of all responses that begin with d, e, f or g."""
    lm = micro.reference()
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.zero_()

    def heads(prompts, completions, **columns):
        return [float(text[:1] in tuple("defg")) for text in completions]

    return ExactWorld(lm, ["a"], heads, kl_coef=0.1, max_new_tokens=2, rule=TokenRule(stop_ids=(0,)))


def test_the_frontier_of_a_coin_is_its_binary_divergence():
    """The best policy at KL = q log 2q + (1−q) log 2(1−q) shows heads with probability q."""
    flat = coin()
    for q in (0.6, 0.8, 0.95):
        kl = q * math.log(2 * q) + (1 - q) * math.log(2 * (1 - q))
        assert flat.frontier_reward_at(kl) == pytest.approx(q, abs=1e-9)
    assert flat.frontier_reward_at(0.7) == 1.0  # log 2 = 0.693 nats buy all there is


def test_j_star_of_a_coin_is_its_closed_form():
    """J* = β log(½ + ½ e^{1/β}) with β = 0.1."""
    assert coin().optimum().objective == pytest.approx(0.1 * math.log(0.5 + 0.5 * math.exp(10)), abs=1e-12)


def test_best_of_16_coins_costs_069_nats_and_not_the_bound_of_184():
    """Heads with 1 − 2^−16: KL = log 2 − H(2^−16) = 0.6930; the bound says log 16 − 15/16 = 1.8351."""
    tails = 2.0**-16
    want = (1 - tails) * math.log(2 * (1 - tails)) + tails * math.log(2 * tails)
    got = coin().best_of_n(16)
    assert got.kl == pytest.approx(want, abs=1e-10)
    assert got.kl == pytest.approx(0.69, abs=0.01)
    assert got.expected_reward == pytest.approx(1 - tails, abs=1e-12)


def test_best_of_one_is_the_reference(world):
    got = world.best_of_n(1)
    assert (got.logprobs - world.ref_logprobs).abs().max() < 1e-9
    assert got.kl == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("n", [2, 4, 16, 64, 1000])
def test_best_of_n_is_a_distribution_below_bound_and_frontier(world, n):
    got = world.best_of_n(n)
    assert (got.logprobs.exp().sum(1) - 1).abs().max() < 1e-10
    assert 0 < got.kl < math.log(n) - (n - 1) / n
    assert got.expected_reward < world.frontier_reward_at(got.kl)


def test_best_of_n_without_ties_reaches_the_bound(world):
    """With a continuous score on many small responses, KL = log n − (n − 1)/n up to the largest probability."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(world.rewards.shape, generator=generator, dtype=torch.float64)
    flat = coin()
    scores = scores[:1, : flat.rewards.shape[1]]
    fine = flat.best_of_n(2, scores)
    assert fine.kl > 0.9 * (math.log(2) - 0.5)  # 57 equal cells: the bound is nearly met
    assert fine.kl < math.log(2) - 0.5
    tied = flat.best_of_n(2)
    assert tied.kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-10)  # two cells: it is not


def test_best_of_4_equals_drawing_four_and_keeping_the_best(world):
    rng = np.random.default_rng(0)
    got = world.best_of_n(4)
    for x in range(2):
        probs = world.ref_logprobs[x].exp().numpy()
        rewards = world.rewards[x].numpy()
        drawn = rng.choice(len(probs), size=(100_000, 4), p=probs / probs.sum())
        kept = drawn[np.arange(len(drawn)), rewards[drawn].argmax(1)]  # first drawn among ties
        exact = got.logprobs[x].exp().numpy()
        mean, error = rewards[kept].mean(), rewards[kept].std() / math.sqrt(len(kept))
        assert abs(mean - exact @ rewards) < 4 * error
        common = exact > 2e-3
        assert common.sum() > 20
        seen = np.bincount(kept, minlength=len(probs)) / len(kept)
        z = (seen - exact) / np.sqrt(exact * (1 - exact) / len(kept))
        assert np.abs(z[common]).max() < 4.5
