"""The HTML page of a benchmark: one file, no scripts, nothing fetched."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from reward_models.benchmark.compare import Comparison
from reward_models.benchmark.figures import best_of_n_picture, margin_picture, reliability_picture, svg_uri
from reward_models.benchmark.measures.probes import Probe
from reward_models.benchmark.measures.robustness import Robustness
from reward_models.benchmark.model import Refused
from reward_models.benchmark.page_text import KL_TEXTS, PAGE, STYLE
from reward_models.benchmark.report import COLUMNS, UNKNOWN, Report, number, percent, row, signed, significant
from reward_models.preferences import better_pairs
from textenv.data.records import atomic_path
from textenv.stats import Rate

Cell = Callable[[Report], str]
FITTED = " <small>scale fitted</small>"


def write_page(path: str | Path, reports: Sequence[Report], comparisons: Sequence[Comparison] = ()) -> None:
    """Write the page of some models on the same data, whole or not at all."""
    first = reports[0]
    facts = [f"data: {first.data}", f"{first.items:,} items", f"{first.prompts:,} prompts", f"{first.pairs:,} pairs"]
    facts += [f"{first.ties:,} tied pairs"] * bool(first.ties) + [f"{first.skipped:,} malformed"] * bool(first.skipped)
    page = PAGE.substitute(
        style=STYLE,
        facts=" · ".join(escape(fact) for fact in [*facts, f"seed {first.seed}"]),
        flags=flag_list(reports),
        table=model_table(reports),
        legend="".join(f"<dt>{escape(column.head)}</dt><dd>{escape(column.what)}</dd>" for column in COLUMNS),
        pictures="".join(pictures(report) for report in reports),
        accuracy=matrix(reports, accuracy_rows(reports)),
        length=matrix(reports, LENGTH_ROWS),
        prompts=matrix(reports, PROMPT_ROWS),
        robustness=matrix(reports, keyed_rows(reports, "robustness", edit_cell)),
        probes=matrix(reports, keyed_rows(reports, "probes", probe_cell)),
        determinism=matrix(reports, determinism_rows(reports)),
        speed=matrix(reports, SPEED_ROWS),
        comparisons=comparison_table(comparisons),
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, "utf-8")


def flag_list(reports: Sequence[Report]) -> str:
    flags = [f"<li><b>{escape(report.model)}</b>: {escape(flag)}</li>" for report in reports for flag in report.flags]
    return f'<ul class="flags">{"".join(flags)}</ul>' if flags else ""


def model_table(reports: Sequence[Report]) -> str:
    """The main table: a row a model."""
    head = "".join(
        f'<th scope="col">{escape(column.head)}{f"<small>{column.unit}</small>" if column.unit else ""}</th>'
        for column in COLUMNS
    )
    body = "".join(
        f'<tr><th scope="row">{escape(report.model)}</th>{cells([unbroken(escape(text)) for text in row(report)])}</tr>'
        for report in reports
    )
    return f'<table class="main"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'


def unbroken(text: str) -> str:
    """Keep an interval on one line."""
    return text.replace(" … ", "&nbsp;…&nbsp;")


def matrix(reports: Sequence[Report], rows: Sequence[tuple[str, Cell]]) -> str:
    """A table with a row a figure and a column a model; rows that no model knows are left out."""
    body = ""
    for label, cell in rows:
        texts = [cell(report) for report in reports]
        if any(text != UNKNOWN for text in texts):
            body += f'<tr><th scope="row">{escape(label)}</th>{cells(texts)}</tr>'
    if not body:
        return '<p class="missing">Not known for this data.</p>'
    head = "".join(f'<th scope="col">{escape(report.model)}</th>' for report in reports)
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def cells(texts: Sequence[str]) -> str:
    return "".join(f"<td>{text}</td>" for text in texts)


def pictures(report: Report) -> str:
    """The three pictures of a model."""
    figures = [
        picture(
            reliability_picture(report.calibration.bins),
            "Observed against stated agreement",
            f"{len(report.calibration.bins)} bins of equal mass; 95 % intervals over prompts.",
        ),
        picture(
            margin_picture(signed_margins(report)),
            "Histogram of margins",
            f"{percent(report.accuracy_per_pair.value)} % of the pairs are right. The dark bar holds ties and "
            "near-ties; the outermost percent is in the last bars.",
        ),
    ]
    if report.best_of_n:
        text = KL_TEXTS[report.best_of_n[-1].kl_kind]
        figures.append(picture(best_of_n_picture(report.best_of_n), "Gains of best-of-n against root KL", text))
    return f'<h3>{escape(report.model)}</h3><div class="pictures">{"".join(figures)}</div>'


def signed_margins(report: Report) -> np.ndarray:
    """Margins of all pairs in standard deviations within a prompt."""
    sd = report.margins.within_prompt_sd
    gaps = [
        item.scores[a] - item.scores[b] for item in report.scored for a, b in better_pairs(item.responses, item.ranks)
    ]
    return np.array(gaps) / (sd if sd > 0 else 1.0)


def picture(figure: Figure, description: str, caption: str = "") -> str:
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(description)}" src="{svg_uri(figure)}">{below}</figure>'


def rate_cell(value: Rate | Refused | None) -> str:
    """A share with its interval over prompts, and how many pairs."""
    if isinstance(value, Refused):
        return refused_cell(value)
    if value is None:
        return UNKNOWN
    low, high = value.clustered
    wilson = f"Wilson {percent(value.wilson[0])} … {percent(value.wilson[1])} %, {value.pairs:,} pairs"
    return f'<span title="{wilson}">{percent(value.value)} <small>({percent(low)} … {percent(high)})</small></span>'


def plus_minus(value: float, ci95: float, show: Callable[[float], str]) -> str:
    return f"{show(value)} <small>± {show(ci95)}</small>"


def refused_cell(value: Refused) -> str:
    return f'<span title="{escape(value.reason)}">{"breaks" if value.crashed else "refused"}</span>'


def edit_cell(value: Robustness) -> str:
    return (
        f"{percent(value.flips)} % <small>shift {number(value.shift)} sd, accuracy {percent(value.accuracy)} %</small>"
    )


def probe_cell(value: Probe) -> str:
    example = escape(value.example[:200]) or "empty"
    return (
        f'<span title="{example}">{percent(value.beats_chosen)} %</span> '
        f"<small>beats the mean: {percent(value.beats_mean)} %</small>"
    )


def accuracy_rows(reports: Sequence[Report]) -> list[tuple[str, Cell]]:
    names = dict.fromkeys(name for report in reports for name in report.by_category)
    rows: list[tuple[str, Cell]] = [("all pairs, %", lambda r: rate_cell(r.accuracy_per_pair))]
    rows += [(f"{name}, %", lambda r, name=name: rate_cell(r.by_category.get(name))) for name in names]
    return rows + ACCURACY_ROWS


def keyed_rows(reports: Sequence[Report], field: str, show: Callable[[Any], str]) -> list[tuple[str, Cell]]:
    """A row for every key of a report's mapping."""

    def cell(report: Report, name: str) -> str:
        value = getattr(report, field).get(name)
        return UNKNOWN if value is None else refused_cell(value) if isinstance(value, Refused) else show(value)

    names = dict.fromkeys(name for report in reports for name in getattr(report, field))
    return [(name, lambda report, name=name: cell(report, name)) for name in names]


def determinism_rows(reports: Sequence[Report]) -> list[tuple[str, Cell]]:
    def cell(changes: Mapping[str, float], name: str) -> str:
        return UNKNOWN if name not in changes else f"{changes[name]:.1e}".replace("e-0", "e-") if changes[name] else "0"

    names = dict.fromkeys(name for report in reports for name in report.determinism.changes)
    return [(f"{name}, sd", lambda r, name=name: cell(r.determinism.changes, name)) for name in names]


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    if not comparisons:
        return ""
    body = ""
    for c in comparisons:
        low, high = map(signed, c.interval)
        values = [
            f"{signed(c.difference)} <small>({low} … {high})</small>",
            f"{c.only_first:,}",
            f"{c.only_second:,}",
            f"{c.tied:,}",
            "&lt; 0.0001" if c.mcnemar_p < 1e-4 else f"{c.mcnemar_p:.4f}",
        ]
        body += f'<tr><th scope="row">{escape(c.first)} − {escape(c.second)}</th>{cells(values)}</tr>'
    heads = (
        "accuracy difference, points",
        "only the first right",
        "only the second right",
        "tied for a model",
        "McNemar p",
    )
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    return (
        "<h2>Model against model</h2><p>The same pairs, compared one by one; the interval resamples prompts. McNemar's "
        "exact test takes pairs as independent, which the pairs of one prompt are not, and leaves out those that tie "
        "for a model: where they disagree, believe the interval.</p>"
        f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def _limit(part: str, show: Callable[[float], str]) -> Cell:
    return lambda report: UNKNOWN if report.limits is None else show(getattr(report.limits, part))


def _slope(report: Report) -> str:
    slope = report.calibration.slope_per_pair
    of_what = "" if report.calibration.declared else ", of raw scores"
    interval = f"{significant(slope.ci95[0])} … {significant(slope.ci95[1])}{of_what}"
    return f"{significant(slope.value)} <small>({interval})</small>"


def _quantiles(report: Report) -> str:
    return " · ".join(number(value) for value in report.margins.quantiles.values())


ACCURACY_ROWS: list[tuple[str, Cell]] = [
    ("Bayes limit, %", _limit("bayes_accuracy", percent)),
    ("distance to the limit, points", lambda r: UNKNOWN if r.limits is None else
     plus_minus(r.limits.accuracy_gap, r.limits.accuracy_gap_ci95, percent)),
    ("rank correlation with gold within a prompt", _limit("gold_spearman", number)),
    ("best of K picked, %", lambda r: rate_cell(r.best_of_k.accuracy)),
    ("… by chance, %", lambda r: percent(r.best_of_k.chance)),
    ("tied labels: P(smaller margin), %", lambda r: UNKNOWN if r.tie_auc is None else percent(r.tie_auc)),
    ("NLL, nats", lambda r: number(r.calibration.nll_per_pair, 3) + FITTED * (not r.calibration.declared)),
    ("NLL at the best scale, nats", lambda r: number(r.calibration.nll_per_pair_rescaled, 3)),
    ("NLL floor, nats", _limit("nll_floor", lambda value: number(value, 3))),
    ("Brier score", lambda r: number(r.calibration.brier_per_pair, 3)),
    ("ECE, %", lambda r: f"{percent(r.calibration.ece_per_pair)} <small>{len(r.calibration.bins)} bins</small>"),
    ("calibration slope", _slope),
    ("margins, sd: 5 · 25 · 50 · 75 · 95 %", _quantiles),
    ("margin against declared strength, ρ", lambda r: number(r.margins.declared_spearman)),
    ("score ties, %", lambda r: percent(r.margins.score_ties)),
]  # fmt: skip
LENGTH_ROWS: list[tuple[str, Cell]] = [
    ("score with length, ρ within a prompt", lambda r: plus_minus(r.length.spearman, r.length.ci95, number)),
    ("gold with length, ρ", lambda r: number(r.length.gold_spearman)),
    ("labels prefer the longer one, %", lambda r: percent(r.length.chosen_longer)),
    ("accuracy, preferred is longer, %", lambda r: rate_cell(r.length.accuracy_longer)),
    ("accuracy, preferred is shorter, %", lambda r: rate_cell(r.length.accuracy_shorter)),
    ("accuracy, lengths within 10 %, %", lambda r: rate_cell(r.length.accuracy_matched)),
]  # fmt: skip
PROMPT_ROWS: list[tuple[str, Cell]] = [
    ("own prompt, %", lambda r: rate_cell(r.accuracy_per_pair)),
    ("another prompt, %", lambda r: rate_cell(r.response_only["swapped"])),
    ("empty prompt, %", lambda r: rate_cell(r.response_only["blank"])),
    (
        "prompts cut on the left",
        lambda r: UNKNOWN if r.truncated_prompts is None else f"{r.truncated_prompts:,} of {r.prompts:,}",
    ),
]
SPEED_ROWS: list[tuple[str, Cell]] = [
    ("texts a second", lambda r: f"{r.throughput.texts_per_second:,.0f}"),
    (
        "real tokens a second",
        lambda r: f"{r.throughput.tokens_per_second:,.0f} <small>{r.throughput.token_unit}</small>",
    ),
    ("growth of peak memory, MB", lambda r: number(r.throughput.peak_memory_growth_mb, 1)),
]
