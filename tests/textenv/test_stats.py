"""Statistics against published tables, numbers derived by hand, closed forms and simulation."""

import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import optimize

from textenv import stats

SINGLE = np.arange(10_000)


@pytest.mark.parametrize(
    ("count", "t"),
    # Table of Student's t, two-sided 5 %, by degrees of freedom: 1, 2, 9, 10, 30, 100.
    [(2, 12.706), (3, 4.303), (10, 2.262), (11, 2.228), (31, 2.042), (101, 1.984)],
)
def test_the_interval_of_a_mean_is_students_for_few_values_and_many(count, t):
    # Values 1 … n: mean (n + 1)/2, sample variance n (n + 1)/12.
    found = stats.mean_ci95(range(1, count + 1))
    assert found == pytest.approx(((count + 1) / 2, t * math.sqrt((count + 1) / 12)), rel=3e-4)


def test_the_interval_of_one_two_three_is_the_one_done_by_hand():
    assert stats.mean_ci95([1, 2, 3]) == pytest.approx((2.0, 4.303 / math.sqrt(3)), abs=1e-3)


def test_what_one_value_or_none_cannot_tell_is_nan():
    assert stats.mean_ci95([5.0]).mean == 5.0
    assert math.isnan(stats.mean_ci95([5.0]).ci95)
    assert all(map(math.isnan, stats.mean_ci95([])))


def test_a_single_cluster_has_no_interval_anywhere():
    values, one = np.array([1.0, -1.0, 1.0, 1.0]), np.zeros(4, dtype=int)
    assert math.isnan(stats.standard_error(values, one))
    assert math.isnan(stats.mean_ci95(values, one).ci95)
    assert math.isnan(stats.reliability(values, one, 1)[0].ci95)
    assert all(map(math.isnan, stats.bootstrap_interval(values, one, resamples=20, seed=0)))
    assert all(map(math.isnan, stats.calibration_slope(values, one).ci95))
    assert stats.calibration_slope(values, one).value == pytest.approx(math.log(3))


def test_the_interval_over_clusters_has_as_many_degrees_of_freedom_as_clusters_less_one():
    # Clusters (1, 1) and (0, 0, 0): mean 0.4; sums of residuals 1.2 and −1.2; √(2 · 2.88)/5 = 0.48; t(1) = 12.706.
    found = stats.mean_ci95([1.0, 1.0, 0.0, 0.0, 0.0], np.array([4, 4, 9, 9, 9]))
    assert found == pytest.approx((0.4, 12.706 * 0.48), rel=1e-4)


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81.0, 263, 0.2553, 0.3662), (15.0, 148, 0.0624, 0.1605), (0.0, 20, 0.0, 0.1611), (1.0, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(successes, count, low, high):
    assert stats.wilson(successes, count) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_half_a_success_holds_those_of_the_whole_numbers_beside_it():
    # Wilson's interval of 0 of 1 ends at z²/(1 + z²) = 3.8415/4.8415, that of 1 of 1 starts at 1/(1 + z²).
    assert stats.wilson(0.5, 1) == pytest.approx((0.0, 1.0))
    assert stats.wilson(1.0, 1) == pytest.approx((1 / 4.8415, 1.0), abs=1e-5)
    assert stats.wilson(1 / 3 + 1 / 3 + 1 / 3 - 1e-16, 1) == stats.wilson(1.0, 1)
    low, high = stats.wilson(3.5, 9)
    assert (low, high) == (stats.wilson(3.0, 9)[0], stats.wilson(4.0, 9)[1])


@pytest.mark.parametrize(("first", "second"), [(1, 0), (5, 9), (9, 5), (10, 10), (40, 80), (600, 400)])
def test_mcnemar_is_the_exact_sign_test(first, second):
    # Twice the tail of the binomial with p = ½, in whole numbers.
    tail = sum(math.comb(first + second, k) for k in range(min(first, second) + 1))
    assert stats.mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail / 2 ** (first + second)), rel=1e-6)


def test_models_that_never_disagree_do_not_differ():
    assert stats.mcnemar(0, 0) == 1.0


def test_the_bootstrap_over_clusters_covers_the_truth_where_one_over_pairs_does_not():
    # 40 clusters of 6 equal outcomes, each right with probability 0.7: the pairs of a cluster are one observation.
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(40), 6)
    covered, naive = 0, 0
    for seed in range(200):
        outcome = np.repeat((rng.random(40) < 0.7).astype(float), 6)
        low, high = stats.bootstrap_interval(outcome, cluster, resamples=400, seed=seed)
        covered += low <= 0.7 <= high
        low, high = stats.bootstrap_interval(outcome, SINGLE[:240], resamples=100, seed=seed)
        naive += low <= 0.7 <= high
    assert 0.89 <= covered / 200 <= 0.99  # 0.95 ± 3 SE, and the percentile interval's small undercoverage
    assert naive / 200 < 0.75


def test_the_bootstrap_weighs_pairs_equally_not_clusters():
    # Of two clusters, (0, 0), (0, 1) and (1, 1) are drawn with chances ¼, ½, ¼: means 1, 0.9 and 0.
    values, cluster = np.array([1.0] * 9 + [0.0]), np.array([0] * 9 + [1])
    assert stats.bootstrap_interval(values, cluster, resamples=500, seed=0) == (0.0, 1.0)
    assert stats.rate(values, cluster, resamples=10, seed=0).value == pytest.approx(0.9)


def test_the_bootstrap_of_many_clusters_in_blocks_is_that_of_independent_values():
    # 300,000 values 0 … 1 in 200 resamples of blocks of six: ½ ± 1.96 · √(1/12)/√300,000.
    low, high = stats.bootstrap_interval(np.linspace(0, 1, 300_000), np.arange(300_000), resamples=200, seed=0)
    assert (0.5 - low, high - 0.5) == pytest.approx((1.033e-3, 1.033e-3), rel=0.3)


def test_the_clustered_standard_error_is_the_one_done_by_hand():
    # Mean 0.75; residual sums of the clusters −0.5 and 0.5: √(2/1 · (0.25 + 0.25)) / 4 = 0.25.
    values = np.array([1.0, 0.0, 1.0, 1.0])
    assert stats.standard_error(values, np.array([7, 7, 3, 3])) == pytest.approx(0.25)
    singles = stats.standard_error(values, np.arange(4))
    assert singles == pytest.approx(values.std(ddof=1) / 2)  # clusters of one: the ordinary standard error


def test_nll_and_brier_are_those_of_a_known_probability():
    margins = np.array([math.log(3), -math.log(3)])  # p = ¾ and ¼
    assert stats.nll(margins) == pytest.approx([-math.log(0.75), -math.log(0.25)])
    assert stats.brier(margins) == pytest.approx((1 / 16 + 9 / 16) / 2)
    assert stats.nll(np.zeros(3)) == pytest.approx([math.log(2)] * 3)


def test_huge_margins_neither_overflow_nor_warn():
    margins = np.array([1e4, -1e4])
    assert stats.nll(margins) == pytest.approx([0.0, 1e4])
    assert stats.brier(margins) == pytest.approx(0.5)


def test_ece_is_the_one_done_by_hand():
    # Four pairs at p = 0.6, of which 3 right; six at p = 0.9, of which 3 right; two bins of 5: the first holds the four
    # at 0.6 and one right at 0.9. Bin 1: predicted (4·0.6 + 0.9)/5 = 0.66, observed 4/5. Bin 2: 0.9 against 2/5.
    unsure, sure = math.log(0.6 / 0.4), math.log(0.9 / 0.1)
    # The sure ones stand first, so that bins must sort; of equals the first comes first: a right one.
    margins = np.array([sure] * 3 + [-sure] * 3 + [unsure] * 3 + [-unsure])
    bins = stats.reliability(margins, SINGLE[:10], 2)
    assert [part.pairs for part in bins] == [5, 5]
    assert [part.predicted for part in bins] == pytest.approx([0.66, 0.9])
    assert [part.observed for part in bins] == pytest.approx([0.8, 0.4])
    assert stats.ece(bins) == pytest.approx(0.5 * 0.14 + 0.5 * 0.5)


def test_a_score_tie_is_half_right_everywhere():
    assert stats.correct(np.array([2.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]
    assert stats.reliability(np.zeros(4), SINGLE[:4], 1)[0].observed == 0.5


def simulated_margins(slope, count, rng):
    """Margins of a model whose labels follow σ(slope · margin)."""
    margin = rng.normal(0.0, 2.0, count)
    return np.where(rng.random(count) < 1 / (1 + np.exp(-slope * margin)), margin, -margin)


@pytest.mark.parametrize("slope", [0.3, 1.0, 2.5])
def test_the_calibration_slope_is_recovered_and_is_the_maximum(rng, slope):
    margins = simulated_margins(slope, 4000, rng)
    found = stats.calibration_slope(margins, SINGLE[:4000])
    assert found.ci95[0] - 0.1 < slope < found.ci95[1] + 0.1
    best = optimize.minimize_scalar(lambda b: np.logaddexp(0, -b * margins).mean(), bounds=(0, 5), method="bounded")
    assert found.value == pytest.approx(best.x, abs=1e-4)
    # With independent pairs the sandwich is about the inverse Fisher information.
    p = 1 / (1 + np.exp(-found.value * margins))
    fisher = 1.96 / math.sqrt(np.sum(margins**2 * p * (1 - p)))
    assert (found.ci95[1] - found.ci95[0]) / 2 == pytest.approx(fisher, rel=0.15)


def test_copies_of_a_pair_do_not_narrow_the_interval_of_the_slope(rng):
    margins = simulated_margins(1.0, 500, rng)
    once = stats.calibration_slope(margins, SINGLE[:500])
    four = stats.calibration_slope(np.repeat(margins, 4), np.repeat(SINGLE[:500], 4))
    assert four.ci95 == pytest.approx(once.ci95)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_slope_undoes_any_scale_of_the_scores(rng, scale):
    margins = simulated_margins(1.0, 500, rng)
    plain = stats.calibration_slope(margins, SINGLE[:500]).value
    assert stats.calibration_slope(scale * margins, SINGLE[:500]).value == pytest.approx(plain / scale, rel=1e-6)


def test_a_slope_without_a_finite_maximum_says_so():
    assert stats.calibration_slope(np.array([1.0, 2.0, 0.0]), SINGLE[:3]).value == math.inf
    assert stats.calibration_slope(np.array([-1.0, -2.0]), SINGLE[:2]).value == -math.inf
    assert math.isnan(stats.calibration_slope(np.zeros(3), SINGLE[:3]).value)


def test_the_slope_is_found_however_one_sided_the_margins_are():
    # 999 margins of 1 and one of −1: b = log 999. With one of −1e-3 in its place: 999 σ(−b) = 1e-3 σ(1e-3 b).
    assert stats.calibration_slope(np.array([1.0] * 999 + [-1.0]), SINGLE[:1000]).value == pytest.approx(math.log(999))
    b = stats.calibration_slope(np.array([1.0] * 999 + [-1e-3]), SINGLE[:1000]).value
    assert 999 / (1 + math.exp(b)) == pytest.approx(1e-3 / (1 + math.exp(-1e-3 * b)))


def test_rank_correlation_is_spearmans_formula():
    # Ranks 2, 3, 4, 1 against 1, 2, 3, 4: 1 − 6 · (1 + 1 + 1 + 9)/(4 · 15).
    assert stats.spearman(np.array([20.0, 30.0, 90.0, -1.0]), np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(-0.2)
    # Of equals the mean rank: (1.5, 1.5, 3) against (1, 2, 3): 1.5/√(1.5 · 2).
    assert stats.spearman(np.array([5.0, 5.0, 7.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(math.sqrt(0.75))
    assert math.isnan(stats.spearman(np.arange(5.0), np.ones(5)))


def test_the_area_under_the_curve_counts_pairs_ties_one_half(rng):
    low, high = rng.integers(0, 6, 30), rng.integers(1, 7, 20)
    counted = np.mean([(b > a) + 0.5 * (b == a) for a in low for b in high])
    assert stats.auc(low, high) == pytest.approx(counted)
    assert stats.auc(np.ones(2), np.ones(3)) == 0.5


def test_the_standard_deviation_within_a_prompt_ignores_offsets_between_prompts():
    scores, prompt = np.array([0.0, 2.0, 100.0, 104.0]), np.array([0, 0, 1, 1])
    # Squared deviations 1 + 1 + 4 + 4 over 2 degrees of freedom.
    assert stats.within_prompt_sd(scores, prompt) == pytest.approx(math.sqrt(5))
    assert math.isnan(stats.within_prompt_sd(scores, np.arange(4)))


def test_the_bayes_limits_equal_hand_computed_ones():
    # Gold log 3, 0, 0 at τ = 1: the pairs have p = ¾, ¾, ½; whichever response stands first.
    gaps = np.array([math.log(3), -math.log(3), 0.0])
    best, floor = stats.bayes_limits(gaps, 1.0)
    assert best == pytest.approx([0.75, 0.75, 0.5])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert floor == pytest.approx([entropy, entropy, math.log(2)])
    assert np.concatenate(stats.bayes_limits(np.array([1e4]), 0.75)) == pytest.approx([1.0, 0.0])


def test_the_bootstrap_interval_of_many_independent_values_is_the_normal_one():
    # Mean ± 1.96 standard errors; the ends of 10,000 resamples are known to about 0.03 standard errors.
    values = np.random.default_rng(0).normal(size=400)
    low, high = stats.bootstrap_interval(values, SINGLE[:400], resamples=10_000, seed=0)
    error = values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_a_rate_distinguishes_the_interval_of_pairs_from_that_of_clusters():
    # Two prompts of two pairs each, one all right, one all wrong: any resample is 0, ½ or 1. Wilson's interval of 2 of
    # 4 is ½ ± z √(¼/4 + z²/64)/(1 + z²/4), 0.150 … 0.850.
    outcomes, cluster = np.array([1.0, 1.0, 0.0, 0.0]), np.array([3, 3, 5, 5])
    found = stats.rate(outcomes, cluster, resamples=400, seed=0)
    assert (found.value, found.clustered, found.pairs) == (0.5, (0.0, 1.0), 4)
    assert found.wilson == pytest.approx((0.150, 0.850), abs=5e-4)
    # All resamples are alike: Wilson's interval of 4 of 4 prompts, down to 4/(4 + 1.96²).
    cluster = np.array([0, 0, 1, 2, 3, 3])
    for value, clustered in ((1.0, (4 / (4 + 1.959964**2), 1.0)), (0.0, (0.0, 1.959964**2 / (4 + 1.959964**2)))):
        found = stats.rate(np.full(6, value), cluster, resamples=20, seed=0)
        assert found is not None
        assert found.clustered == pytest.approx(clustered, abs=1e-6)
    assert np.isnan(stats.rate(np.ones(3), np.zeros(3, dtype=int), resamples=20, seed=0).clustered).all()
    assert stats.rate(np.zeros(0), np.zeros(0, dtype=int), resamples=20, seed=0) is None


def test_a_bins_interval_is_over_clusters():
    # One bin: outcomes 1, 0, 1, 1 around ¾. Residual sums of the clusters ¼ and −¼: √(2/1 · (1/16 + 1/16))/4 = 1/8.
    (part,) = stats.reliability(np.array([1.0, -1.0, 1.0, 1.0]), np.array([7, 3, 3, 3]), 1)
    assert part.ci95 == pytest.approx(12.706 / 8, rel=1e-4)


def test_copies_of_a_pair_do_not_narrow_the_interval_of_a_bin(rng):
    margins = rng.choice([-1.0, 1.0], 40)
    (once,) = stats.reliability(margins, SINGLE[:40], 1)
    (copied,) = stats.reliability(margins.repeat(9), SINGLE[:40].repeat(9), 1)
    assert copied[:3] == pytest.approx(once[:3])


def test_bins_weigh_in_the_ece_by_their_pairs():
    # ¾ · |0.6 − 0.8| + ¼ · |0.9 − 0.8|: too timid and too sure do not cancel, and a pair counts as a pair.
    assert stats.ece([stats.Bin(0.6, 0.8, 0.0, 3), stats.Bin(0.9, 0.8, 0.0, 1)]) == pytest.approx(0.175)
    # Seven pairs in three bins: 3, 2 and 2.
    assert [part.pairs for part in stats.reliability(np.arange(7.0), SINGLE[:7], 3)] == [3, 2, 2]


def test_the_interval_of_the_slope_is_the_one_done_by_hand():
    # Three margins of 1 and one of −1: σ(b) = ¾, b = log 3. With p = ¾ the squares of the scores add up to
    # 3 (1 − p)² + p² = ¾, and so does the information 4 p (1 − p); four clusters: variance 4/3 · ¾ / ¾² = 16/9;
    # t(3) = 3.182.
    found = stats.calibration_slope(np.array([1.0, 1.0, 1.0, -1.0]), SINGLE[:4])
    assert found.value == pytest.approx(math.log(3))
    assert found.ci95 == pytest.approx((math.log(3) - 3.182446 * 4 / 3, math.log(3) + 3.182446 * 4 / 3))


def test_importing_textenv_does_not_load_scipy():
    code = "import sys, textenv; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
