"""How far apart the model puts the two responses of a pair."""

import math
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from reward_models.benchmark.measure import BenchmarkReport, Measure, Run
from reward_models.preferences import better_pairs
from textenv.pages.figures import GREEN, INK, MUTED, ORANGE, STYLE, Picture, data_uri, panel
from textenv.pages.numbers import number, percent
from textenv.stats import spearman

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Margins(NamedTuple):
    """How far the model puts the two responses of a pair apart; positive is right."""

    within_prompt_sd: float
    """Standard deviation of the scores, in the model's units."""
    quantiles: dict[str, float]
    """In those standard deviations."""
    score_ties: float
    """Share of pairs with equal scores."""
    declared_spearman: float | None
    """Rank correlation with the strength of preference in the records; None where none is given."""


def margins_of(run: Run) -> Margins:
    """Signed margins, and whether they follow the strengths that the records declare."""
    margins, sd = run.margins, run.sd
    unit = sd if sd > 0 else math.nan
    declared = np.array([run.suite.items[i].margin for i in run.layout.pairs.item])
    quantiles = {f"{100 * q:.0f} %": float(np.quantile(margins / unit, q)) for q in QUANTILES}
    return Margins(
        within_prompt_sd=sd,
        quantiles=quantiles,
        score_ties=float(np.mean(margins == 0)),
        declared_spearman=spearman(margins, np.abs(declared)) if declared.any() else None,
    )


def signed_margins(report: BenchmarkReport) -> Float[np.ndarray, " M"]:
    """Margins of all pairs in standard deviations within a prompt."""
    sd = report.margins.within_prompt_sd
    gaps = [x.scores[a] - x.scores[b] for x in report.scored for a, b in better_pairs(x.responses, x.ranks)]
    return np.array(gaps) / (sd if sd > 0 else 1.0)


@matplotlib.rc_context(STYLE)
def margin_picture(margins: Float[np.ndarray, " M"]) -> Figure:
    """Histogram of signed margins, in standard deviations within a prompt: right of 0 is right."""
    figure, axes = panel(title="Margins")
    reach = max(float(np.quantile(np.abs(margins), 0.99)), 0.1)
    edges = np.linspace(-reach, reach, 42)  # 0 is inside the middle bin: ties are on neither side
    counts, _ = np.histogram(np.clip(margins, -reach, reach), edges)
    middles = 0.5 * (edges[1:] + edges[:-1])
    colours = [MUTED if abs(x) < 1e-9 else GREEN if x > 0 else ORANGE for x in middles]
    axes.bar(middles, counts / len(margins), width=0.92 * (edges[1] - edges[0]), color=colours)
    axes.axvline(0.0, color=INK, linewidth=0.8)
    for side, label, colour in ((0.02, "wrong", ORANGE), (0.98, "right", GREEN)):
        axes.text(side, 0.97, label, transform=axes.transAxes, ha="left" if side < 0.5 else "right", va="top",
                  color=colour, fontweight="bold")  # fmt: skip
    axes.set(xlabel="margin (sd within a prompt)", ylabel="share of pairs")
    axes.margins(y=0.15)
    return figure


MEASURE = Measure(
    lambda run: {"margins": margins_of(run)},
    rows=lambda report: {
        "margins, sd: 5 · 25 · 50 · 75 · 95 %": " · ".join(map(number, report.margins.quantiles.values())),
        "margin against declared strength, ρ": number(report.margins.declared_spearman),
        "score ties, %": percent(report.margins.score_ties),
    },
    picture=lambda report: Picture(
        data_uri(margin_picture(signed_margins(report))),
        "Histogram of margins",
        f"{percent(report.accuracy_per_pair.value)} % of the pairs are right. The dark bar holds ties and "
        "near-ties; the outermost percent is in the last bars.",
    ),
)
