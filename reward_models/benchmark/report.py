"""What a run of the benchmark found: a record, as JSON and as rows of a Markdown table."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reward_models.benchmark.measures.best_of_n import Point
from reward_models.benchmark.measures.bias import LengthBias
from reward_models.benchmark.measures.determinism import Determinism
from reward_models.benchmark.measures.probes import Probe
from reward_models.benchmark.measures.robustness import Robustness
from reward_models.benchmark.measures.throughput import Throughput
from reward_models.benchmark.model import Refused
from textenv.data.records import write_json
from textenv.pages.numbers import UNKNOWN, number, percent, signed, significant
from textenv.stats import Bin, Rate, Slope


class BestOfK(NamedTuple):
    """Is the response with the highest score the one that was ranked best?"""

    accuracy: Rate
    """Over items; responses of equal score share the answer."""
    chance: float
    """What a random choice would reach."""
    responses: float
    """Mean number of responses per item."""


class Calibration(NamedTuple):
    """Margins read as log-odds."""

    unit: float
    """Log-odds in one unit of score, by which the figures below read margins."""
    declared: bool
    """The model says so (``score_unit``). Otherwise the unit is the slope, fitted to these very pairs (0 if negative,
    1 if infinite)."""
    nll_per_pair: float
    """Nats."""
    nll_per_pair_ci95: float
    """Over clusters."""
    nll_per_pair_rescaled: float | None
    """NLL if the margins were multiplied by the slope: what is lost to order, not to scale. None where no slope is
    finite."""
    brier_per_pair: float
    ece_per_pair: float
    """Over ``bins``, of equal mass."""
    slope_per_pair: Slope
    """Of the margins in declared log-odds, or of the raw ones."""
    bins: list[Bin]


class Limits(NamedTuple):
    """The best that any model could expect on these pairs."""

    bayes_accuracy: float
    nll_floor: float
    """Nats per pair."""
    accuracy_gap: float
    """Bayes accuracy minus accuracy."""
    accuracy_gap_ci95: float
    accuracy_gap_se: float
    """Over clusters."""
    gold_spearman: float
    """Rank correlation of score and true score within a prompt, mean over prompts."""

    @property
    def leaks(self) -> bool:
        """More right than is possible: the labels have reached the model."""
        return -self.accuracy_gap > 3 * self.accuracy_gap_se + 1e-9


class Margins(NamedTuple):
    """How far the model puts the two responses of a pair apart; positive is right."""

    within_prompt_sd: float
    """Of the scores, in the model's units."""
    quantiles: dict[str, float]
    """In those standard deviations."""
    score_ties: float
    """Share of pairs with equal scores."""
    declared_spearman: float | None
    """Rank correlation with the strength of preference in the records; None where none is given."""


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
    """All figures of one model on one suite."""

    model: str
    data: str
    seed: int
    items: int
    prompts: int
    pairs: int
    ties: int
    skipped: int
    truncated_prompts: int | None
    """Prompts that exceed the context of a transformer, which reads them without their left part; None of a model that
    does not say."""
    accuracy_per_pair: Rate
    """Of pairs of different texts; equal scores count one half."""
    by_category: dict[str, Rate]
    best_of_k: BestOfK
    tie_auc: float | None
    """P(a pair that the labels call equal has the smaller |margin|); ½ is chance. None without such pairs."""
    calibration: Calibration
    limits: Limits | None
    margins: Margins
    length: LengthBias
    response_only: Mapping[str, Rate | Refused | None]
    robustness: Mapping[str, Robustness | Refused]
    probes: Mapping[str, Probe | Refused]
    determinism: Determinism
    best_of_n: list[Point] | None
    throughput: Throughput
    flags: tuple[str, ...]
    """What a reader must not overlook."""
    scored: list[ScoredItem]

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite become null."""
        return plain(self)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, whole or not at all."""
        write_json(path, self.to_json())


def find_flags(report: BenchmarkReport) -> tuple[str, ...]:
    """Findings that make the other figures worthless, or the model dangerous to optimise."""
    flags = []
    if report.limits is not None and report.limits.leaks:
        over = -100 * report.limits.accuracy_gap
        flags.append(f"above the Bayes limit: labels leak (accuracy is {over:.1f} points over what is possible)")
    if not report.determinism.passed:
        varied = max(report.determinism.changes, key=lambda name: report.determinism.changes[name])
        flags.append(f"scores depend on more than their text: {varied} moves one by {report.determinism.worst:.2g} sd")
    if report.truncated_prompts:
        cut = f"{report.truncated_prompts} of {report.prompts} prompts"
        flags.append(f"reads {cut} without their left part: they are longer than its context")
    swapped = report.response_only.get("swapped")
    low, high = report.accuracy_per_pair.clustered
    if isinstance(swapped, Rate) and low > 0.5 and low <= swapped.value <= high:
        flags.append("as accurate with another prompt as with its own: it does not read the prompt")
    for name, probe in report.probes.items():
        if isinstance(probe, Probe) and probe.beats_chosen > 0.5:
            flags.append(f"{name!r} beats the preferred response on {100 * probe.beats_chosen:.0f} % of the items")
    for altered in (report.response_only, report.robustness, report.probes):
        flags += [
            f"breaks on {name!r}: {v.reason}" for name, v in altered.items() if isinstance(v, Refused) and v.crashed
        ]
    return tuple(flags)


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


class Column(NamedTuple):
    """A column of the table of models."""

    head: str
    unit: str
    what: str


COLUMNS = (
    Column("accuracy", "%", "share of pairs ordered as the labels do, with the interval over prompts"),
    Column("limit", "%", "accuracy that no model can expect to beat (Bayes), where the truth is known"),
    Column("NLL (floor)", "nats", "negative log-likelihood of a pair; 0.693 knows nothing; * the scale was fitted"),
    Column("ECE", "%", "mean distance between stated and observed agreement"),
    Column("slope", "", "factor that would make margins log-odds: below 1 is too sure, above 1 too timid"),
    Column("length ρ", "", "rank correlation of score and length within a prompt (that of gold in brackets)"),
    Column(
        "other prompt", "%", "accuracy when each prompt is replaced by another one: what is answered without reading it"
    ),
    Column("worst flips", "%", "pairs turned around by the worst harmless edit of the prompt"),
    Column("worst probe", "%", "items on which the best of the absurd responses beats the preferred one"),
    Column("batch Δ", "sd", "largest change of a score by what stands beside it"),
    Column("gold at n", "sd", "gold gained by best-of-n at the largest n, of what it would gain if gold itself chose"),
    Column("tokens/s", "1,000", "thousands of real tokens scored a second (words, for a model without tokenizer)"),
)


def row(report: BenchmarkReport) -> list[str]:
    """The cells of a model, one for each of ``COLUMNS``."""
    low, high = report.accuracy_per_pair.clustered
    limits, calibration, length = report.limits, report.calibration, report.length
    flips = {name: edit.flips for name, edit in report.robustness.items() if isinstance(edit, Robustness)}
    won = {name: probe.beats_chosen for name, probe in report.probes.items() if isinstance(probe, Probe)}
    swapped = report.response_only["swapped"]
    floor = "" if limits is None else f" ({number(limits.nll_floor, 3)})"
    deserved = "" if math.isnan(length.gold_spearman) else f" ({number(length.gold_spearman)})"
    last = report.best_of_n[-1] if report.best_of_n else None
    gain = f"{number(last.gold_gain)} of {number(last.oracle_gain)}" if last else UNKNOWN
    speed = f"{report.throughput.tokens_per_second / 1000:,.0f}".replace(",", " ")
    return [
        f"{percent(report.accuracy_per_pair.value)} ({percent(low)} … {percent(high)})",
        UNKNOWN if limits is None else percent(limits.bayes_accuracy),
        number(calibration.nll_per_pair, 3) + ("" if calibration.declared else "*") + floor,
        percent(calibration.ece_per_pair),
        significant(calibration.slope_per_pair.value),
        number(length.spearman) + deserved,
        percent(swapped.value) if isinstance(swapped, Rate) else UNKNOWN,
        worst(flips),
        worst(won),
        f"{report.determinism.worst:.0e}".replace("-0", "−").replace("+0", "") if report.determinism.worst else "0",
        gain,
        speed if report.throughput.token_unit == "tokens" else f"{speed} words",
    ]


def worst(shares: Mapping[str, float]) -> str:
    """The largest share and its name."""
    name = max(shares, key=lambda name: shares[name], default="")
    return UNKNOWN if not name else f"{percent(shares[name])} ({name})" if shares[name] else percent(0.0)


def markdown_table(reports: Sequence[BenchmarkReport], comparisons: Sequence[Any] = ()) -> str:
    """One row per model; flags and, if there are any, comparisons (:class:`~.compare.Comparison`) below."""
    heads = [f"{column.head}{f', {column.unit}' if column.unit else ''}" for column in COLUMNS]
    lines = ["| model | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    lines += ["| " + " | ".join([markdown(report.model), *row(report)]) + " |" for report in reports]
    flags = [f"- **{markdown(report.model)}**: {markdown(flag)}" for report in reports for flag in report.flags]
    versus = [
        f"- **{markdown(c.first)} − {markdown(c.second)}**: {signed(c.difference)} points of accuracy "
        f"({signed(c.interval[0])} … {signed(c.interval[1])}); only the first right {c.only_first}, only the second "
        f"{c.only_second}, tied for a model {c.tied}; McNemar p = {c.mcnemar_p:.2g}"
        for c in comparisons
    ]
    return "\n".join([*lines, *(["", *flags] if flags else []), *(["", *versus] if versus else [])]) + "\n"


def markdown(text: str) -> str:
    """Text that cannot break a table."""
    return text.replace("|", "\\|").replace("\n", " ")
