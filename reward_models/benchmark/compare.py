"""Compare two reward models on the same items, pair by pair."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from reward_models.benchmark.measure import BenchmarkReport, ScoredItem
from reward_models.preferences import better_pairs
from textenv.stats import bootstrap_interval, correct, mcnemar, standard_error


class Comparison(NamedTuple):
    """The first model against the second, pair by pair."""

    first: str
    second: str
    difference: float
    """Accuracy of the first minus accuracy of the second."""
    interval: tuple[float, float]
    """95 % paired bootstrap over clusters (prompts)."""
    se: float
    """Standard error of the difference, over clusters."""
    only_first: int
    """Pairs that only the first orders right."""
    only_second: int
    tied: int
    """Pairs to which at least one model gives equal scores. They count one half, and not at all for McNemar."""
    mcnemar_p: float
    """Two-sided exact p-value (McNemar 1947) of independent pairs; with many per prompt, trust the interval."""
    pairs: int


def compare(first: BenchmarkReport, second: BenchmarkReport, *, resamples: int = 2000, seed: int = 0) -> Comparison:
    """Compare two reports on the same items.

    Raises:
        ValueError: the reports are about different items.
    """
    a, b, cluster = _paired(first.scored, second.scored)
    gap = a - b
    only_first, only_second = int(np.sum(gap == 1)), int(np.sum(gap == -1))
    return Comparison(
        first.model,
        second.model,
        float(gap.mean()),
        bootstrap_interval(gap, cluster, resamples=resamples, seed=seed),
        standard_error(gap, cluster),
        only_first,
        only_second,
        int(np.sum((a == 0.5) | (b == 0.5))),
        mcnemar(only_first, only_second),
        len(gap),
    )


def _paired(
    first: Sequence[ScoredItem], second: Sequence[ScoredItem]
) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"], np.ndarray]:
    """Outcomes of both on every pair, and the pairs' clusters."""
    asked, other = ([(item.prompt, item.responses, item.ranks) for item in items] for items in (first, second))
    if asked != other:
        raise ValueError(
            f"a comparison needs two reports on the same items, got {len(first)} and {len(second)} items that differ. "
            "Run both models with the same data, limit and seed."
        )
    margins: list[tuple[float, float, int]] = []
    clusters: dict[str, int] = {}
    for a, b in zip(first, second, strict=True):
        cluster = clusters.setdefault(a.cluster, len(clusters))
        for i, j in better_pairs(a.responses, a.ranks):
            margins.append((a.scores[i] - a.scores[j], b.scores[i] - b.scores[j], cluster))
    table = np.array(margins)
    return correct(table[:, 0]), correct(table[:, 1]), table[:, 2].astype(np.int64)
