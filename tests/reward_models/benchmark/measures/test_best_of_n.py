"""Best-of-n against brute force and against the enumerated world."""

import itertools
import math
from types import SimpleNamespace
from typing import NamedTuple

import gymnasium
import numpy as np
import pytest
import torch

from reward_models.benchmark.measures import best_of_n as bon
from textenv.tasks import micro
from textenv.tasks.exact import exact_world


@pytest.fixture(scope="module")
def world():
    return exact_world(gymnasium.make("textenv/Micro-v0"))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_the_estimate_is_the_mean_over_all_subsets(rng, n):
    scores = np.array([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])  # with ties
    values = rng.normal(size=(2, 6))
    for score, value, estimate in zip(scores, values, bon.expected_best(scores, values, n), strict=True):
        subsets = [list(chosen) for chosen in itertools.combinations(range(6), n)]
        # Lots are drawn among the best of a subset.
        brute = np.mean([np.mean(value[s][score[s] == score[s].max()]) for s in subsets])
        assert estimate == pytest.approx(brute)


def test_more_than_there_are_samples_is_an_error():
    with pytest.raises(ValueError, match="the 4 samples per prompt, got 5"):
        bon.subset_weights(4, 5)


def test_the_estimate_is_unbiased_where_taking_the_best_of_groups_agrees_with_theory(rng):
    # The maximum of n uniform numbers has mean n / (n + 1).
    scores = rng.random((4000, 8))
    for n in (2, 4, 8):
        found = bon.expected_best(scores, scores, n)
        assert found.mean() == pytest.approx(n / (n + 1), abs=4 * found.std() / math.sqrt(4000))


def test_the_kl_of_a_binary_reward_is_far_below_the_bound():
    # q(right) = 1 − ½^16: KL = q log 2q + (1 − q) log 2(1 − q) ≈ log 2.
    assert bon.level_kl(np.array([0.5, 0.5]), 16) == pytest.approx(math.log(2), abs=2e-4)
    assert bon.kl_bound(16) == pytest.approx(1.835, abs=1e-3)
    assert bon.level_kl(np.array([0.3, 0.7]), 1) == pytest.approx(0.0, abs=1e-12)
    assert bon.level_kl(np.array([1.0]), 9) == 0.0


def test_the_kl_of_levels_is_that_of_the_enumerated_world(world):
    masses = []
    for ref, reward in zip(world.ref_logprobs.exp().numpy(), world.rewards.numpy(), strict=True):
        _, level = np.unique(reward, return_inverse=True)
        masses.append(np.bincount(level, weights=ref))
    for n in (2, 8, 32):
        assert np.mean([bon.level_kl(mass, n) for mass in masses]) == pytest.approx(world.best_of_n(n).kl, rel=1e-9)


def test_with_many_levels_the_kl_approaches_the_bound_from_below():
    for n in (2, 8):
        kl = bon.level_kl(np.full(20_000, 1 / 20_000), n)
        assert kl < bon.kl_bound(n)
        assert kl == pytest.approx(bon.kl_bound(n), rel=1e-3)


def test_a_sampled_curve_agrees_with_the_exact_one(world):
    def length(prompts, completions):
        return np.array([float(len(text)) + 0.1 * text.count("b") for text in completions])

    draws = torch.multinomial(
        world.ref_logprobs.exp(), 400, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    texts = [[world.texts[i] for i in row] for row in draws.tolist()]
    scores = np.stack([length(None, row) for row in texts])
    gold = np.stack([micro.gold_scores([p] * 400, row) for p, row in zip(world.prompts, texts, strict=True)])
    exact = bon.exact_curve(world, np.stack([length(None, world.texts)] * len(world.prompts)), [1, 4, 16])
    sampled = bon.sampled_curve(scores, gold, [1, 4, 16], np.arange(len(gold)))
    for truth, found in zip(exact, sampled, strict=True):
        assert found.gold == pytest.approx(truth.gold, abs=0.08)
        assert found.gold_gain == pytest.approx(truth.gold_gain, abs=0.15)
        assert found.score_gain == pytest.approx(truth.score_gain, abs=0.15)
        assert found.oracle_gain == pytest.approx(truth.oracle_gain, abs=0.15)
    assert {point.kl_kind for point in exact} == {"exact"}
    # Longer is not better here: the model's own score gains, gold does not follow.
    assert exact[-1].score_gain > 0.5 > -0.5 > exact[-1].gold_gain


def test_discrete_scores_have_the_kl_of_their_levels_and_others_the_bound(rng):
    gold = rng.normal(size=(50, 16))
    right = (rng.random((50, 16)) < 0.5).astype(float)
    discrete = bon.sampled_curve(right, gold, [16], np.arange(50))[0]
    assert (discrete.kl_kind, discrete.kl < 0.8) == ("levels", True)
    fine = bon.sampled_curve(gold, gold, [16], np.arange(50))[0]
    assert (fine.kl_kind, fine.kl) == ("bound", pytest.approx(bon.kl_bound(16)))


def test_copies_of_a_prompt_do_not_narrow_the_interval(rng):
    scores, gold = rng.normal(size=(30, 8)), rng.normal(size=(30, 8))
    once = bon.sampled_curve(scores, gold, [4], np.arange(30))[0]
    four = bon.sampled_curve(np.tile(scores, (4, 1)), np.tile(gold, (4, 1)), [4], np.tile(np.arange(30), 4))[0]
    assert four.gold_ci95 == pytest.approx(once.gold_ci95)


def test_the_picture_is_drawn_against_the_root_of_the_kl():
    points = [bon.Point(n, float(n), "bound", 0, 0, 0.1 * n, 0, 0.2 * n, 0, 0.3 * n) for n in (1, 4, 9)]
    figure = bon.best_of_n_picture(points)
    assert figure.axes[0].lines[0].get_xdata() == pytest.approx([1, 2, 3])
    assert "√" in figure.axes[0].get_xlabel()
    assert "bound" in figure.axes[0].get_xlabel()


def test_a_curve_of_two_prompts_is_the_one_done_by_hand():
    scores, gold = np.array([[0.0, 2.0], [0.0, 4.0]]), np.array([[0.0, 2.0], [2.0, 0.0]])
    one, two = bon.sampled_curve(scores, gold, [1, 2], np.arange(2))
    # Pooled deviations within a prompt: scores √((1 + 1 + 4 + 4)/2) = √5, gold √2.
    assert (one.gold, one.kl, one.gold_gain, one.score_gain, one.oracle_gain) == pytest.approx((1, 0, 0, 0, 0))
    # The best of two by score has gold 2 and 0: mean 1, standard error 1, t(1) = 12.706;
    # gains over n = 1 of +1 and −1 in √2.
    assert (two.gold, two.gold_ci95) == pytest.approx((1.0, 12.7062), abs=1e-4)
    assert (two.gold_gain, two.gold_gain_ci95) == pytest.approx((0.0, 12.7062 / math.sqrt(2)), abs=1e-4)
    # Scores gain 1 and 2: mean 1.5, standard error ½, in √5. Gold by itself would have gained 1 on each, in √2.
    assert (two.score_gain, two.score_gain_ci95) == pytest.approx((1.5 / math.sqrt(5), 6.3531 / math.sqrt(5)))
    assert two.oracle_gain == pytest.approx(1 / math.sqrt(2))
    # Two values of probability ½ each: the better one is the best of two with ¾.
    assert (two.kl_kind, two.kl) == ("levels", pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5)))


def test_gains_have_no_unit_and_gold_has_its_own(rng):
    scores, gold = rng.normal(size=(20, 8)), rng.normal(size=(20, 8))
    (plain,) = bon.sampled_curve(scores, gold, [4], np.arange(20))
    (other,) = bon.sampled_curve(7.0 * scores + 3.0, 10.0 * gold - 50.0, [4], np.arange(20))
    same = ("kl", "gold_gain", "gold_gain_ci95", "score_gain", "score_gain_ci95", "oracle_gain")
    assert [getattr(other, name) for name in same] == pytest.approx([getattr(plain, name) for name in same])
    assert (other.gold, other.gold_ci95) == pytest.approx((10 * plain.gold - 50, 10 * plain.gold_ci95))


@pytest.mark.parametrize(("levels", "kind"), [(10, "levels"), (11, "bound")])
def test_scores_of_ten_values_are_discrete_and_of_eleven_are_not(rng, levels, kind):
    scores = rng.permutation(np.arange(44) % levels).astype(float).reshape(4, 11)
    assert bon.sampled_curve(scores, scores, [2], np.arange(4))[0].kl_kind == kind


def test_the_exact_curve_of_a_small_world_is_the_one_done_by_hand():
    class World(NamedTuple):
        """Two prompts with two equally likely strings each; of two draws the better one is taken with ¾."""

        ref_logprobs: torch.Tensor
        rewards: torch.Tensor

        def best_of_n(self, n, scores=None):
            order = (self.rewards if scores is None else scores).argsort(1)
            better = torch.full((2, 2), 1 - 0.5**n, dtype=torch.float64)
            p = torch.zeros(2, 2, dtype=torch.float64).scatter(
                1, order, torch.stack([1 - better[:, 0], better[:, 1]], 1)
            )
            return SimpleNamespace(logprobs=p.log(), kl=0.0, expected_reward=float((p * self.rewards).sum(1).mean()))

    world = World(torch.full((2, 2), 0.5).double().log(), torch.tensor([[0.0, 2.0], [6.0, 0.0]]).double())
    (point,) = bon.exact_curve(world, np.array([[0.0, 4.0], [0.0, 4.0]]), [2])
    # Gold 1.5 and ¼ · 6 = 1.5, against 1 and 3 before; its deviation √((1 + 9)/2), that of the scores 2.
    assert (point.kl_kind, point.gold) == ("exact", pytest.approx(1.5))
    assert point.gold_gain == pytest.approx(-0.5 / math.sqrt(5))
    assert point.score_gain == pytest.approx((3 - 2) / 2)
    # Gold by itself: 1.5 and 4.5.
    assert point.oracle_gain == pytest.approx(1 / math.sqrt(5))
