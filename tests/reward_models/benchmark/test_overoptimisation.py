"""The forms of Gao, Schulman, Hilton (2022): values by hand, recovered parameters, peaks by search."""

import math

import numpy as np
import pytest

from reward_models.benchmark.overoptimisation import Bend, fit_bend

D = np.linspace(0.0, 3.0, 25)


def test_the_forms_are_those_of_the_paper():
    # best-of-n at d = 2: 2 (1.5 − 0.4 · 2) = 1.4; RL at d = e: e (1.5 − 0.4 · 1) = 1.1 e; at d = 1 log vanishes.
    assert Bend("best-of-n", 1.5, 0.4, 1.0).gain(np.array([0.0, 2.0])) == pytest.approx([0.0, 1.4])
    assert Bend("rl", 1.5, 0.4, 1.0).gain(np.array([0.0, 1.0, math.e])) == pytest.approx([0.0, 1.5, 1.1 * math.e])


@pytest.mark.parametrize("form", ["best-of-n", "rl"])
def test_a_fit_finds_the_parameters_that_made_the_points(form):
    made = Bend(form, 1.3, 0.6, 1.0)
    found = fit_bend(form, D, made.gain(D))
    assert (found.alpha, found.beta, found.r_squared) == pytest.approx((1.3, 0.6, 1.0))


@pytest.mark.parametrize("form", ["best-of-n", "rl"])
def test_the_peak_is_where_no_other_distance_gains_more(form):
    bend = Bend(form, 1.3, 0.6, 1.0)
    fine = np.linspace(0.001, 6.0, 200_001)
    assert bend.peak == pytest.approx(fine[np.argmax(bend.gain(fine))], abs=1e-3)


def test_a_gain_that_only_rises_has_no_peak():
    assert fit_bend("best-of-n", D, D + 0.1 * D**2).peak == math.inf


def test_a_gain_that_falls_from_the_start_is_highest_at_the_start():
    assert Bend("best-of-n", -1.0, 0.5, 1.0).peak == 0.0
    assert Bend("rl", -1.0, 0.5, 1.0).peak == pytest.approx(math.exp(-3))


def test_the_fit_to_noise_is_the_least_squares_one():
    gains = np.random.default_rng(0).normal(size=len(D))
    best = fit_bend("best-of-n", D, gains)

    def error(alpha, beta):
        return np.sum((gains - D * (alpha - beta * D)) ** 2)

    here = error(best.alpha, best.beta)
    assert best.r_squared == pytest.approx(1 - here / np.sum((gains - gains.mean()) ** 2))
    for step in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)):
        assert error(best.alpha + step[0], best.beta + step[1]) > here


@pytest.mark.parametrize("d", [[0.0, 1.0], [1.0, 1.0], [1.0, float("nan"), 2.0], [-1.0, 1.0, 2.0]])
def test_points_that_cannot_carry_a_fit_are_refused(d):
    with pytest.raises(ValueError, match="Measure more points"):
        fit_bend("rl", d, [0.0] * len(d))
