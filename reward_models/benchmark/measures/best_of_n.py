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

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from reward_models.benchmark.layout import FINISH, Inputs, Layout
from reward_models.benchmark.measure import BenchmarkReport, Column, Measure, Run
from reward_models.benchmark.suites import Suite
from reward_models.preferences import prompt_key
from textenv.pages.figures import GREEN, MUTED, ORANGE, STYLE, Picture, data_uri, panel
from textenv.pages.numbers import UNKNOWN, number
from textenv.stats import Mean, mean_ci95, within_prompt_sd

KLKind = Literal["exact", "levels", "bound"]
MAX_LEVELS = 10
"""Scores with at most so many values are discrete."""
KL_LABELS = {
    "exact": "√KL (√nats)",
    "levels": "√KL, from observed shares (√nats)",
    "bound": "√ of the KL's bound (√nats)",
}
KL_TEXTS = {
    "exact": "KL by enumeration of every response. The small numbers are n.",
    "levels": "The score has few values; the KL is that of the observed share of each. The small numbers are n.",
    "bound": "KL: upper bound log n − (n − 1)/n; the true point is there or further left. The small numbers are n.",
}


class Point(NamedTuple):
    """Best of n. Gains are over n = 1, in standard deviations within a prompt, ``_ci95`` half-widths over prompts."""

    n: int
    kl: float
    """To the policy that samples are drawn from, nats."""
    kl_kind: KLKind
    """``exact`` by enumeration; ``levels``: discrete scores, by the share seen of each; else the upper ``bound``."""
    gold: float
    """Mean true score, in the judge's units."""
    gold_ci95: float
    gold_gain: float
    gold_gain_ci95: float
    score_gain: float
    """Gain of the reward model's own score."""
    score_gain_ci95: float
    oracle_gain: float
    """Gold gain if gold itself chose: the most that there is."""


def subset_weights(total: int, n: int) -> Float[np.ndarray, " N"]:
    """``C(i−1, n−1) / C(N, n)`` for i = 1 … N."""
    if not 1 <= n <= total:
        raise ValueError(f"n of best-of-n must be 1 to the {total} samples per prompt, got {n}. Draw more.")
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


def curve(run: Run) -> list[Point] | None:
    """Gold of best-of-n for n = 1, 2, 4, … (``pool`` at most, or what was sampled); None where gold is not known."""
    suite, scorer = run.suite, run.scorer
    most = run.config.pool if suite.pool is None else suite.pool.gold.shape[1]
    sizes = [2**k for k in range(most.bit_length())]
    if suite.world is not None:
        world = suite.world
        strings = len(world.texts)
        asked = Inputs(
            [prompt for prompt in world.prompts for _ in range(strings)],
            world.texts * len(world.prompts),
            {FINISH: ["eos"] * (strings * len(world.prompts))},
        )
        return exact_curve(world, scorer(asked).reshape(len(world.prompts), strings), sizes)
    if suite.pool is None:
        return None
    asked, gold = suite.pool.texts, suite.pool.gold
    _, prompt = np.unique([prompt_key(asked.prompts[x * gold.shape[1]]) for x in range(len(gold))], return_inverse=True)
    return sampled_curve(scorer(asked).reshape(gold.shape), gold, sizes, prompt)


def texts(suite: Suite, layout: Layout) -> int:
    pool = 0 if suite.pool is None else suite.pool.gold.size
    return pool + (0 if suite.world is None else suite.world.rewards.numel())


def cell(report: BenchmarkReport) -> str:
    last = report.best_of_n[-1] if report.best_of_n else None
    return f"{number(last.gold_gain)} of {number(last.oracle_gain)}" if last else UNKNOWN


@matplotlib.rc_context(STYLE)
def best_of_n_picture(points: Sequence[Point]) -> Figure:
    """Gains of gold and of the model's own score against √KL (Gao, Schulman and Hilton 2022)."""
    figure, axes = panel(title="Best of n")
    root = np.sqrt(np.maximum([point.kl for point in points], 0.0))
    axes.plot(root, [p.oracle_gain for p in points], color=MUTED, linestyle=(0, (4, 3)), label="gold, if gold chose")
    axes.errorbar(
        root, [p.score_gain for p in points], [p.score_gain_ci95 for p in points], color=ORANGE, marker="s",
        markersize=4, label="own score",
    )  # fmt: skip
    axes.errorbar(
        root, [p.gold_gain for p in points], [p.gold_gain_ci95 for p in points], color=GREEN, marker="o",
        markersize=5, label="gold",
    )  # fmt: skip
    for point, x in zip(points, root, strict=True):
        if point.n > 1:
            axes.annotate(f"{point.n}", (x, point.gold_gain), xytext=(0, -13), textcoords="offset points", ha="center",
                          fontsize=8, color=MUTED)  # fmt: skip
    axes.set(xlabel=KL_LABELS[points[-1].kl_kind], ylabel="gain over n = 1 (sd)")
    axes.margins(y=0.12)
    axes.legend(loc="best", handlelength=1.4)
    return figure


def picture(report: BenchmarkReport) -> Picture | None:
    points = report.best_of_n
    if not points:
        return None
    text = KL_TEXTS[points[-1].kl_kind]
    return Picture(data_uri(best_of_n_picture(points)), "Gains of best-of-n against root KL", text)


MEASURE = Measure(
    lambda run: {"best_of_n": curve(run)},
    texts=texts,
    columns=(
        Column(
            "gold at n", "sd", "gold gained by best-of-n at the largest n, of what it would gain if gold chose", cell
        ),
    ),
    picture=picture,
)
