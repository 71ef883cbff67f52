"""Statistics against published tables, hand-derived numbers, scipy and simulation."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from reward_models.benchmark import metrics
from textenv.tasks import assistant

SINGLE = np.arange(10_000)


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81.0, 263, 0.2553, 0.3662), (15.0, 148, 0.0624, 0.1605), (0.0, 20, 0.0, 0.1611), (1.0, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(successes, count, low, high):
    assert metrics.wilson(successes, count) == pytest.approx((low, high), abs=5e-5)
    scipy = stats.binomtest(int(successes), count).proportion_ci(method="wilson")
    assert metrics.wilson(successes, count) == pytest.approx((scipy.low, scipy.high), abs=1e-9)


def test_the_bootstrap_over_clusters_covers_the_truth_where_one_over_pairs_does_not():
    # 40 clusters of 6 equal outcomes, each right with probability 0.7: the pairs of a cluster are one observation.
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(40), 6)
    covered, naive = 0, 0
    for seed in range(200):
        outcome = np.repeat((rng.random(40) < 0.7).astype(float), 6)
        low, high = metrics.bootstrap_interval(outcome, cluster, resamples=400, seed=seed)
        covered += low <= 0.7 <= high
        low, high = metrics.bootstrap_interval(outcome, SINGLE[:240], resamples=100, seed=seed)
        naive += low <= 0.7 <= high
    assert 0.89 <= covered / 200 <= 0.99  # 0.95 ± 3 SE, and the percentile interval's small undercoverage
    assert naive / 200 < 0.75


def test_the_bootstrap_weighs_pairs_equally_not_clusters():
    values, cluster = np.array([1.0] * 9 + [0.0]), np.array([0] * 9 + [1])
    # Two clusters drawn with replacement: (0,0) → 1, (0,1) → 0.9, (1,1) → 0.
    means = np.concatenate(list(metrics._resampled(values, cluster, 500, 0)))
    assert set(np.round(means, 9)) == {1.0, 0.9, 0.0}


def test_blocks_of_the_bootstrap_give_as_many_resamples_as_asked():
    values = np.arange(300_000, dtype=float)
    assert sum(map(len, metrics._resampled(values, np.arange(300_000), 15, 0))) == 15


def test_the_clustered_standard_error_is_the_one_done_by_hand():
    # Mean 0.75; residual sums of the clusters −0.5 and 0.5: √(2/1 · (0.25 + 0.25)) / 4 = 0.25.
    values = np.array([1.0, 0.0, 1.0, 1.0])
    assert metrics.clustered_se(values, np.array([7, 7, 3, 3])) == pytest.approx(0.25)
    singles = metrics.clustered_se(values, np.arange(4))
    assert singles == pytest.approx(values.std(ddof=1) / 2)  # clusters of one: the ordinary standard error
    assert metrics.clustered_se(values, np.zeros(4, dtype=int)) == math.inf


def test_nll_and_brier_are_those_of_a_known_probability():
    margins = np.array([math.log(3), -math.log(3)])  # p = ¾ and ¼
    assert metrics.nll(margins) == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert metrics.brier(margins) == pytest.approx((1 / 16 + 9 / 16) / 2)
    assert metrics.nll(np.zeros(3)) == pytest.approx(math.log(2))


def test_huge_margins_neither_overflow_nor_warn():
    margins = np.array([1e4, -1e4])
    assert metrics.nll(margins) == pytest.approx(5e3)
    assert metrics.brier(margins) == pytest.approx(0.5)


def test_ece_is_the_one_done_by_hand():
    # Four pairs at p = 0.6, of which 3 right; six at p = 0.9, of which 3 right; two bins of 5: the first holds the four
    # at 0.6 and one right at 0.9. Bin 1: predicted (4·0.6 + 0.9)/5 = 0.66, observed 4/5. Bin 2: 0.9 against 2/5.
    unsure, sure = math.log(0.6 / 0.4), math.log(0.9 / 0.1)
    # The sure ones stand first, so that bins must sort; of equals the first comes first: a right one.
    margins = np.array([sure] * 3 + [-sure] * 3 + [unsure] * 3 + [-unsure])
    bins = metrics.reliability(margins, SINGLE[:10], 2)
    assert [part.pairs for part in bins] == [5, 5]
    assert [part.predicted for part in bins] == pytest.approx([0.66, 0.9])
    assert [part.observed for part in bins] == pytest.approx([0.8, 0.4])
    assert metrics.ece(bins) == pytest.approx(0.5 * 0.14 + 0.5 * 0.5)


def test_a_score_tie_is_half_right_everywhere():
    assert metrics.correct(np.array([2.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]
    assert metrics.reliability(np.zeros(4), SINGLE[:4], 1)[0].observed == 0.5


def simulated_margins(slope, count, rng):
    """Margins of a model whose labels follow σ(slope · margin)."""
    margin = rng.normal(0.0, 2.0, count)
    return np.where(rng.random(count) < 1 / (1 + np.exp(-slope * margin)), margin, -margin)


@pytest.mark.parametrize("slope", [0.3, 1.0, 2.5])
def test_the_calibration_slope_is_recovered_and_is_the_maximum(rng, slope):
    margins = simulated_margins(slope, 4000, rng)
    found = metrics.calibration_slope(margins, SINGLE[:4000])
    assert found.ci95[0] - 0.1 < slope < found.ci95[1] + 0.1
    best = optimize.minimize_scalar(lambda b: np.logaddexp(0, -b * margins).mean(), bounds=(0, 5), method="bounded")
    assert found.value == pytest.approx(best.x, abs=1e-4)
    # With independent pairs the sandwich is about the inverse Fisher information.
    p = 1 / (1 + np.exp(-found.value * margins))
    fisher = 1.96 / math.sqrt(np.sum(margins**2 * p * (1 - p)))
    assert (found.ci95[1] - found.ci95[0]) / 2 == pytest.approx(fisher, rel=0.15)


def test_copies_of_a_pair_do_not_narrow_the_interval_of_the_slope(rng):
    margins = simulated_margins(1.0, 500, rng)
    once = metrics.calibration_slope(margins, SINGLE[:500])
    four = metrics.calibration_slope(np.repeat(margins, 4), np.repeat(SINGLE[:500], 4))
    assert four.ci95 == pytest.approx(once.ci95)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_slope_undoes_any_scale_of_the_scores(rng, scale):
    margins = simulated_margins(1.0, 500, rng)
    plain = metrics.calibration_slope(margins, SINGLE[:500]).value
    assert metrics.calibration_slope(scale * margins, SINGLE[:500]).value == pytest.approx(plain / scale, rel=1e-6)


def test_a_slope_without_a_finite_maximum_says_so():
    assert metrics.calibration_slope(np.array([1.0, 2.0, 0.0]), SINGLE[:3]).value == math.inf
    assert metrics.calibration_slope(np.array([-1.0, -2.0]), SINGLE[:2]).value == -math.inf
    assert metrics.calibration_slope(np.zeros(3), SINGLE[:3]) is None


def test_rank_correlation_and_auc_are_scipys_ties_included(rng):
    a, b = rng.integers(0, 6, 50).astype(float), rng.integers(0, 6, 50).astype(float)
    assert metrics.ranks(a) == pytest.approx(stats.rankdata(a))
    assert metrics.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert math.isnan(metrics.spearman(a, np.ones(50)))
    u = stats.mannwhitneyu(b[:20], a[:30]).statistic  # pairs with b > a, ties ½
    assert metrics.auc(a[:30], b[:20]) == pytest.approx(u / (20 * 30))


def test_the_standard_deviation_within_a_prompt_ignores_offsets_between_prompts():
    scores, prompt = np.array([0.0, 2.0, 100.0, 104.0]), np.array([0, 0, 1, 1])
    # Squared deviations 1 + 1 + 4 + 4 over 2 degrees of freedom.
    assert metrics.within_prompt_sd(scores, prompt) == pytest.approx(math.sqrt(5))
    assert math.isnan(metrics.within_prompt_sd(scores, np.arange(4)))


def test_the_limits_are_those_of_the_annotators(rng):
    gold = rng.normal(0.0, 1.5, (200, 2))
    best, floor = metrics.bayes_limits(gold[:, 0] - gold[:, 1], assistant.ANNOTATOR_TEMPERATURE)
    assert best.mean() == pytest.approx(assistant.bayes_accuracy(gold))
    assert floor.mean() == pytest.approx(assistant.nll_floor(gold))


def test_the_bootstrap_interval_of_many_independent_values_is_the_normal_one():
    # Mean ± 1.96 standard errors; the ends of 10,000 resamples are known to about 0.03 standard errors.
    values = np.random.default_rng(0).normal(size=400)
    low, high = metrics.bootstrap_interval(values, SINGLE[:400], resamples=10_000, seed=0)
    error = values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_a_rate_tells_the_interval_of_pairs_from_that_of_clusters():
    # One prompt: no resample differs. Two of four pairs: Wilson's interval, from scipy.
    found = metrics.rate(np.array([1.0, 1.0, 0.0, 0.0]), np.zeros(4, dtype=int), resamples=20, seed=0)
    scipy = stats.binomtest(2, 4).proportion_ci(method="wilson")
    assert (found.value, found.clustered, found.pairs) == (0.5, (0.5, 0.5), 4)
    assert found.wilson == pytest.approx((scipy.low, scipy.high))
    assert metrics.rate(np.zeros(0), np.zeros(0, dtype=int), resamples=20, seed=0) is None


def test_a_bins_interval_is_over_clusters():
    # One bin: outcomes 1, 0, 1, 1 around ¾. Residual sums of the clusters ¼ and −¼: √(2/1 · (1/16 + 1/16)) / 4 = 1/8.
    (part,) = metrics.reliability(np.array([1.0, -1.0, 1.0, 1.0]), np.array([7, 3, 3, 3]), 1)
    assert part.ci95 == pytest.approx(1.959964 / 8)


def test_bins_weigh_in_the_ece_by_their_pairs():
    # ¾ · |0.6 − 0.8| + ¼ · |0.9 − 0.8|: too timid and too sure do not cancel, and a pair counts as a pair.
    assert metrics.ece([metrics.Bin(0.6, 0.8, 0.0, 3), metrics.Bin(0.9, 0.8, 0.0, 1)]) == pytest.approx(0.175)
    # Seven pairs in three bins: 3, 2 and 2.
    assert [part.pairs for part in metrics.reliability(np.arange(7.0), SINGLE[:7], 3)] == [3, 2, 2]


def test_the_interval_of_the_slope_is_the_one_done_by_hand():
    # Three margins of 1 and one of −1: σ(b) = ¾, b = log 3. With p = ¾ the squares of the scores add up to
    # 3 (1 − p)² + p² = ¾, and so does the information 4 p (1 − p); four clusters: variance 4/3 · ¾ / ¾² = 16/9.
    found = metrics.calibration_slope(np.array([1.0, 1.0, 1.0, -1.0]), SINGLE[:4])
    assert found.value == pytest.approx(math.log(3))
    assert found.ci95 == pytest.approx((math.log(3) - 1.959964 * 4 / 3, math.log(3) + 1.959964 * 4 / 3))
