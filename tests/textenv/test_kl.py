"""KL estimators against closed forms, controllers against hand-computed steps."""

import numpy as np
import pytest

from tests.conftest import kl_k2
from textenv.kl import AdaptiveKL, FixedKL, kl_k1, kl_k3

P, Q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])


def test_the_expectations_of_k1_and_k3_are_the_kl_and_k2_is_biased():
    exact = 0.5 * np.log(0.5 / 0.2) + 0.3 * np.log(0.3 / 0.2) + 0.2 * np.log(0.2 / 0.6)
    logp, logq = np.log(P), np.log(Q)
    assert P @ kl_k1(logp, logq) == pytest.approx(exact)
    assert P @ kl_k3(logp, logq) == pytest.approx(exact)
    assert P @ kl_k2(logp, logq) != pytest.approx(exact, rel=0.01)


def test_k3_is_never_negative_and_all_vanish_at_equality():
    logp, logq = np.log(np.random.default_rng(0).dirichlet(np.ones(5), size=(2, 50)))
    assert (kl_k3(logp, logq) >= 0).all()
    assert (kl_k1(logp, logq) < 0).any()
    for estimator in (kl_k1, kl_k3):
        assert (estimator(logp, logp) == 0).all()


def test_the_fixed_controller_stays_and_the_adaptive_one_moves_towards_its_target():
    assert FixedKL(0.2).update(100.0, 256) == 0.2
    # error = clip(7/6 − 1) = 1/6; β ← 0.2 · (1 + 1/6 · 512/10000)
    assert AdaptiveKL(0.2, target=6.0).update(7.0, 512) == pytest.approx(0.2 * (1 + 512 / 60_000))
    # far off, the error is clipped at 0.2
    assert AdaptiveKL(0.2, target=6.0).update(60.0, 512) == pytest.approx(0.2 * (1 + 0.2 * 0.0512))
    assert AdaptiveKL(0.2, target=6.0).update(0.0, 512) == pytest.approx(0.2 * (1 - 0.2 * 0.0512))
    # over a horizon of 400 episodes, 100 of them take a quarter of the error
    assert AdaptiveKL(0.2, target=6.0, horizon=400.0).update(60.0, 100) == pytest.approx(0.2 * (1 + 0.2 / 4))
    with pytest.raises(ValueError, match="target"):
        AdaptiveKL(0.2, target=0.0)
