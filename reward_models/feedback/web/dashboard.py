"""What the owner of a project sees: how much is done, how fast, and how far annotators agree."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from reward_models.feedback.agreement import agreement
from reward_models.feedback.arena import battles_of, match_row, matches, rating_row, ratings
from reward_models.feedback.project import Annotation, Item, Project
from textenv.pages.numbers import UNKNOWN, number, percent

RESAMPLES = 200
"""Of the intervals on this page, which are computed again after each answer."""
KEEP_SECONDS = 2.0
"""Figures are computed at most so often."""


class Figure(NamedTuple):
    """One tile."""

    name: str
    value: str
    note: str = ""


class Table(NamedTuple):
    """One table."""

    title: str
    text: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


class Dashboard:
    """Figures of a project, kept until somebody answers."""

    def __init__(
        self,
        project: Project,
        live: Callable[[], Sequence[Figure]] | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.project, self.live, self.clock = project, live, clock
        self._lock = threading.Lock()
        self._kept: tuple[int, float, dict[str, Any]] | None = None
        self._items: dict[int, Item] = {}

    def values(self) -> dict[str, Any]:
        """``tiles`` and ``tables`` of the page."""
        with self._lock:
            (row,) = self.project.rows("SELECT COALESCE(MAX(id), 0) AS last FROM annotations")
            now = self.clock()
            if self._kept is None or (self._kept[0] != row["last"] and now - self._kept[1] > KEEP_SECONDS):
                self._kept = row["last"], now, self._compute()
            figures = self._kept[2]
        return {"tiles": [*figures["tiles"], *(self.live() if self.live else ())], "tables": figures["tables"]}

    def _compute(self) -> dict[str, Any]:
        if len(self._items) != self.project.count():  # items never change
            self._items = {item.id: item for item in self.project.items()}
        annotations = self.project.annotations()
        found = agreement(self._items, annotations, resamples=RESAMPLES)
        (counts,) = self.project.rows(
            "SELECT COUNT(*) AS items, COALESCE(SUM(done >= needed), 0) AS done FROM items "
            "WHERE needed > 0 AND known IS NULL"
        )
        ranked = sum(annotation.action == "rank" for annotation in annotations)
        recent = sum(annotation.created > self.clock() - 3600 for annotation in annotations)
        low, high = found.alpha.ci95
        tiles = [
            Figure("answers", str(ranked), f"{len(annotations) - ranked} skipped, {recent} in the last hour"),
            Figure("items done", f"{counts['done']} of {counts['items']}", "check items left out"),
            Figure(
                "Krippendorff’s α", number(found.alpha.value), f"95 %: {number(low)} … {number(high)}; pairs, ordinal"
            ),
            Figure(
                "Kendall’s W", number(found.kendall_w.mean),
                f"± {number(found.kendall_w.ci95)}; {found.overlapping} items with several annotators",
            ),
            Figure(
                "shown first, ranked best", f"{_points(found.first.mean)}",
                f"± {percent(found.first.ci95)} percentage points beyond chance",
            ),
        ]  # fmt: skip
        people = Table(
            "Annotators",
            "Agreement is the share of pairs that others ranked the same way; check items have a known ranking.",
            (
                "name",
                "ranked",
                "skipped",
                "median seconds",
                "agreement, %",
                "check items right, %",
                "shown first, +points",
            ),
            [
                (
                    own.name,
                    str(own.ranked),
                    str(own.skipped),
                    number(own.seconds, 1),
                    percent(own.agreement),
                    percent(own.checks),
                    f"{_points(own.first.mean)} ± {percent(own.first.ci95)}",
                )
                for own in found.annotators
            ],
        )
        tables = [people] if found.annotators else []
        if self.project.kind == "arena":
            tables = [*arena_tables(list(self._items.values()), annotations), *tables]
        return {"tiles": tiles, "tables": tables}


def arena_tables(items: Sequence[Item], annotations: Sequence[Annotation]) -> list[Table]:
    """Ratings and pairwise results of an arena."""
    battles = battles_of(items, annotations)
    rated = Table(
        "Ratings",
        "Bradley–Terry on the Elo scale: 400 points are ten times the odds of winning. 95 % bootstrap over prompts.",
        ("model", "rating", "95 %", "battles"),
        [rating_row(own) for own in ratings(battles, resamples=RESAMPLES)],
    )
    against = Table(
        "Each against each",
        "Win rate of the first, ties half, with Wilson's 95 % interval; exact sign test without ties.",
        ("models", "wins", "ties", "losses", "win rate, %", "95 %", "p"),
        [match_row(own) for own in matches(battles)],
    )
    return [rated, against]


def _points(share: float) -> str:
    return UNKNOWN if math.isnan(share) else f"{100 * share:+.1f}".replace("-", "−")
