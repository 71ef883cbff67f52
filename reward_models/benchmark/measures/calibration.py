"""Are margins log-odds? Likelihood, Brier score, calibration error and slope."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from reward_models.benchmark.measure import BenchmarkReport, Column, Measure
from textenv.pages.figures import Picture, data_uri, reliability_diagram
from textenv.pages.numbers import Cell, number, percent, significant
from textenv.stats import Bin, Slope, brier, calibration_slope, ece, mean_ci95, nll, reliability


class Calibration(NamedTuple):
    """Margins read as log-odds."""

    unit: float
    """Log-odds in one unit of score, by which the figures below read margins."""
    declared: bool
    """By the model (``score_unit``); else the unit is the slope fitted to these pairs (negative: 0, infinite: 1)."""
    nll_per_pair: float
    """Nats."""
    nll_per_pair_ci95: float
    """Over clusters."""
    nll_per_pair_rescaled: float | None
    """NLL of margins times the slope: what is lost to order, not to scale. None where no slope is finite."""
    brier_per_pair: float
    ece_per_pair: float
    """Over ``bins``, of equal mass."""
    slope_per_pair: Slope
    """Slope of the margins in declared log-odds, or of the raw ones."""
    bins: list[Bin]


def calibration(margins: np.ndarray, cluster: np.ndarray, declared: float | None, num_bins: int) -> Calibration:
    """Margins as log-odds: in the unit that the model declares, else in the one that fits best."""
    slope = calibration_slope(margins * (declared or 1.0), cluster)
    finite = math.isfinite(slope.value)
    fitted = max(slope.value, 0.0) if finite else 1.0
    unit = fitted if declared is None else declared
    odds = margins * unit
    bins = reliability(odds, cluster, num_bins)
    return Calibration(
        unit=unit,
        declared=declared is not None,
        nll_per_pair=(loss := mean_ci95(nll(odds), cluster)).mean,
        nll_per_pair_ci95=loss.ci95,
        nll_per_pair_rescaled=float(nll(odds if declared is None else fitted * odds).mean()) if finite else None,
        brier_per_pair=brier(odds),
        ece_per_pair=ece(bins),
        slope_per_pair=slope,
        bins=bins,
    )


def cell(report: BenchmarkReport) -> str:
    floor = "" if report.limits is None else f" ({number(report.limits.nll_floor, 3)})"
    return number(report.calibration.nll_per_pair, 3) + ("" if report.calibration.declared else "*") + floor


def ece_cell(report: BenchmarkReport) -> str:
    return percent(report.calibration.ece_per_pair)


def slope_cell(report: BenchmarkReport) -> str:
    return significant(report.calibration.slope_per_pair.value)


def rows(report: BenchmarkReport) -> Mapping[str, Cell | str | None]:
    found: Calibration = report.calibration
    slope, of_what = found.slope_per_pair, "" if found.declared else ", of raw scores"
    interval = f"({significant(slope.ci95[0])} … {significant(slope.ci95[1])}{of_what})"
    return {
        "NLL, nats": Cell(number(found.nll_per_pair, 3), "" if found.declared else "scale fitted"),
        "NLL at the best scale, nats": number(found.nll_per_pair_rescaled, 3),
        "NLL floor, nats": report.limits and number(report.limits.nll_floor, 3),
        "Brier score": number(found.brier_per_pair, 3),
        "ECE, %": Cell(percent(found.ece_per_pair), f"{len(found.bins)} bins"),
        "calibration slope": Cell(significant(slope.value), interval),
    }


def picture(report: BenchmarkReport) -> Picture:
    bins = report.calibration.bins
    return Picture(
        data_uri(reliability_diagram(bins, title="Reliability")),
        "Observed against stated agreement",
        f"{len(bins)} bins of equal mass; 95 % intervals over prompts.",
    )


MEASURE = Measure(
    lambda run: {
        "calibration": calibration(run.margins, run.layout.pairs.cluster, run.scorer.score_unit, run.config.bins)
    },
    columns=(
        Column("NLL (floor)", "nats", "negative log-likelihood of a pair; 0.693 knows nothing; *: scale fitted", cell),
        Column("ECE", "%", "mean distance between stated and observed agreement", ece_cell),
        Column("slope", "", "factor that makes margins log-odds: below 1 is too sure, above 1 too timid", slope_cell),
    ),
    rows=rows,
    picture=picture,
)
