"""How scores go with the length of a response."""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from reward_models.benchmark.layout import Layout
from reward_models.benchmark.measure import BenchmarkReport, Column, Measure, plus_minus, rate_cell
from textenv.pages.numbers import number, percent
from textenv.stats import Rate, correct, mean_ci95, rate, spearman

MATCHED = 0.1
"""Lengths that differ by at most this share of the longer one count as matched."""


class LengthBias(NamedTuple):
    """How scores go with length, in characters."""

    spearman: float
    """Rank correlation of score and length within a prompt, mean over the prompts whose lengths differ; NaN if none."""
    ci95: float
    gold_spearman: float
    """The same of the true scores: how much of it is deserved. NaN where gold is not known."""
    chosen_longer: float
    """Share of pairs whose preferred response is the longer one, equal lengths counting one half: the labels' own
    preference for length, and the accuracy of the rule "longer is better"."""
    accuracy_longer: Rate | None
    """Accuracy where the preferred response is longer by more than ``MATCHED``."""
    accuracy_shorter: Rate | None
    accuracy_matched: Rate | None


def length_bias(layout: Layout, scores: Float[np.ndarray, " N"], **interval: int) -> LengthBias:
    """Length bias of scores. ``interval``: ``resamples`` and ``seed`` of the bootstrap."""
    lengths = np.array([len(response) for response in layout.texts.responses], dtype=np.float64)
    values = within_prompt_spearman(scores, lengths, layout.prompt)
    gold = [] if layout.gold is None else within_prompt_spearman(layout.gold, lengths, layout.prompt)
    pairs, outcome = layout.pairs, correct(layout.pairs.margins(scores))
    longest = np.maximum(lengths[pairs.first], lengths[pairs.second])
    excess = pairs.margins(lengths) / np.maximum(longest, 1.0)

    def accuracy(rows: Any) -> Rate | None:
        return rate(outcome[rows], pairs.cluster[rows], **interval)

    return LengthBias(
        *mean_ci95(values),
        gold_spearman=mean_ci95(gold).mean,
        chosen_longer=float(correct(excess).mean()),
        accuracy_longer=accuracy(excess > MATCHED),
        accuracy_shorter=accuracy(excess < -MATCHED),
        accuracy_matched=accuracy(np.abs(excess) <= MATCHED),
    )


def within_prompt_spearman(
    scores: Float[np.ndarray, " N"], others: Float[np.ndarray, " N"], prompt: Int[np.ndarray, " N"]
) -> list[float]:
    """Rank correlation of each prompt with differing ``others``; 0 where the scores are constant."""
    order = np.argsort(prompt, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(prompt[order])) + 1)
    return [float(np.nan_to_num(spearman(scores[g], others[g]))) for g in groups if np.ptp(others[g]) > 0]


def cell(report: BenchmarkReport) -> str:
    deserved = report.length.gold_spearman
    return number(report.length.spearman) + ("" if math.isnan(deserved) else f" ({number(deserved)})")


MEASURE = Measure(
    lambda run: {"length": length_bias(run.layout, run.scores, **run.interval)},
    columns=(
        Column("length ρ", "", "rank correlation of score and length within a prompt (gold's in brackets)", cell),
    ),
    title="Length",
    text="Lengths are in characters. A model that is right where the preferred response is longer and wrong where it "
    "is shorter counts letters.",
    rows=lambda report: {
        "score with length, ρ within a prompt": plus_minus(report.length.spearman, report.length.ci95, number),
        "gold with length, ρ": number(report.length.gold_spearman),
        "labels prefer the longer one, %": percent(report.length.chosen_longer),
        "accuracy, preferred is longer, %": rate_cell(report.length.accuracy_longer),
        "accuracy, preferred is shorter, %": rate_cell(report.length.accuracy_shorter),
        "accuracy, lengths within 10 %, %": rate_cell(report.length.accuracy_matched),
    },
)
