"""The optimum by hand, and against enumeration of the exact world."""

import math

import numpy as np
import pytest

from textenv.evaluation import optimum
from textenv.optimum import ENOUGH, estimate, reference_rewards
from textenv.tasks.exact import exact_world
from textenv.vector import make_vec


def test_two_rewards_by_hand():
    # β = ½: w = e^(r/β) = 1 and 3, so the mean is 2, the variance 2, and the relative one 2 / 4 / 2 = ¼.
    found = estimate(np.array([[0.0, 0.5 * math.log(3)]]), 0.5)
    assert found.value == pytest.approx(0.5 * (math.log(2) + 1 / 8))
    assert found.ci95[1] - found.value == pytest.approx(1.96 * 0.5 * 0.5)
    assert found.effective_samples == pytest.approx(16 / 10)
    assert found.unclear_prompts == 1
    assert found.reference.mean == pytest.approx(0.25 * math.log(3))
    assert found.share(found.reference.mean) == 0
    assert found.share(found.value) == 1


def test_equal_rewards_leave_nothing_to_gain():
    found = estimate(np.full((3, 20), 1e3), 1e-3)  # no overflow
    assert found.value == found.reference.mean == 1e3
    assert found.ci95 == (1e3, 1e3)
    assert (found.effective_samples, found.unclear_prompts) == (20, 0)


def test_one_good_answer_among_many_is_called_unclear():
    rewards = np.zeros((2, 100))
    rewards[0, 0] = 10
    found = estimate(rewards, 0.1)
    assert found.unclear_prompts == 0.5
    assert found.effective_samples == pytest.approx((1 + 100) / 2)
    assert ENOUGH < 100


@pytest.mark.parametrize(("kl_coef", "count"), [(0.3, 256), (0.1, 512)])
def test_the_interval_holds_the_enumerated_optimum_as_often_as_it_promises(kl_coef, count):
    env = make_vec("textenv/Micro-v0", 384, kl_coef=kl_coef)
    best = exact_world(env).optimum().objective
    rewards = reference_rewards(env, 20 * count, seed=0).reshape(6, 20, count)
    found = [estimate(rewards[:, seed], kl_coef) for seed in range(20)]
    inside = sum(own.ci95[0] <= best <= own.ci95[1] for own in found)
    assert inside >= 16  # of 20, 19 in the mean; fewer than 16 come by chance once in 400
    assert np.mean([own.value for own in found]) == pytest.approx(best, abs=0.01)
    assert max(own.ci95[1] - own.ci95[0] for own in found) < 0.12


def test_the_reference_of_the_estimate_is_that_of_the_world():
    env = make_vec("textenv/Micro-v0", 384)
    world = exact_world(env)
    found = optimum(env, 2000, seed=1)
    reference = world.expected_reward(world.tilted(1e9))
    assert found.reference.mean == pytest.approx(reference, abs=0.01)
    assert found.value - found.reference.mean > 0


def test_without_a_kl_no_sample_tells_the_optimum():
    with pytest.raises(ValueError, match=r"kl_coef must be above 0 to estimate an optimum, got 0.0"):
        optimum(make_vec("textenv/Micro-v0", 8, kl_coef=0.0))
