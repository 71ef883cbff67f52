"""The benchmark's own pictures: a histogram of margins, and gold against √KL."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from reward_models.benchmark.measures.best_of_n import Point
from textenv.pages.figures import GREEN, INK, MUTED, ORANGE, STYLE, panel

KL_LABELS = {
    "exact": "√KL (√nats)",
    "levels": "√KL, from observed shares (√nats)",
    "bound": "√ of the KL's bound (√nats)",
}


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


@matplotlib.rc_context(STYLE)
def best_of_n_picture(points: Sequence[Point]) -> Figure:
    """Gains of gold and of the model's own score against √KL (Gao, Schulman and Hilton 2022)."""
    figure, axes = panel(title="Best of n")
    root = np.sqrt(np.maximum([point.kl for point in points], 0.0))
    axes.plot(root, [p.oracle_gain for p in points], color=MUTED, linestyle=(0, (4, 3)), label="gold, if gold chose")
    axes.errorbar(
        root, [p.score_gain for p in points], [p.score_gain_ci95 for p in points], color=ORANGE, marker="s",
        markersize=4, label="own score",
    )  # fmt: skip
    axes.errorbar(
        root, [p.gold_gain for p in points], [p.gold_gain_ci95 for p in points], color=GREEN, marker="o",
        markersize=5, label="gold",
    )  # fmt: skip
    for point, x in zip(points, root, strict=True):
        if point.n > 1:
            axes.annotate(f"{point.n}", (x, point.gold_gain), xytext=(0, -13), textcoords="offset points", ha="center",
                          fontsize=8, color=MUTED)  # fmt: skip
    axes.set(xlabel=KL_LABELS[points[-1].kl_kind], ylabel="gain over n = 1 (sd)")
    axes.margins(y=0.12)
    axes.legend(loc="best", handlelength=1.4)
    return figure
