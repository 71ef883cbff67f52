"""How far annotators agree, and how each of them works.

An annotator's ranking is taken apart into pairs of responses: first better, equal, second better. Which of two is the
first means nothing, so each pair counts in both directions. Intervals resample items, which are independent; the pairs
of an item are not.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import krippendorff
import numpy as np
from jaxtyping import Float, Int

from reward_models.feedback.project import Annotation, Item
from textenv.stats import Mean, mean_ci95

RESAMPLES = 500
SCALE = np.array([-1.0, 0.0, 1.0])
"""First response better, equal, second better."""


class Alpha(NamedTuple):
    """Krippendorff's α: 1 is perfect agreement, 0 that of chance. NaN where nothing can be compared."""

    value: float
    ci95: tuple[float, float]


class AnnotatorFigures(NamedTuple):
    """One annotator at work."""

    name: str
    ranked: int
    skipped: int
    seconds: float
    """Median time for a ranking."""
    agreement: float
    """Share of pairs that the others ranked the same way; equal for one of the two is half. NaN without overlap."""
    checks: float
    """Share of the pairs of check items ranked as known. NaN before the first."""
    first: Mean
    """How much more often than by chance the response shown first is ranked best. 0: no position bias."""


class Agreement(NamedTuple):
    """What a project's annotations say of each other."""

    alpha: Alpha
    """On pairs of responses, ordinal."""
    kendall_w: Mean
    """Kendall's W, mean over items with two annotators or more: 1 is the same ranking, 0 no common order."""
    overlapping: int
    """Items with two annotators or more."""
    first: Mean
    """Position bias over all annotators; see :class:`AnnotatorFigures`."""
    annotators: tuple[AnnotatorFigures, ...]


def agreement(items: Mapping[int, Item], annotations: Sequence[Annotation], *, resamples: int = RESAMPLES) -> Agreement:
    """The figures of a project; skipped items count only as skipped."""
    ranked = [annotation for annotation in annotations if annotation.action == "rank"]
    by_item: dict[int, list[Annotation]] = {}
    for annotation in ranked:
        by_item.setdefault(annotation.item, []).append(annotation)
    several = [group for group in by_item.values() if len(group) > 1]
    levels = {id(annotation): levels_of(annotation.ranking) for annotation in ranked}
    concordance = [kendall_w([levels[id(annotation)] for annotation in group]) for group in several]
    names = dict.fromkeys(annotation.annotator for annotation in annotations)
    return Agreement(
        alpha_of_pairs([[levels[id(annotation)] for annotation in group] for group in several], resamples),
        mean_ci95([value for value in concordance if not math.isnan(value)]),
        len(several),
        position_bias(ranked),
        tuple(_figures(name, items, annotations, by_item) for name in names),
    )


def levels_of(ranking: Sequence[Sequence[int]]) -> list[int]:
    """Rank of each response by place, 0 for the best; equals share one."""
    levels = {place: level for level, group in enumerate(ranking) for place in group}
    return [levels[place] for place in range(len(levels))]


def alpha_of_pairs(groups: Sequence[Sequence[Sequence[int]]], resamples: int, seed: int = 0) -> Alpha:
    """α over the pairs of each item; ``groups`` holds the ranks that each annotator of an item gave."""
    counts = [_pair_counts(levels) for levels in groups]
    if not counts:
        return Alpha(math.nan, (math.nan, math.nan))
    value = alpha(np.concatenate(counts))
    rng = np.random.default_rng(seed)
    drawn = [
        alpha(np.concatenate([counts[i] for i in rng.integers(len(counts), size=len(counts))]))
        for _ in range(resamples if len(counts) > 1 else 0)
    ]
    known = [value for value in drawn if not math.isnan(value)]
    low, high = np.quantile(known, [0.025, 0.975]) if known else (math.nan, math.nan)
    return Alpha(value, (float(low), float(high)))


def alpha(
    counts: Int[np.ndarray, "units values"],
    values: Float[np.ndarray, " values"] = SCALE,
    level: Literal["nominal", "ordinal", "interval"] = "ordinal",
) -> float:
    """Krippendorff's α (2004) of how many annotators gave each unit each value; NaN where all gave the same one."""
    if np.count_nonzero(counts[counts.sum(1) > 1].sum(0)) < 2:
        return math.nan
    return float(krippendorff.alpha(value_counts=counts, value_domain=values, level_of_measurement=level))


def _pair_counts(levels: Sequence[Sequence[int]]) -> Int[np.ndarray, "units 3"]:
    """How many annotators found the first better, the two equal, the second better: each pair in both directions."""
    ranks = np.asarray(levels)
    pairs = itertools.permutations(range(ranks.shape[1]), 2)
    signs = np.stack([np.sign(ranks[:, a] - ranks[:, b]) for a, b in pairs])
    return np.stack([(signs == value).sum(1) for value in SCALE], axis=1)


def kendall_w(levels: Sequence[Sequence[int]]) -> float:
    """Kendall's coefficient of concordance of m rankings of K responses, corrected for ties (Kendall and Gibbons 1990):
    ``12 S / (m² (K³ − K) − m Σ (t³ − t))``. NaN where every annotator found all equal."""
    from scipy.stats import rankdata

    ranks = np.stack([rankdata(row) for row in levels])
    m, k = ranks.shape
    sums = ranks.sum(0)
    ties = sum(int(t**3 - t) for row in levels for t in np.unique(row, return_counts=True)[1])
    below = m**2 * (k**3 - k) - m * ties
    return float(12 * np.sum((sums - sums.mean()) ** 2) / below) if below else math.nan


def position_bias(annotations: Sequence[Annotation]) -> Mean:
    """How much more often than by chance the response shown first is ranked best, with its interval over annotations.
    A rank shared by n responses counts 1/n. Without an interval where all are alike: nothing shows how they vary."""
    excess = []
    for annotation in annotations:
        best = annotation.ranking[0]
        excess.append((annotation.shown[0] in best) / len(best) - 1 / len(annotation.shown))
    found = mean_ci95(excess)
    return found if np.ptp(excess or [0.0]) > 1e-9 else found._replace(ci95=math.nan)


def matching_pairs(own: Sequence[int], other: Sequence[int]) -> list[float]:
    """For each pair of responses 1 where two rankings put it the same way, ½ where one of them has it equal, else 0."""
    pairs = itertools.combinations(range(len(own)), 2)
    signs = [(np.sign(own[a] - own[b]), np.sign(other[a] - other[b])) for a, b in pairs]
    return [1.0 if x == y else 0.0 if x == -y else 0.5 for x, y in signs]


def _figures(
    name: str, items: Mapping[int, Item], annotations: Sequence[Annotation], by_item: Mapping[int, list[Annotation]]
) -> AnnotatorFigures:
    own = [annotation for annotation in annotations if annotation.annotator == name]
    ranked = [annotation for annotation in own if annotation.action == "rank"]
    with_others: list[float] = []
    with_known: list[float] = []
    for annotation in ranked:
        levels = levels_of(annotation.ranking)
        for other in by_item[annotation.item]:
            if other.annotator != name:
                with_others += matching_pairs(levels, levels_of(other.ranking))
        known = items[annotation.item].known
        if known is not None:
            right = levels_of(known)
            matches = zip(itertools.combinations(right, 2), matching_pairs(levels, right), strict=True)
            with_known += [match for (a, b), match in matches if a != b]
    return AnnotatorFigures(
        name,
        len(ranked),
        len(own) - len(ranked),
        float(np.median([annotation.seconds for annotation in ranked])) if ranked else math.nan,
        float(np.mean(with_others)) if with_others else math.nan,
        float(np.mean(with_known)) if with_known else math.nan,
        position_bias(ranked),
    )
