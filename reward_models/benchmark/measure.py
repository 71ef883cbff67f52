"""A measure of the benchmark: what it sees, and what it adds to the report, the table and the page."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from reward_models.benchmark.layout import Layout
from reward_models.benchmark.model import BenchmarkedModel, Refused
from reward_models.benchmark.suites import BenchmarkConfig, Suite
from textenv.data.records import write_json
from textenv.pages.figures import Picture
from textenv.pages.numbers import UNKNOWN, Cell, percent
from textenv.stats import Rate, within_prompt_sd


class ScoredItem(NamedTuple):
    """An item with its scores."""

    prompt: Any
    responses: tuple[str, ...]
    """From best to worst."""
    ranks: tuple[int, ...]
    category: str
    cluster: str
    scores: tuple[float, ...]


class BenchmarkReport(NamedTuple):
    """All figures of one model on one suite. What a measure found is an attribute too: ``report.accuracy_per_pair``."""

    model: str
    data: str
    seed: int
    items: int
    prompts: int
    pairs: int
    ties: int
    skipped: int
    truncated_prompts: int | None
    """Prompts too long for a transformer's context, read without their left part; None of a model that does not say."""
    figures: Mapping[str, Any]
    """What the measures found, by its name in JSON."""
    flags: tuple[str, ...]
    """What a reader must not overlook."""
    scored: list[ScoredItem]

    def __getattr__(self, name: str) -> Any:
        if name not in self.figures:
            raise AttributeError(f"a figure must be one of {', '.join(self.figures)}, got {name!r}. Choose one.")
        return self.figures[name]

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite become null."""
        facts = self._asdict()
        figures, flags, scored = (facts.pop(name) for name in ("figures", "flags", "scored"))
        return plain({**facts, **figures, "flags": flags, "scored": scored})

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, whole or not at all."""
        write_json(path, self.to_json())


def plain(value: Any) -> Any:
    """Records as dictionaries, all the way down, in JSON's types."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())  # type: ignore[attr-defined]
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


class Run(NamedTuple):
    """What a measure sees: a model and its scores on a suite."""

    config: BenchmarkConfig
    suite: Suite
    layout: Layout
    scorer: BenchmarkedModel
    scores: Float[np.ndarray, " N"]
    memory_growth: float | None
    """Growth of the process's peak memory over the first scoring, MB; None where the system does not tell."""

    @property
    def interval(self) -> dict[str, int]:
        """Settings of the bootstrap."""
        return {"resamples": self.config.resamples, "seed": self.config.seed}

    @property
    def margins(self) -> Float[np.ndarray, " M"]:
        """Score differences of the pairs; positive is right."""
        return self.layout.pairs.margins(self.scores)

    @property
    def sd(self) -> float:
        """Standard deviation of the scores within a prompt."""
        return within_prompt_sd(self.scores, self.layout.prompt)


class Column(NamedTuple):
    """A column of the table of models."""

    head: str
    unit: str
    what: str
    cell: Callable[[BenchmarkReport], str]


class Measure(NamedTuple):
    """One thing that the benchmark measures. The tables, the page and the JSON follow the order of the measures."""

    compute: Callable[[Run], Mapping[str, Any]]
    """Its figures by their names in JSON."""
    texts: Callable[[Suite, Layout], int] = lambda suite, layout: 0
    """About how many further texts the model will be asked for, if it refuses none."""
    columns: tuple[Column, ...] = ()
    flags: Callable[[BenchmarkReport], Iterable[str]] = lambda report: ()
    """Findings that make other figures worthless, or the model dangerous to optimise."""
    title: str = ""
    """Heading of its section of the page; without one its rows continue the section before."""
    text: str = ""
    rows: Callable[[BenchmarkReport], Mapping[str, Cell | str | None]] = lambda report: {}
    """Label and cell of each row of the section; None is unknown."""
    picture: Callable[[BenchmarkReport], Picture | None] = lambda report: None


def rate_cell(value: Rate | Refused | None) -> Cell:
    """A share with its interval over prompts, and how many pairs."""
    if value is None:
        return Cell()
    if isinstance(value, Refused):
        return refused_cell(value)
    wilson, clustered = (f"{percent(low)} … {percent(high)}" for low, high in (value.wilson, value.clustered))
    return Cell(percent(value.value), f"({clustered})", f"Wilson {wilson} %, {value.pairs:,} pairs")


def plus_minus(value: float, ci95: float, show: Callable[[float], str]) -> Cell:
    return Cell(show(value), f"± {show(ci95)}")


def refused_cell(value: Refused) -> Cell:
    return Cell("breaks" if value.crashed else "refused", hint=value.reason)


def worst(shares: Mapping[str, float]) -> str:
    """The largest share and its name."""
    name = max(shares, key=lambda name: shares[name], default="")
    return UNKNOWN if not name else f"{percent(shares[name])} ({name})" if shares[name] else percent(0.0)
