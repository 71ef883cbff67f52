"""Ranking losses against numbers worked out by hand, identities and finite differences."""

import itertools
import math

import pytest
import torch

from reward_models.training.losses import plackett_luce_nll, ranking_nll


def full(scores):
    return torch.ones(len(scores), len(scores[0]), dtype=torch.bool)


def loss(scores, **options):
    return ranking_nll(torch.tensor(scores, dtype=torch.float64), full(scores), **options).mean().item()


def test_a_pair_has_the_bradley_terry_likelihood():
    # −log σ(1) = log(1 + e⁻¹) = 0.3132617; −log σ(−2) = log(1 + e²) = 2.1269280
    assert loss([[1.5, 0.5]]) == pytest.approx(0.3132617, abs=1e-6)
    assert loss([[1.5, 0.5], [0.0, 2.0]]) == pytest.approx((0.3132617 + 2.1269280) / 2, abs=1e-6)


def test_three_responses_make_three_pairs_of_equal_weight():
    # gaps 1, 2 and 1: (0.3132617 + 0.1269280 + 0.3132617) / 3
    assert loss([[2.0, 1.0, 0.0]]) == pytest.approx(0.2511505, abs=1e-6)


def test_equal_scores_cost_log_two_whatever_k():
    for k in (2, 3, 5):
        assert loss([[0.7] * k]) == pytest.approx(math.log(2))


def test_a_margin_is_taken_from_every_gap():
    # gap 1 − margin 3 = −2
    assert loss([[1.0, 0.0]], margin=torch.tensor([3.0])) == pytest.approx(2.1269280, abs=1e-6)


def test_a_tie_is_half_a_win_each_way_and_no_margin_is_taken_from_it():
    # The tie, gap 1: 0.3132617 + 1/2. The others, gaps 2 − 3 and 1 − 3: log(1 + e) = 1.3132617 and 2.1269280.
    ranks, margin = torch.tensor([[0, 0, 1]]), torch.tensor([3.0])
    expected = (0.8132617 + 1.3132617 + 2.1269280) / 3
    assert loss([[2.0, 1.0, 0.0]], ranks=ranks, margin=margin) == pytest.approx(expected, abs=1e-6)


def test_ties_of_strength_one_are_davidsons():
    # 1 + e⁻¹ + e⁻½ = 1.9744101: −log of 1 / 1.9744101 for the win, of e⁻½ / 1.9744101 for the tie
    assert loss([[1.0, 0.0]], tie_strength=1.0) == pytest.approx(0.6802697, abs=1e-6)
    assert loss([[1.0, 0.0]], ranks=torch.tensor([[0, 0]]), tie_strength=1.0) == pytest.approx(1.1802697, abs=1e-6)


def test_smoothing_charges_its_share_of_the_gap():
    # (1 − 0.2) · 0.3132617 + 0.2 · 1.3132617
    assert loss([[1.0, 0.0]], label_smoothing=0.2) == pytest.approx(0.5132617, abs=1e-6)


def test_prompts_weigh_the_same_however_many_responses_they_have():
    scores = torch.tensor([[1.0, 0.0, 0.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    # K = 4: gaps 1 × 3, 2 × 2, 3 × 1
    four = (3 * 0.3132617 + 2 * 0.1269280 + 0.0485874) / 6
    assert ranking_nll(scores, mask).tolist() == pytest.approx([0.3132617, four], abs=1e-6)
    assert ranking_nll(scores, mask).mean().item() == pytest.approx((0.3132617 + four) / 2, abs=1e-6)


def test_a_constant_added_to_a_prompt_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    offset = 10 * torch.randn(6, 1, generator=generator, dtype=torch.float64)
    mask = torch.ones(6, 4, dtype=torch.bool)
    assert torch.allclose(ranking_nll(scores, mask), ranking_nll(scores + offset, mask), atol=1e-12)


def test_the_listwise_likelihood_is_that_of_choosing_the_best_again_and_again():
    # scores 2, 1, 0: log(1 + e⁻¹ + e⁻²) = 0.4076060 for the first choice, log(1 + e⁻¹) = 0.3132617 for the second
    scores = torch.tensor([[2.0, 1.0, 0.0]])
    assert plackett_luce_nll(scores, full(scores)).item() == pytest.approx((0.4076060 + 0.3132617) / 2, abs=1e-6)


def test_the_listwise_likelihood_sums_to_one_over_all_orders():
    scores = torch.tensor([0.3, -1.2, 2.0, 0.9], dtype=torch.float64)
    orders = torch.stack([scores[list(order)] for order in itertools.permutations(range(4))])
    likelihoods = torch.exp(-3 * plackett_luce_nll(orders, full(orders)))
    assert likelihoods.sum().item() == pytest.approx(1.0, abs=1e-12)


def test_with_two_responses_both_losses_are_the_same():
    scores = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(plackett_luce_nll(scores, full(scores)), ranking_nll(scores, full(scores)), atol=1e-12)


@pytest.mark.parametrize("nll", [ranking_nll, plackett_luce_nll])
def test_no_constant_added_to_a_prompt_matters_and_its_gradients_sum_to_zero(nll):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    moved = scores + 3.0
    assert torch.allclose(nll(scores, full(scores)), nll(moved, full(scores)), atol=1e-12)
    nll(scores, full(scores)).sum().backward()
    assert scores.grad.sum(1).abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda s: nll(s, full(scores)), scores)


@pytest.mark.parametrize("poison", [1e6, float("nan"), float("inf")])
def test_the_listwise_loss_does_not_see_padding(poison):
    clean = torch.tensor([[0.3, 0.1, 0.0], [0.2, 0.5, -1.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    dirty = clean.detach().masked_fill(~mask, poison).requires_grad_(True)
    for scores in (clean, dirty):
        plackett_luce_nll(scores, mask).sum().backward()
    assert torch.equal(plackett_luce_nll(clean, mask), plackett_luce_nll(dirty, mask))
    assert torch.equal(clean.grad, dirty.grad)


@pytest.mark.parametrize("poison", [1e6, float("nan"), float("inf")])
def test_nothing_on_a_padded_slot_reaches_loss_or_gradient(poison):
    mask = torch.tensor([[True, True, False], [True, True, True]])
    clean = torch.tensor([[0.3, 0.1, 0.0], [0.2, 0.5, -1.0]], requires_grad=True)
    dirty = clean.detach().masked_fill(~mask, poison).requires_grad_()
    ranking_nll(clean, mask).mean().backward()
    ranking_nll(dirty, mask).mean().backward()
    assert torch.equal(ranking_nll(clean, mask), ranking_nll(dirty, mask))
    assert torch.equal(clean.grad, dirty.grad)


def test_the_gradient_pushes_the_better_up_and_sums_to_zero_in_every_prompt():
    scores = torch.tensor([[0.0, 0.0], [1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    ranking_nll(scores, full([[0, 0], [0, 0]])).sum().backward()
    # d/ds_better = −σ(−gap): −1/2 at gap 0, −σ(−2) = −0.1192029 at gap 2
    assert scores.grad[:, 0].tolist() == pytest.approx([-0.5, -0.1192029], abs=1e-6)
    assert scores.grad.sum(1).tolist() == pytest.approx([0.0, 0.0])


def test_the_gradient_is_that_of_finite_differences():
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    scores = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: ranking_nll(s, mask, torch.tensor([0.5, 0.0])).mean(), (scores,))


def test_extreme_scores_stay_finite():
    assert loss([[-1e4, 1e4]]) == pytest.approx(2e4)
    assert loss([[1e4, -1e4]]) == 0.0
