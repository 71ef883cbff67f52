"""Statistics: means and shares with their 95 % intervals, calibration and rank correlation, each defined once.

Two conventions hold throughout:

* Every entry of an array weighs the same. Pass one value per pair for a figure per pair, one per ranking for a figure
  per ranking; the name of a reported figure says which (``nll_per_pair``).
* Entries of the same ``cluster``, such as the pairs of one prompt, are not independent. Standard errors and intervals
  treat the clusters as the independent observations. A single cluster says nothing about how clusters differ, so its
  standard error and interval are NaN, as is the sample variance of one value: 0 would claim certainty.

A *margin* is the score of the preferred response minus the other's: positive is right. Axes: M entries, G clusters.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Real
from scipy import stats
from scipy.optimize import root_scalar
from scipy.special import entr, expit, log_expit


class Mean(NamedTuple):
    """A mean with half the width of its 95 % interval."""

    mean: float
    ci95: float


class Rate(NamedTuple):
    """A share with two 95 % intervals."""

    value: float
    wilson: tuple[float, float]
    """Treats all entries as independent."""
    clustered: tuple[float, float]
    """Bootstrap over clusters, or Wilson's over them at 0 and 1, where all resamples are alike; NaN for a single
    cluster."""
    pairs: int


class Bin(NamedTuple):
    """One bin of a reliability diagram."""

    predicted: float
    """Mean of σ(|margin|): how sure the model is of the response that it prefers."""
    observed: float
    """How often the label agrees with it; equal scores count one half."""
    ci95: float
    """Half the width of the 95 % interval of ``observed``; NaN for a single cluster."""
    pairs: int


class Slope(NamedTuple):
    """The factor that turns margins into log-odds."""

    value: float
    """1: calibrated; below 1: overconfident; ±inf where every margin has the same sign; NaN where all are 0."""
    ci95: tuple[float, float]
    """Sandwich interval; NaN for a single cluster."""


def mean_ci95(values: Any, cluster: Any = None) -> Mean:
    """Mean with Student's t interval; clusters (default: each value its own) minus one are its degrees of freedom.

    NaN where nothing can be estimated: the interval of a single cluster, the mean of no values.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return Mean(math.nan, math.nan)
    return Mean(float(values.mean()), _t975(values, cluster) * standard_error(values, cluster))


def standard_error(values: Any, cluster: Any = None) -> float:
    """Standard error of the mean: ``√(G/(G−1) · Σ_g (Σ_{i∈g} (x_i − x̄))²) / M`` (Liang and Zeger 1986).

    Without ``cluster`` all values are independent, and this is ``s/√M``.
    """
    values = np.asarray(values, dtype=np.float64)
    residuals, _ = cluster_sums(values - np.mean(values), _clusters(values, cluster))
    groups = len(residuals)
    return math.sqrt(groups / (groups - 1) * np.sum(residuals**2)) / len(values) if groups > 1 else math.nan


def cluster_sums(values: np.ndarray, cluster: np.ndarray) -> tuple[Float[np.ndarray, " G"], Float[np.ndarray, " G"]]:
    """Sum and number of the values of each cluster."""
    _, place = np.unique(cluster, return_inverse=True)
    return np.bincount(place, weights=values), np.bincount(place).astype(np.float64)


def rate(right: Float[np.ndarray, " M"], cluster: Int[np.ndarray, " M"], *, resamples: int, seed: int) -> Rate | None:
    """Mean of outcomes in [0, 1]; None if there are none."""
    if not len(right):
        return None
    groups, share = len(np.unique(cluster)), float(np.mean(right))
    if share in (0.0, 1.0) and groups > 1:
        interval = wilson(share * groups, groups)
    else:
        interval = bootstrap_interval(right, cluster, resamples=resamples, seed=seed)
    return Rate(float(np.mean(right)), wilson(float(np.sum(right)), len(right)), interval, len(right))


def wilson(successes: float, count: int) -> tuple[float, float]:
    """95 % score interval of a share (E. B. Wilson 1927).

    Score ties are half a success each. The interval of a number of successes that is not whole reaches from the lower
    end for the whole number below it to the upper end for the one above.
    """
    successes = round(successes, 6)
    below, above = (
        stats.binomtest(whole, count).proportion_ci(method="wilson")
        for whole in (math.floor(successes), math.ceil(successes))
    )
    return float(below.low), float(above.high)


def bootstrap_interval(
    values: Float[np.ndarray, " M"], cluster: Int[np.ndarray, " M"], *, resamples: int, seed: int
) -> tuple[float, float]:
    """95 % percentile interval of the mean when whole clusters are drawn with replacement (Efron 1979)."""
    sums, counts = cluster_sums(values, cluster)
    rng, groups = np.random.default_rng(seed), len(sums)
    if groups < 2:
        return math.nan, math.nan
    means, block = [], max(1, 2_000_000 // groups)  # blocks bound the memory
    for start in range(0, resamples, block):
        times = rng.multinomial(groups, np.full(groups, 1 / groups), size=min(block, resamples - start))
        means.append((times @ sums) / (times @ counts))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value (McNemar 1947): is a disagreement as likely to favour the first as the second?"""
    count = only_first + only_second
    return float(stats.binomtest(only_first, count).pvalue) if count else 1.0


def correct(margins: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
    """1 where the scores agree with the label, 0 where not, ½ for equal scores."""
    return 0.5 * (1.0 + np.sign(margins))


def nll(margins: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
    """``−log σ(margin)`` of each pair in nats, with margins in log-odds."""
    return -log_expit(margins)


def brier(margins: Float[np.ndarray, " M"]) -> float:
    """Mean of ``(1 − σ(margin))²``; ¼ for a model that knows nothing (Brier 1950)."""
    return float(np.mean(expit(-margins) ** 2))


def reliability(margins: Float[np.ndarray, " M"], cluster: Int[np.ndarray, " M"], num_bins: int = 10) -> list[Bin]:
    """Confidence and agreement in at most ``num_bins`` bins of equal mass, from unsure to sure."""
    bins = []
    for rows in np.array_split(np.argsort(np.abs(margins), kind="stable"), min(num_bins, len(margins))):
        observed = mean_ci95(correct(margins[rows]), cluster[rows])
        bins.append(Bin(float(expit(np.abs(margins[rows])).mean()), *observed, len(rows)))
    return bins


def ece(bins: Sequence[Bin]) -> float:
    """Expected calibration error ``Σ_b n_b/M · |predicted_b − observed_b|`` (Naeini, Cooper, Hauskrecht 2015).

    Noise alone makes it positive: about ``0.4/√n_b`` for bins of ``n_b`` pairs.
    """
    total = sum(part.pairs for part in bins)
    return sum(part.pairs / total * abs(part.predicted - part.observed) for part in bins)


def calibration_slope(margins: Float[np.ndarray, " M"], cluster: Int[np.ndarray, " M"]) -> Slope:
    """The b that maximises ``Σ log σ(b · margin)``: logistic regression of the label on the margin without intercept,
    since swapping the responses of a pair must swap the odds (Cox 1958).

    The derivative ``Σ x σ(−b x)`` falls in b, and ``x σ(−b x) ≤ 1/(e b)`` for x, b > 0 puts its root between
    ``−M / Σ_{x>0} x`` and ``M / Σ_{x<0} |x|``.
    """
    scale = float(np.abs(margins).max()) or 1.0
    x = margins / scale
    right, wrong = float(x[x > 0].sum()), float(-x[x < 0].sum())
    if not right or not wrong:
        end = math.inf * (right - wrong)  # NaN where both are 0
        return Slope(end, (end, end))
    bracket = -len(x) / right, len(x) / wrong
    b = float(root_scalar(lambda b: np.sum(x * expit(-b * x)), bracket=bracket, xtol=1e-13).root)
    p = expit(-b * x)
    half = _t975(x, cluster) * standard_error(x * p, cluster) / float(np.mean(x**2 * p * (1 - p)))
    return Slope(b / scale, ((b - half) / scale, (b + half) / scale))


def spearman(first: Real[np.ndarray, " N"], second: Real[np.ndarray, " N"]) -> float:
    """Spearman's rank correlation (1904); NaN where one side is constant."""
    if not (np.ptp(first) > 0 and np.ptp(second) > 0):
        return math.nan
    return float(stats.spearmanr(first, second)[0])  # type: ignore[arg-type]


def auc(low: Real[np.ndarray, " A"], high: Real[np.ndarray, " B"]) -> float:
    """P(a value of ``low`` < a value of ``high``), with equal values counting one half (Mann and Whitney 1947)."""
    return float(stats.mannwhitneyu(high, low, method="asymptotic").statistic) / (len(low) * len(high))


def within_prompt_sd(scores: Float[np.ndarray, " N"], prompt: Int[np.ndarray, " N"]) -> float:
    """Pooled, unbiased standard deviation of scores around the mean of their prompt; NaN if no prompt has two."""
    sums, counts = cluster_sums(scores, prompt)
    _, place = np.unique(prompt, return_inverse=True)
    freedom = float(np.sum(counts - 1))
    return math.sqrt(float(np.sum((scores - (sums / counts)[place]) ** 2)) / freedom) if freedom else math.nan


def bayes_limits(
    gold_gaps: Float[np.ndarray, "*M"], temperature: float
) -> tuple[Float[np.ndarray, "*M"], Float[np.ndarray, "*M"]]:
    """What no model can beat on each pair: accuracy ``max(p, 1 − p)`` and NLL ``H(p)``, with ``p = σ(gap / τ)``."""
    p = expit(np.abs(gold_gaps) / temperature)
    return p, entr(p) + entr(1 - p)


def _clusters(values: np.ndarray, cluster: Any) -> np.ndarray:
    return np.arange(len(values)) if cluster is None else np.asarray(cluster)


def _t975(values: np.ndarray, cluster: Any) -> float:
    """The quantile that standard errors are multiplied by for a 95 % interval; NaN for a single cluster."""
    return float(stats.t.ppf(0.975, len(np.unique(_clusters(values, cluster))) - 1))
