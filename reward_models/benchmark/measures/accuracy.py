"""How often the order is right, of pairs, categories and whole rankings, and how often it could be."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from reward_models.benchmark.layout import Layout
from reward_models.benchmark.measure import BenchmarkReport, Column, Measure, Run, plus_minus, rate_cell
from reward_models.benchmark.measures.length import within_prompt_spearman
from textenv.pages.numbers import UNKNOWN, Cell, number, percent
from textenv.stats import Rate, auc, bayes_limits, correct, mean_ci95, rate, standard_error


class BestOfK(NamedTuple):
    """Is the response with the highest score the one that was ranked best?"""

    accuracy: Rate
    """Over items; responses of equal score share the answer."""
    chance: float
    """What a random choice would reach."""
    responses: float
    """Mean number of responses per item."""


class Limits(NamedTuple):
    """The best that any model could expect on these pairs."""

    bayes_accuracy: float
    nll_floor: float
    """Nats per pair."""
    accuracy_gap: float
    """Bayes accuracy minus accuracy."""
    accuracy_gap_ci95: float
    accuracy_gap_se: float
    """Over clusters."""
    gold_spearman: float
    """Rank correlation of score and true score within a prompt, mean over prompts."""

    @property
    def leaks(self) -> bool:
        """More right than is possible: the labels have reached the model."""
        return -self.accuracy_gap > 3 * self.accuracy_gap_se + 1e-9


def compute(run: Run) -> dict[str, Any]:
    """Pairs of different texts, equal scores counting one half; all of them, and those of each category."""
    cluster, right = run.layout.pairs.cluster, correct(run.margins)
    category = np.array([run.suite.items[i].category for i in run.layout.pairs.item])
    return {
        "accuracy_per_pair": rate(right, cluster, **run.interval),
        "by_category": {
            part: rate(right[category == part], cluster[category == part], **run.interval)
            for part in sorted(set(category.tolist()) - {""})
        },
        "best_of_k": best_of_k(run),
        "tie_auc": tie_auc(run.layout, run.scores),
        "limits": limits_of(run),
    }


def best_of_k(run: Run) -> BestOfK:
    """Is the response of highest score one that was ranked best? Equal scores share the answer."""
    layout, scores, items = run.layout, run.scores, run.suite.items
    hits, chance, clusters = [], [], {}
    for item, rows in zip(items, layout.rows, strict=True):
        best = np.isin(rows, rows[np.array(item.levels) == 0])  # a copy of the best is as good, wherever it was ranked
        top = scores[rows] == scores[rows].max()
        hits.append(best[top].mean())
        chance.append(best.mean())
        clusters.setdefault(item.group, len(clusters))
    cluster = np.array([clusters[item.group] for item in items])
    accuracy = rate(np.array(hits), cluster, **run.interval)
    assert accuracy is not None
    return BestOfK(accuracy, float(np.mean(chance)), float(np.mean([len(item.responses) for item in items])))


def tie_auc(layout: Layout, scores: Float[np.ndarray, " N"]) -> float | None:
    """P(|margin| of a pair that the labels call equal < |margin| of one that they do not); None without ties."""
    if not len(layout.ties.item):
        return None
    return auc(np.abs(layout.ties.margins(scores)), np.abs(layout.pairs.margins(scores)))


def limits_of(run: Run) -> Limits | None:
    """How far from the best that any model could expect; None where the truth is not known."""
    layout, temperature = run.layout, run.suite.temperature
    if layout.gold is None or temperature is None:
        return None
    pairs = layout.pairs
    best, floor = bayes_limits(pairs.margins(layout.gold), temperature)
    gap = best - correct(run.margins)
    return Limits(
        bayes_accuracy=float(best.mean()),
        nll_floor=float(floor.mean()),
        accuracy_gap=(distance := mean_ci95(gap, pairs.cluster)).mean,
        accuracy_gap_ci95=distance.ci95,
        accuracy_gap_se=standard_error(gap, pairs.cluster),
        gold_spearman=mean_ci95(within_prompt_spearman(run.scores, layout.gold, layout.prompt)).mean,
    )


def cell(report: BenchmarkReport) -> str:
    low, high = report.accuracy_per_pair.clustered
    return f"{percent(report.accuracy_per_pair.value)} ({percent(low)} … {percent(high)})"


def flags(report: BenchmarkReport) -> Iterator[str]:
    if report.limits is not None and report.limits.leaks:
        over = -100 * report.limits.accuracy_gap
        yield f"above the Bayes limit: labels leak (accuracy is {over:.1f} points over what is possible)"


def rows(report: BenchmarkReport) -> Mapping[str, Cell | str | None]:
    limits: Limits | None = report.limits
    known = {} if limits is None else {
        "Bayes limit, %": percent(limits.bayes_accuracy),
        "distance to the limit, points": plus_minus(limits.accuracy_gap, limits.accuracy_gap_ci95, percent),
        "rank correlation with gold within a prompt": number(limits.gold_spearman),
    }  # fmt: skip
    return {
        "all pairs, %": rate_cell(report.accuracy_per_pair),
        **{f"{name}, %": rate_cell(value) for name, value in report.by_category.items()},
        **known,
        "best of K picked, %": rate_cell(report.best_of_k.accuracy),
        "… by chance, %": percent(report.best_of_k.chance),
        "tied labels: P(smaller margin), %": percent(report.tie_auc),
    }


MEASURE = Measure(
    compute,
    columns=(
        Column("accuracy", "%", "share of pairs ordered as the labels do, with the interval over prompts", cell),
        Column(
            "limit",
            "%",
            "accuracy that no model can expect to beat (Bayes), where the truth is known",
            lambda report: UNKNOWN if report.limits is None else percent(report.limits.bayes_accuracy),
        ),
    ),
    flags=flags,
    title="Accuracy and calibration",
    text="Every pair counts the same, a tie of scores one half. In brackets the 95 % interval that resamples prompts; "
    "hold the pointer over a figure for Wilson's, which takes pairs as independent.",
    rows=rows,
)
