"""The HTML page of a benchmark: one file, no scripts, nothing fetched."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import textenv.pages
from reward_models.benchmark import measures
from reward_models.benchmark.compare import Comparison
from reward_models.benchmark.measure import BenchmarkReport
from reward_models.benchmark.report import columns, row
from textenv.pages.numbers import UNKNOWN, Cell, signed

COMPARISON_HEADS = (
    "accuracy difference, points",
    "only the first right",
    "only the second right",
    "tied for a model",
    "McNemar p",
)


def write_page(path: str | Path, reports: Sequence[BenchmarkReport], comparisons: Sequence[Comparison] = ()) -> None:
    """Write the page of some models on the same data, whole or not at all."""
    first = reports[0]
    facts = [f"data: {first.data}", f"{first.items:,} items", f"{first.prompts:,} prompts", f"{first.pairs:,} pairs"]
    facts += [f"{first.ties:,} tied pairs"] * bool(first.ties) + [f"{first.skipped:,} malformed"] * bool(first.skipped)
    textenv.pages.write_page(
        path,
        Path(__file__).with_name("page.html.j2"),
        facts=[*facts, f"seed {first.seed}"],
        flags=[(report.model, flag) for report in reports for flag in report.flags],
        legend=columns(),
        columns=[Cell(column.head, column.unit) for column in columns()],
        models=[(Cell(r.model), [Cell(text.replace(" … ", "\u00a0…\u00a0")) for text in row(r)]) for r in reports],
        pictures=[
            (report.model, [found for measure in measures.MEASURES if (found := measure.picture(report))])
            for report in reports
        ],
        heads=[Cell(report.model) for report in reports],
        sections=sections(reports),
        comparison_heads=list(map(Cell, COMPARISON_HEADS)),
        comparisons=list(map(comparison_row, comparisons)),
    )


def sections(reports: Sequence[BenchmarkReport]) -> list[dict[str, Any]]:
    """Title, text and rows of each section; rows that no model knows are left out."""
    out: list[dict[str, Any]] = []
    for measure in measures.MEASURES:
        if measure.title:
            out.append({"title": measure.title, "text": measure.text, "rows": []})
        found = [measure.rows(report) for report in reports]
        for label in dict.fromkeys(label for rows in found for label in rows):
            values = [rows.get(label) for rows in found]
            cells = [value if isinstance(value, Cell) else Cell(value or UNKNOWN) for value in values]
            if any(cell.value != UNKNOWN for cell in cells):
                out[-1]["rows"].append((Cell(label), cells))
    return out


def comparison_row(c: Comparison) -> tuple[Cell, list[Cell]]:
    low, high = map(signed, c.interval)
    counts = [Cell(f"{count:,}") for count in (c.only_first, c.only_second, c.tied)]
    p = "< 0.0001" if c.mcnemar_p < 1e-4 else f"{c.mcnemar_p:.4f}"
    return Cell(f"{c.first} − {c.second}"), [Cell(signed(c.difference), f"({low} … {high})"), *counts, Cell(p)]
