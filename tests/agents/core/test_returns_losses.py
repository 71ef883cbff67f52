"""Advantages and losses against their definitions; poisoned padding; finite differences."""

import math

import pytest
import torch

from agents.core.losses import ppo_policy_loss, value_loss
from agents.core.returns import generalized_advantages, masked_mean, whiten

POISON = (float("nan"), 1e6, -1e6, float("inf"))
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])


def numbers(seed=0):
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def poisoned(x, poison):
    return torch.where(MASK, x, poison)


def test_advantages_equal_the_double_sum_of_their_definition():
    rewards, values, gamma, lam = numbers(1), numbers(2), 0.9, 0.7
    got = generalized_advantages(rewards, values, MASK, gamma=gamma, lam=lam)
    for row, length in enumerate([5, 3, 1]):
        v = [*values[row, :length].tolist(), 0.0]
        deltas = [float(rewards[row, t]) + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            want = sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t))
            assert float(got.advantages[row, t]) == pytest.approx(want)
            assert float(got.returns[row, t]) == pytest.approx(want + v[t])


def test_with_lambda_one_the_return_is_the_sum_of_what_is_still_to_come():
    rewards, values = numbers(1), numbers(2)
    got = generalized_advantages(rewards, values, MASK, gamma=1.0, lam=1.0)
    for row, length in enumerate([5, 3, 1]):
        for t in range(length):
            assert float(got.returns[row, t]) == pytest.approx(float(rewards[row, t:length].sum()))


@pytest.mark.parametrize("poison", POISON)
def test_poisoned_padding_leaves_advantages_whitening_and_losses_bit_identical(poison):
    rewards, values, old, new = numbers(1), numbers(2), numbers(3) * 0.1, numbers(4) * 0.1
    clean = generalized_advantages(rewards, values, MASK, lam=0.8)
    dirty = generalized_advantages(poisoned(rewards, poison), poisoned(values, poison), MASK, lam=0.8)
    for one, other in zip(clean, dirty, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(whiten(rewards, MASK), whiten(poisoned(rewards, poison), MASK))
    assert torch.equal(masked_mean(rewards, MASK), masked_mean(poisoned(rewards, poison), MASK))

    def losses(spoil):
        leaf = new.clone().requires_grad_()
        options = {"clip_range": 0.05, "normalizer": 9, "dual_clip": 1.01}
        policy = ppo_policy_loss(spoil(leaf), spoil(old), spoil(rewards), MASK, **options)
        value = value_loss(spoil(leaf), spoil(old), spoil(values), MASK, clip_range=0.05, normalizer=9)
        (policy.loss + value).backward()
        return [policy.loss, *policy.log.values(), value, leaf.grad]

    for one, other in zip(losses(lambda x: x), losses(lambda x: poisoned(x, poison)), strict=True):
        assert torch.equal(one, other)


def test_whitening_gives_mean_zero_and_variance_one_over_the_real_tokens():
    out = whiten(numbers(1) * 7 + 3, MASK)
    assert float(out[MASK].mean()) == pytest.approx(0.0, abs=1e-7)
    assert float(out[MASK].var(unbiased=False)) == pytest.approx(1.0, abs=1e-6)
    assert (out[~MASK] == 0).all()


def test_the_clipped_surrogate_of_hand_made_ratios():
    """Ratios 1.5, 0.5 with ε = 0.2: a good action stops paying at 1.2, a bad one stops costing at 0.8."""
    old = torch.zeros(1, 4)
    new = torch.tensor([[math.log(1.5), math.log(0.5), math.log(1.5), math.log(0.5)]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    out = ppo_policy_loss(new, old, advantages, torch.ones(1, 4, dtype=torch.bool), clip_range=0.2, normalizer=4)
    assert float(out.loss) == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8) / 4)
    assert float(out.log["clip_fraction"]) == 1.0
    # k3 of (old ‖ new): ratio − 1 − log ratio
    k3 = [1.5 - 1 - math.log(1.5), 0.5 - 1 - math.log(0.5)]
    assert float(out.log["approx_kl"]) == pytest.approx(sum(k3) / 2)


def test_the_value_loss_of_hand_made_values():
    values, old, returns = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert float(value_loss(values, old, returns, mask, normalizer=2)) == pytest.approx(0.5 * (4 + 1) / 2)
    # held within 0.5 of the old value: 0.5 → error 2.5² = 6.25 > 4
    held = value_loss(values, old, returns, mask, clip_range=0.5, normalizer=2)
    assert float(held) == pytest.approx(0.5 * (6.25 + 1) / 2)


@pytest.mark.parametrize("loss", ["policy", "value", "value-clipped"])
def test_gradients_agree_with_finite_differences(loss):
    old, target = numbers(3) * 0.1, numbers(5)

    def value(x):
        if loss == "policy":
            return ppo_policy_loss(x, old, target, MASK, clip_range=0.2, normalizer=9).loss
        clip_range = 0.05 if loss == "value-clipped" else None
        return value_loss(x, old, target, MASK, clip_range=clip_range, normalizer=9)

    assert torch.autograd.gradcheck(value, (numbers(4).mul(0.1).requires_grad_(),))


def test_splitting_a_batch_changes_no_gradient_when_the_normalizer_is_the_whole():
    new, old, advantages = numbers(4) * 0.1, numbers(3) * 0.1, numbers(1)

    def gradient(parts):
        leaf = new.clone().requires_grad_()
        for part in parts:
            rows = leaf[part], old[part], advantages[part], MASK[part]
            policy = ppo_policy_loss(*rows, clip_range=0.2, normalizer=9.0).loss
            (policy + value_loss(*rows, normalizer=9.0)).backward()
        return leaf.grad

    whole = gradient([[0, 1, 2]])
    torch.testing.assert_close(gradient([[0], [1], [2]]), whole, atol=1e-15, rtol=0)
    torch.testing.assert_close(gradient([[2, 0], [1]]), whole, atol=1e-15, rtol=0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "plain", "dual", "slope"),
    [  # ε = 0.2, c = 3; the slope is that of the dual surrogate, ρ Â or 0
        (5.0, -2.0, -10.0, -6.0, 0.0),
        (3.1, -2.0, -6.2, -6.0, 0.0),
        (2.9, -2.0, -5.8, -5.8, -5.8),
        (1.0, -2.0, -2.0, -2.0, -2.0),
        (0.5, -2.0, -1.6, -1.6, 0.0),
        (5.0, 2.0, 2.4, 2.4, 0.0),
        (0.5, 2.0, 1.0, 1.0, 1.0),
        (5.0, 0.0, 0.0, 0.0, 0.0),
    ],
)
def test_a_dual_clip_bounds_the_surrogate_of_negative_advantages_from_below(ratio, advantage, plain, dual, slope):
    real, zero = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.float64)
    leaf = (zero + math.log(ratio)).requires_grad_()
    options = {"clip_range": 0.2, "normalizer": 1}
    losses = [ppo_policy_loss(leaf, zero, zero + advantage, real, dual_clip=c, **options) for c in (None, 3.0)]
    assert [-loss.loss.item() for loss in losses] == pytest.approx([plain, dual])
    losses[1].loss.backward()
    assert -leaf.grad.item() == pytest.approx(slope)
    assert losses[0].log["clip_fraction"] == losses[1].log["clip_fraction"]
