"""Statistics of scores: agreement, calibration and rank correlation, with their intervals. numpy only.

A *margin* is the score of the response that the label prefers, minus the score of the other: positive is right. Axes:
M pairs, G clusters.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

Z95 = 1.959963984540054


class Rate(NamedTuple):
    """A share with two 95 % intervals."""

    value: float
    wilson: tuple[float, float]
    """As if all pairs were independent."""
    clustered: tuple[float, float]
    """Bootstrap over clusters: pairs of one prompt share responses and are not independent."""
    pairs: int


class Bin(NamedTuple):
    """One bin of a reliability diagram."""

    predicted: float
    """Mean of σ(|margin|): how sure the model is of the response that it prefers."""
    observed: float
    """How often the label agrees with it; a score tie counts one half."""
    ci95: float
    """Half the width of the 95 % interval of ``observed``, over clusters."""
    pairs: int


class Slope(NamedTuple):
    """How much the margins should be stretched to be log-odds."""

    value: float
    """1: calibrated; below 1: too sure of itself; ±inf where every pair points the same way."""
    ci95: tuple[float, float]
    """Sandwich interval over clusters."""


def correct(margins: Float[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
    """1 where the scores agree with the label, 0 where not, ½ for a score tie."""
    return 0.5 * (1.0 + np.sign(margins))


def rate(
    outcomes: Float[np.ndarray, " M"], cluster: Int[np.ndarray, " M"], *, resamples: int, seed: int
) -> Rate | None:
    """Mean of outcomes in [0, 1], every pair of equal weight; None without pairs."""
    if not len(outcomes):
        return None
    value = float(np.mean(outcomes))
    interval = bootstrap_interval(outcomes, cluster, resamples=resamples, seed=seed)
    return Rate(value, wilson(float(np.sum(outcomes)), len(outcomes)), interval, len(outcomes))


def wilson(successes: float, count: int) -> tuple[float, float]:
    """95 % score interval of a share (E. B. Wilson 1927)."""
    p, z2 = successes / count, Z95**2
    middle = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap_interval(
    values: Float[np.ndarray, " M"], cluster: Int[np.ndarray, " M"], *, resamples: int, seed: int
) -> tuple[float, float]:
    """95 % percentile interval of the mean when whole clusters are drawn with replacement (Efron 1979)."""
    means = np.concatenate(list(_resampled(values, cluster, resamples, seed)))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _resampled(values: np.ndarray, cluster: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Means of resampled data, in blocks that bound memory."""
    sums, counts = per_cluster(values, cluster)
    rng, groups = np.random.default_rng(seed), len(sums)
    block = max(1, 2_000_000 // groups)
    for start in range(0, resamples, block):
        times = rng.multinomial(groups, np.full(groups, 1 / groups), size=min(block, resamples - start))
        yield (times @ sums) / (times @ counts)


def per_cluster(values: np.ndarray, cluster: np.ndarray) -> tuple[Float[np.ndarray, " G"], Float[np.ndarray, " G"]]:
    """Sum and number of the values of each cluster."""
    _, place = np.unique(cluster, return_inverse=True)
    return np.bincount(place, weights=values), np.bincount(place).astype(np.float64)


def clustered_se(values: Float[np.ndarray, " M"], cluster: Int[np.ndarray, " M"]) -> float:
    """Standard error of the mean over clusters: ``√(G/(G−1) · Σ_g (Σ_{i∈g} (x_i − x̄))²) / M`` (Liang and Zeger 1986).

    Infinite with a single cluster, which says nothing of the spread between clusters.
    """
    residuals, _ = per_cluster(values - np.mean(values), cluster)
    groups = len(residuals)
    return math.sqrt(groups / (groups - 1) * np.sum(residuals**2)) / len(values) if groups > 1 else math.inf


def sigmoid(x: np.ndarray | float) -> np.ndarray:
    """``(1 + tanh(x / 2)) / 2``, which does not overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(x, dtype=np.float64)))


def nll(margins: Float[np.ndarray, " M"]) -> float:
    """Mean of ``−log σ(margin)``, nats a pair; margins in log-odds."""
    return float(np.mean(np.logaddexp(0.0, -margins)))


def brier(margins: Float[np.ndarray, " M"]) -> float:
    """Mean of ``(1 − σ(margin))²``; ¼ knows nothing (Brier 1950)."""
    return float(np.mean(sigmoid(-margins) ** 2))


def reliability(margins: Float[np.ndarray, " M"], cluster: Int[np.ndarray, " M"], num_bins: int) -> list[Bin]:
    """Confidence and agreement in at most ``num_bins`` bins of equal mass, from unsure to sure."""
    bins = []
    for rows in np.array_split(np.argsort(np.abs(margins), kind="stable"), min(num_bins, len(margins))):
        outcome = correct(margins[rows])
        error = clustered_se(outcome, cluster[rows])
        bins.append(Bin(float(sigmoid(np.abs(margins[rows])).mean()), float(outcome.mean()), Z95 * error, len(rows)))
    return bins


def ece(bins: Sequence[Bin]) -> float:
    """Expected calibration error ``Σ_b n_b/M · |predicted_b − observed_b|`` (Naeini, Cooper, Hauskrecht 2015).

    Noise alone makes it positive: about ``0.4/√n_b`` for bins of ``n_b`` pairs.
    """
    total = sum(part.pairs for part in bins)
    return sum(part.pairs / total * abs(part.predicted - part.observed) for part in bins)


def calibration_slope(margins: Float[np.ndarray, " M"], cluster: Int[np.ndarray, " M"]) -> Slope | None:
    """The b that maximises ``Σ log σ(b · margin)``: logistic regression of the label on the margin, through the origin.

    By Newton's method, which the concavity makes safe with halved steps. None where all margins are 0.
    """
    if not np.any(margins):
        return None
    if np.all(margins >= 0) or np.all(margins <= 0):
        end = math.copysign(math.inf, float(margins[np.argmax(np.abs(margins))]))
        return Slope(end, (end, end))
    scale = float(np.abs(margins).max())
    x, b = margins / scale, 0.0
    for _ in range(200):
        wrong = sigmoid(-b * x)
        step = float(np.sum(x * wrong) / np.sum(x**2 * wrong * (1 - wrong)))
        while nll((b + step) * x) > nll(b * x) + 1e-15:
            step /= 2
        b += step
        if abs(step) <= 1e-12 * max(abs(b), 1.0):
            break
    wrong = sigmoid(-b * x)
    scores, _ = per_cluster(x * wrong, cluster)
    groups = len(scores)
    correction = groups / (groups - 1) if groups > 1 else math.inf
    half = Z95 * math.sqrt(correction * np.sum(scores**2)) / float(np.sum(x**2 * wrong * (1 - wrong)))
    return Slope(b / scale, ((b - half) / scale, (b + half) / scale))


def ranks(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Ranks from 1, the average rank for equals."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - 0.5 * (counts - 1))[place]


def spearman(first: Float[np.ndarray, " N"], second: Float[np.ndarray, " N"]) -> float:
    """Spearman's rank correlation (1904); NaN where one side is constant."""
    a, b = ranks(np.asarray(first)), ranks(np.asarray(second))
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(np.sum(a**2) * np.sum(b**2)))
    return float(np.sum(a * b)) / norm if norm else math.nan


def auc(low: Float[np.ndarray, " A"], high: Float[np.ndarray, " B"]) -> float:
    """P(a value of ``low`` < a value of ``high``), equals one half (Mann and Whitney 1947)."""
    both = ranks(np.concatenate([low, high]))
    return float((np.sum(both[len(low) :]) - len(high) * (len(high) + 1) / 2) / (len(low) * len(high)))


def within_prompt_sd(scores: Float[np.ndarray, " N"], prompt: Int[np.ndarray, " N"]) -> float:
    """Pooled, unbiased standard deviation of scores around the mean of their prompt; NaN without two to a prompt."""
    sums, counts = per_cluster(scores, prompt)
    _, place = np.unique(prompt, return_inverse=True)
    freedom = float(np.sum(counts - 1))
    return math.sqrt(float(np.sum((scores - (sums / counts)[place]) ** 2)) / freedom) if freedom else math.nan


def bayes_limits(gold_gaps: Float[np.ndarray, " M"], temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """What no model can beat on each pair: accuracy ``max(p, 1 − p)`` and NLL ``H(p)``, with ``p = σ(gap / τ)``."""
    p = sigmoid(np.abs(gold_gaps) / temperature)
    return p, np.logaddexp(0.0, -np.abs(gold_gaps) / temperature) + (1 - p) * np.abs(gold_gaps) / temperature
