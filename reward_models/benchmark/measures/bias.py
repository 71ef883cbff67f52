"""What a score hangs on besides quality: the length of a response, and responses read without their prompt."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from reward_models.benchmark.layout import FINISH, Inputs, Layout, Pairs
from reward_models.benchmark.model import BenchmarkedModel, Refused
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


def response_only(layout: Layout, scorer: BenchmarkedModel, **interval: int) -> Mapping[str, Rate | Refused | None]:
    """Accuracy without the prompt: ``blank`` (its text gone), ``swapped`` (that of another item, with its columns).

    What is left of the accuracy is answered without reading the prompt. ``swapped`` is None with a single prompt.
    """
    altered = {"blank": blanked(layout.texts), "swapped": swapped(layout, interval["seed"])}
    return {name: accuracy(layout.pairs, texts, scorer, **interval) for name, texts in altered.items()}


def accuracy(pairs: Pairs, texts: Inputs | None, scorer: BenchmarkedModel, **interval: int) -> Rate | Refused | None:
    """Accuracy on altered texts."""
    scores = None if texts is None else scorer.attempt(texts)
    if not isinstance(scores, np.ndarray):
        return scores
    return rate(correct(pairs.margins(scores)), pairs.cluster, **interval)


def blanked(texts: Inputs) -> Inputs:
    """The same texts with empty prompts; of a chat, the last message is left, empty."""
    return texts._replace(
        prompts=["" if isinstance(prompt, str) else [{**prompt[-1], "content": ""}] for prompt in texts.prompts]
    )


def swapped(layout: Layout, seed: int) -> Inputs | None:
    """Every prompt, with its columns, replaced by another one, the same for all of its responses."""
    _, donors, prompt = np.unique(layout.prompt, return_index=True, return_inverse=True)
    if len(donors) < 2:
        return None
    order = np.random.default_rng(seed).permutation(len(donors))
    following = np.empty_like(order)
    following[order] = np.roll(order, -1)  # one cycle through all prompts: none stays
    source = layout.texts.select(donors[following[prompt]])
    kept = {FINISH: layout.texts.columns[FINISH]}
    return Inputs(source.prompts, layout.texts.responses, source.columns | kept)
