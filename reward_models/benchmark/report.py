"""Reports as rows of a Markdown table, and what they must not hide."""

from collections.abc import Mapping, Sequence
from typing import Any

from reward_models.benchmark import measures
from reward_models.benchmark.measure import BenchmarkReport, Column
from reward_models.benchmark.model import Refused
from textenv.pages.numbers import signed


def find_flags(report: BenchmarkReport) -> tuple[str, ...]:
    """The flags of every measure, then the altered texts on which the model breaks."""
    altered = [found for found in report.figures.values() if isinstance(found, Mapping)]
    return (
        *(flag for measure in measures.MEASURES for flag in measure.flags(report)),
        *(
            f"breaks on {name!r}: {value.reason}"
            for found in altered
            for name, value in found.items()
            if isinstance(value, Refused) and value.crashed
        ),
    )


def columns() -> list[Column]:
    """The columns of the table of models."""
    return [column for measure in measures.MEASURES for column in measure.columns]


def row(report: BenchmarkReport) -> list[str]:
    """The cells of a model, one for each of :func:`columns`."""
    return [column.cell(report) for column in columns()]


def notes(reports: Sequence[BenchmarkReport], comparisons: Sequence[Any] = ()) -> list[tuple[str, str]]:
    """Flags and comparisons (:class:`~.compare.Comparison`): which model or models, and what."""
    versus = [
        (
            f"{c.first} − {c.second}",
            f"{signed(c.difference)} points of accuracy ({signed(c.interval[0])} … {signed(c.interval[1])}); only the "
            f"first right {c.only_first}, only the second {c.only_second}, tied for a model {c.tied}; McNemar p = "
            f"{c.mcnemar_p:.2g}",
        )
        for c in comparisons
    ]
    return [*((report.model, flag) for report in reports for flag in report.flags), *versus]


def heads() -> list[str]:
    return [f"{column.head}, {column.unit}".rstrip(", ") for column in columns()]


def markdown_table(reports: Sequence[BenchmarkReport], comparisons: Sequence[Any] = ()) -> str:
    """One row per model, and the notes below."""
    lines = ["| model | " + " | ".join(heads()) + " |", "|---" * (len(heads()) + 1) + "|"]
    lines += ["| " + " | ".join([markdown(report.model), *row(report)]) + " |" for report in reports]
    below = [f"- **{markdown(name)}**: {markdown(text)}" for name, text in notes(reports, comparisons)]
    return "\n".join([*lines, *(["", *below] if below else [])]) + "\n"


def markdown(text: str) -> str:
    """Text that cannot break a table."""
    return text.replace("|", "\\|").replace("\n", " ")
