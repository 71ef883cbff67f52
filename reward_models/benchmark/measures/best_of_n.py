"""Optimising a reward model by best-of-n: how gold moves while the model's own score rises.

From N samples a prompt, the expected value of the best of n ≤ N is estimated without bias by the mean over all subsets
of n: sorted by score, sample i of N (from 1, worst first) is the best of ``C(i−1, n−1)`` of the ``C(N, n)`` subsets
(Nakano et al. 2021, appendix I). Equal scores share their weight, as if drawn lots for.

The horizontal axis is √KL (Gao, Schulman, Hilton 2022). ``log n − (n−1)/n`` is only an upper bound of the KL, reached
when no two responses tie (Beirami et al. 2024).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from textenv.stats import Mean, mean_ci95, within_prompt_sd

KLKind = Literal["exact", "levels", "bound"]
MAX_LEVELS = 10
"""Scores with at most so many values are discrete."""


class Point(NamedTuple):
    """Best of n. Gains are over n = 1, in standard deviations within a prompt, ``_ci95`` half-widths over prompts."""

    n: int
    kl: float
    """To the policy that samples are drawn from, nats."""
    kl_kind: KLKind
    """``exact`` by enumeration; ``levels``: of discrete scores, from the observed share of each value; else the
    upper ``bound``."""
    gold: float
    """Mean true score, in the judge's units."""
    gold_ci95: float
    gold_gain: float
    gold_gain_ci95: float
    score_gain: float
    """Of the reward model's own score."""
    score_gain_ci95: float
    oracle_gain: float
    """Gold gain if gold itself chose: the most that there is."""


def subset_weights(total: int, n: int) -> Float[np.ndarray, " N"]:
    """``C(i−1, n−1) / C(N, n)`` for i = 1 … N."""
    if not 1 <= n <= total:
        raise ValueError(
            f"n of best-of-n must be between 1 and the {total} samples per prompt, got {n}. Draw more samples."
        )
    return np.array([math.comb(i, n - 1) / math.comb(total, n) for i in range(total)])


def expected_best(
    scores: Float[np.ndarray, "X N"], values: Float[np.ndarray, "X N"], n: int
) -> Float[np.ndarray, " X"]:
    """Unbiased estimate, for each prompt, of the expected ``values`` of the sample with the highest of n ``scores``."""
    weights = subset_weights(scores.shape[1], n)
    out = np.empty(len(scores))
    for x, (score, value) in enumerate(zip(scores, values, strict=True)):
        _, level, counts = np.unique(score, return_inverse=True, return_counts=True)
        shared = np.add.reduceat(weights, np.cumsum(counts) - counts) / counts
        out[x] = np.sum(shared[level] * value)
    return out


def kl_bound(n: int) -> float:
    """``log n − (n − 1)/n``, nats: the KL of best-of-n where no two responses tie, more than it elsewhere."""
    return math.log(n) - (n - 1) / n


def level_kl(masses: Float[np.ndarray, " L"], n: int) -> float:
    """KL of best-of-n where the score has L values, worst first, with the given probabilities: exact.

    Within a value best-of-n chooses as the policy does, so only the values count: ``Σ_l q_l log(q_l / p_l)`` with
    ``q_l = F_l^n − F_{l−1}^n``.
    """
    p = np.asarray(masses, dtype=np.float64)
    q = np.diff(np.minimum(np.cumsum(p), 1.0) ** n, prepend=0.0)
    there = q > 0
    return float(np.sum(q[there] * np.log(q[there] / p[there])))


def sampled_curve(
    scores: Float[np.ndarray, "X N"],
    gold: Float[np.ndarray, "X N"],
    sizes: Sequence[int],
    cluster: Int[np.ndarray, " X"],
) -> list[Point]:
    """The curve from N samples for each of X prompts; prompts of one ``cluster`` are the same one."""
    prompt = np.repeat(np.arange(len(scores)), scores.shape[1])
    unit = within_prompt_sd(scores.ravel(), prompt) or math.nan
    gold_unit = within_prompt_sd(gold.ravel(), prompt) or math.nan

    def mean(values: Float[np.ndarray, " X"]) -> Mean:
        return mean_ci95(values, cluster)

    discrete = len(np.unique(scores)) <= MAX_LEVELS
    points = []
    for n in sizes:
        value = expected_best(scores, gold, n)
        gold_gain = mean((value - gold.mean(1)) / gold_unit)
        gain = mean((expected_best(scores, scores, n) - scores.mean(1)) / unit)
        oracle = float(np.mean(expected_best(gold, gold, n) - gold.mean(1))) / gold_unit
        kl = float(np.mean([_observed_kl(row, n) for row in scores])) if discrete else kl_bound(n)
        points.append(Point(n, kl, "levels" if discrete else "bound", *mean(value), *gold_gain, *gain, oracle))
    return points


def exact_curve(world: Any, scores: Float[np.ndarray, "X Y"], sizes: Sequence[int]) -> list[Point]:
    """The curve of an enumerated world (:class:`textenv.tasks.exact.ExactWorld`) whose reward is gold: no estimates."""
    import torch

    ref, gold = world.ref_logprobs.exp().numpy(), world.rewards.numpy()

    def mean(p: np.ndarray, values: np.ndarray) -> float:
        return float((p * values).sum(1).mean())

    def unit(values: np.ndarray) -> float:
        centred = values - (ref * values).sum(1, keepdims=True)
        return math.sqrt(mean(ref, centred**2)) or math.nan

    points = []
    for n in sizes:
        chosen = world.best_of_n(n, torch.from_numpy(scores))
        p = chosen.logprobs.exp().numpy()
        gold_gain = (chosen.expected_reward - mean(ref, gold)) / unit(gold)
        gain = (mean(p, scores) - mean(ref, scores)) / unit(scores)
        oracle = (world.best_of_n(n).expected_reward - mean(ref, gold)) / unit(gold)
        points.append(Point(n, chosen.kl, "exact", chosen.expected_reward, 0.0, gold_gain, 0.0, gain, 0.0, oracle))
    return points


def _observed_kl(scores: Float[np.ndarray, " N"], n: int) -> float:
    _, counts = np.unique(scores, return_counts=True)
    return level_kl(counts / counts.sum(), n)
