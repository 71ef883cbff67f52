"""The HTML page of a benchmark: one file, no scripts, nothing fetched."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import textenv.pages
from reward_models.benchmark.compare import Comparison
from reward_models.benchmark.figures import best_of_n_picture, margin_picture
from reward_models.benchmark.measures.probes import Probe
from reward_models.benchmark.measures.robustness import Robustness
from reward_models.benchmark.model import Refused
from reward_models.benchmark.report import COLUMNS, BenchmarkReport, row
from reward_models.preferences import better_pairs
from textenv.pages.figures import Picture, data_uri, reliability_diagram
from textenv.pages.numbers import UNKNOWN, Cell, number, percent, signed, significant
from textenv.stats import Rate

Row = tuple[str, Callable[[BenchmarkReport], Cell | str | None]]
"""A label, and what a model has there: a cell, plain text, or None for unknown."""
FITTED = "scale fitted"
KL_TEXTS = {
    "exact": "KL by enumeration of every response. The small numbers are n.",
    "levels": "The score has few values; the KL is that of the observed share of each. The small numbers are n.",
    "bound": "KL: upper bound log n − (n − 1)/n; the true point is there or further left. The small numbers are n.",
}
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
        legend=COLUMNS,
        columns=[Cell(column.head, column.unit) for column in COLUMNS],
        models=[(Cell(r.model), [Cell(text.replace(" … ", "\u00a0…\u00a0")) for text in row(r)]) for r in reports],
        pictures=[(report.model, pictures(report)) for report in reports],
        heads=[Cell(report.model) for report in reports],
        sections=[
            {"title": title, "text": text, "rows": known_rows(reports, rows(reports))} for title, text, rows in SECTIONS
        ],
        comparison_heads=list(map(Cell, COMPARISON_HEADS)),
        comparisons=list(map(comparison_row, comparisons)),
    )


def known_rows(reports: Sequence[BenchmarkReport], rows: Sequence[Row]) -> list[tuple[Cell, list[Cell]]]:
    """A row per figure and a cell per model; rows that no model knows are left out."""
    out = []
    for label, find in rows:
        found = [find(report) for report in reports]
        cells = [cell if isinstance(cell, Cell) else Cell(cell or UNKNOWN) for cell in found]
        if any(cell.value != UNKNOWN for cell in cells):
            out.append((Cell(label), cells))
    return out


def pictures(report: BenchmarkReport) -> list[Picture]:
    """The pictures of a model: reliability, margins and, where gold is known, best-of-n."""
    bins, points = report.calibration.bins, report.best_of_n
    out = [
        Picture(
            data_uri(reliability_diagram(bins, title="Reliability")),
            "Observed against stated agreement",
            f"{len(bins)} bins of equal mass; 95 % intervals over prompts.",
        ),
        Picture(
            data_uri(margin_picture(signed_margins(report))),
            "Histogram of margins",
            f"{percent(report.accuracy_per_pair.value)} % of the pairs are right. The dark bar holds ties and "
            "near-ties; the outermost percent is in the last bars.",
        ),
    ]
    if points:
        description, text = "Gains of best-of-n against root KL", KL_TEXTS[points[-1].kl_kind]
        out.append(Picture(data_uri(best_of_n_picture(points)), description, text))
    return out


def signed_margins(report: BenchmarkReport) -> np.ndarray:
    """Margins of all pairs in standard deviations within a prompt."""
    sd = report.margins.within_prompt_sd
    gaps = [
        item.scores[a] - item.scores[b] for item in report.scored for a, b in better_pairs(item.responses, item.ranks)
    ]
    return np.array(gaps) / (sd if sd > 0 else 1.0)


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


def edit_cell(value: Robustness) -> Cell:
    note = f"shift {number(value.shift)} sd, accuracy {percent(value.accuracy)} %"
    return Cell(f"{percent(value.flips)} %", note)


def probe_cell(value: Probe) -> Cell:
    note = f"beats the mean: {percent(value.beats_mean)} %"
    return Cell(f"{percent(value.beats_chosen)} %", note, value.example[:200] or "empty")


def accuracy_rows(reports: Sequence[BenchmarkReport]) -> list[Row]:
    names = dict.fromkeys(name for report in reports for name in report.by_category)
    rows: list[Row] = [("all pairs, %", lambda r: rate_cell(r.accuracy_per_pair))]
    rows += [(f"{name}, %", lambda r, name=name: rate_cell(r.by_category.get(name))) for name in names]
    return rows + ACCURACY_ROWS


def keyed_rows(reports: Sequence[BenchmarkReport], field: str, show: Callable[[Any], Cell]) -> list[Row]:
    """A row for every key of a report's mapping."""

    def cell(report: BenchmarkReport, name: str) -> Cell | None:
        value = getattr(report, field).get(name)
        return None if value is None else refused_cell(value) if isinstance(value, Refused) else show(value)

    names = dict.fromkeys(name for report in reports for name in getattr(report, field))
    return [(name, lambda report, name=name: cell(report, name)) for name in names]


def determinism_rows(reports: Sequence[BenchmarkReport]) -> list[Row]:
    def cell(change: float | None) -> str | None:
        return "0" if change == 0 else None if change is None else f"{change:.1e}".replace("e-0", "e-")

    names = dict.fromkeys(name for report in reports for name in report.determinism.changes)
    return [(f"{name}, sd", lambda r, name=name: cell(r.determinism.changes.get(name))) for name in names]


def comparison_row(c: Comparison) -> tuple[Cell, list[Cell]]:
    low, high = map(signed, c.interval)
    counts = [Cell(f"{count:,}") for count in (c.only_first, c.only_second, c.tied)]
    p = "< 0.0001" if c.mcnemar_p < 1e-4 else f"{c.mcnemar_p:.4f}"
    return Cell(f"{c.first} − {c.second}"), [Cell(signed(c.difference), f"({low} … {high})"), *counts, Cell(p)]


def _limit(part: str, show: Callable[[float], str]) -> Callable[[BenchmarkReport], str | None]:
    return lambda report: report.limits and show(getattr(report.limits, part))


def _slope(report: BenchmarkReport) -> Cell:
    slope = report.calibration.slope_per_pair
    of_what = "" if report.calibration.declared else ", of raw scores"
    interval = f"({significant(slope.ci95[0])} … {significant(slope.ci95[1])}{of_what})"
    return Cell(significant(slope.value), interval)


ACCURACY_ROWS: list[Row] = [
    ("Bayes limit, %", _limit("bayes_accuracy", percent)),
    ("distance to the limit, points", lambda r: r.limits and
     plus_minus(r.limits.accuracy_gap, r.limits.accuracy_gap_ci95, percent)),
    ("rank correlation with gold within a prompt", _limit("gold_spearman", number)),
    ("best of K picked, %", lambda r: rate_cell(r.best_of_k.accuracy)),
    ("… by chance, %", lambda r: percent(r.best_of_k.chance)),
    ("tied labels: P(smaller margin), %", lambda r: percent(r.tie_auc)),
    ("NLL, nats", lambda r: Cell(number(r.calibration.nll_per_pair, 3), FITTED * (not r.calibration.declared))),
    ("NLL at the best scale, nats", lambda r: number(r.calibration.nll_per_pair_rescaled, 3)),
    ("NLL floor, nats", _limit("nll_floor", lambda value: number(value, 3))),
    ("Brier score", lambda r: number(r.calibration.brier_per_pair, 3)),
    ("ECE, %", lambda r: Cell(percent(r.calibration.ece_per_pair), f"{len(r.calibration.bins)} bins")),
    ("calibration slope", _slope),
    ("margins, sd: 5 · 25 · 50 · 75 · 95 %", lambda r: " · ".join(map(number, r.margins.quantiles.values()))),
    ("margin against declared strength, ρ", lambda r: number(r.margins.declared_spearman)),
    ("score ties, %", lambda r: percent(r.margins.score_ties)),
]  # fmt: skip
LENGTH_ROWS: list[Row] = [
    ("score with length, ρ within a prompt", lambda r: plus_minus(r.length.spearman, r.length.ci95, number)),
    ("gold with length, ρ", lambda r: number(r.length.gold_spearman)),
    ("labels prefer the longer one, %", lambda r: percent(r.length.chosen_longer)),
    ("accuracy, preferred is longer, %", lambda r: rate_cell(r.length.accuracy_longer)),
    ("accuracy, preferred is shorter, %", lambda r: rate_cell(r.length.accuracy_shorter)),
    ("accuracy, lengths within 10 %, %", lambda r: rate_cell(r.length.accuracy_matched)),
]  # fmt: skip
PROMPT_ROWS: list[Row] = [
    ("own prompt, %", lambda r: rate_cell(r.accuracy_per_pair)),
    ("another prompt, %", lambda r: rate_cell(r.response_only["swapped"])),
    ("empty prompt, %", lambda r: rate_cell(r.response_only["blank"])),
    (
        "prompts cut on the left",
        lambda r: None if r.truncated_prompts is None else f"{r.truncated_prompts:,} of {r.prompts:,}",
    ),
]
SPEED_ROWS: list[Row] = [
    ("texts a second", lambda r: f"{r.throughput.texts_per_second:,.0f}"),
    (
        "real tokens a second",
        lambda r: Cell(f"{r.throughput.tokens_per_second:,.0f}", r.throughput.token_unit),
    ),
    ("growth of peak memory, MB", lambda r: number(r.throughput.peak_memory_growth_mb, 1)),
]

SECTIONS: tuple[tuple[str, str, Callable[[Sequence[BenchmarkReport]], list[Row]]], ...] = (
    (
        "Accuracy and calibration",
        "Every pair counts the same, a tie of scores one half. In brackets the 95 % interval that resamples prompts; "
        "hold the pointer over a figure for Wilson's, which takes pairs as independent.",
        accuracy_rows,
    ),
    (
        "Length",
        "Lengths are in characters. A model that is right where the preferred response is longer and wrong where it "
        "is shorter counts letters.",
        lambda reports: LENGTH_ROWS,
    ),
    (
        "Does it read the prompt?",
        "Accuracy with the prompt removed, or replaced by another one. What is left is answered from the response "
        "alone. A prompt longer than the model's context is cut on the left; a response never is.",
        lambda reports: PROMPT_ROWS,
    ),
    (
        "Harmless edits of the prompt",
        "Share of pairs whose order is reversed, and how far scores move. A model whose vocabulary lacks the edited "
        "words cannot be robust, and a rule may refuse.",
        lambda reports: keyed_rows(reports, "robustness", edit_cell),
    ),
    (
        "Responses that nobody should prefer",
        "Share of items on which each of them scores above the response that was ranked best; equal scores do not "
        "count.",
        lambda reports: keyed_rows(reports, "probes", probe_cell),
    ),
    (
        "The same text, the same score?",
        "Largest change of a score when the rest of its batch changes, in standard deviations within a prompt.",
        determinism_rows,
    ),
    (
        "Speed and memory",
        "On this machine, tokenising included, padding not counted. Memory: by how much the first scoring raised the "
        "highest resident memory of the process; 0 if loading needed more.",
        lambda reports: SPEED_ROWS,
    ),
)
