"""The picture of :mod:`benchmarks.overoptimisation`: gold (solid) and proxy (dashed) against √KL, six panels.

Command: ``python -m benchmarks.overoptimisation.figure`` (reads ``results/overoptimisation.json``).
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.overoptimisation.summary import FIT_UP_TO, Curve, averaged, by_size, kind_of, singles
from benchmarks.record import RESULTS
from reward_models.benchmark.overoptimisation import Bend
from textenv.pages.figures import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, RED, STYLE

SIZE_COLOURS = {200: RED, 600: ORANGE, 2_000: GREEN, 8_000: BLUE}
PICTURE = Path(__file__).parents[2] / "docs" / "overoptimisation.png"
BOUND = "√ of the KL's bound (√nats)"
EXACT = "√KL (√nats)"
PANELS = (
    ("Best-of-n, embedded world", BOUND, "upper left", 9),
    ("PPO without a penalty, embedded world", EXACT, "lower left", 9),
    ("PPO, 2,000 comparisons, by KL coefficient", EXACT, "upper right", 9),
    ("Ensembles of four, best-of-n", BOUND, "lower left", 9),
    ("Micro, a proxy that counts words: exact", EXACT, "upper left", 8),
    ("Micro, learned proxies: exact", EXACT, "upper left", 8),
)
"""Title and horizontal axis of each panel; place and font size of its legend."""


@matplotlib.rc_context(STYLE)
def picture(figures: dict[str, Any]) -> Figure:
    """Two rows of three panels."""
    figure = Figure(figsize=(13.5, 8.2), layout="constrained")
    axes = figure.subplots(2, 3)
    selected = {name: {"best_of_n": cell} for name, cell in figures["curves"]["best_of_n"].items()}
    ppo = figures["curves"]["ppo"]
    best_of_n_by_size(axes[0, 0], selected, figures["peaks"])
    ppo_by_size(axes[0, 1], ppo, figures["ppo"])
    ppo_by_coefficient(axes[0, 2], ppo)
    ensembles(axes[1, 0], selected)
    exact(axes[1, 1], figures["curves"], ppo)
    micro_by_size(axes[1, 2], figures["curves"]["tilted"], ppo)
    for panel, (title, label, place, size) in zip(axes.flat, PANELS, strict=True):
        panel.set(title=title, xlabel=label)
        panel.legend(loc=place, fontsize=size)
        panel.axhline(0.0, color=MUTED, linewidth=0.8)
        panel.set_xlim(left=0.0)
    for panel in axes[:, 0]:
        panel.set_ylabel("gain over the reference (sd within a prompt)")
    return figure


def draw(axes: Axes, curve: Curve, colour: str, label: str | None = None, *, proxy: bool = True, **style: Any) -> None:
    """Gold as a line, the proxy dashed in the same colour."""
    d = np.sqrt([max(point["kl"], 0.0) for point in curve])
    axes.plot(d, [point["gold"] for point in curve], color=colour, label=label, **style)
    if proxy:
        axes.plot(d, [point["proxy"] for point in curve], color=colour, linewidth=1.1, linestyle=(0, (3, 2)))


def best_of_n_by_size(axes: Axes, selected: dict[str, Any], peaks: list[dict[str, Any]]) -> None:
    for size, data_sets in by_size(selected, "assistant").items():
        curve = averaged([averaged(singles(each)) for each in data_sets])
        draw(axes, curve, SIZE_COLOURS[size], f"{size:,} comparisons")
        row = next(row for row in peaks if (row["world"], row["comparisons"]) == ("assistant", size))
        fit = Bend("best-of-n", row["bend"]["alpha"], row["bend"]["beta"], 1.0)
        d = np.linspace(0, np.sqrt(curve[-1]["kl"]), 60)
        axes.plot(d, fit.gain(d), color=SIZE_COLOURS[size], linewidth=0.9, linestyle=":")
    axes.plot([], [], color=INK, linewidth=1.1, linestyle=(0, (3, 2)), label="its own score")
    axes.plot([], [], color=INK, linewidth=0.9, linestyle=":", label="d (α − β d)")


def ppo_by_size(axes: Axes, ppo: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    for size in (200, 2_000, 8_000):
        runs = [run for run in ppo if run["world"] == "assistant" and run["kl_coef"] == 0 and is_first(run, size)]
        for number, run in enumerate(runs):
            draw(
                axes, upto(run["path"]), SIZE_COLOURS[size], None if number else f"{size:,} comparisons", linewidth=1.2
            )
        row = next(row for row in rows if (row["proxy"], row["kl_coef"]) == (f"{size} single", 0.0))
        d = np.linspace(0.0, FIT_UP_TO, 80)
        fit = Bend("rl", row["bend"]["alpha"], row["bend"]["beta"], 1.0)
        axes.plot(d, fit.gain(d), color=SIZE_COLOURS[size], linewidth=1.2, linestyle=":")
    axes.plot([], [], color=INK, linewidth=1.2, linestyle=":", label="d (α − β log d)")


def ppo_by_coefficient(axes: Axes, ppo: list[dict[str, Any]]) -> None:
    runs = [run for run in ppo if run["world"] == "assistant" and is_first(run, 2_000)]
    colours = dict(zip(sorted({run["kl_coef"] for run in runs}), (RED, ORANGE, GREEN, BLUE), strict=False))
    for coefficient, colour in colours.items():
        for number, run in enumerate(run for run in runs if run["kl_coef"] == coefficient):
            path = upto(run["path"], 2.6)
            draw(axes, path, colour, None if number else f"β = {coefficient:g}", proxy=False, linewidth=1.2)
            if len(path) == len(run["path"]):  # where it ended, unless that is far off
                axes.plot(np.sqrt(path[-1]["kl"]), path[-1]["gold"], "o", color=colour, markersize=5)


def ensembles(axes: Axes, selected: dict[str, Any]) -> None:
    for size in (200, 2_000):
        data_sets = by_size(selected, "assistant").get(size, [])
        if not data_sets:
            continue
        draw(axes, averaged([averaged(singles(each)) for each in data_sets]), SIZE_COLOURS[size],
             f"{size:,}: mean member", proxy=False)  # fmt: skip
        for way, dashes in (("mean", (0, (5, 2))), ("min", (0, (1, 1.2)))):
            curve = averaged([each[way] for each in data_sets])
            draw(axes, curve, SIZE_COLOURS[size], f"{size:,}: {way} of four", proxy=False, linestyle=dashes)
    axes.set_ylim(bottom=-0.95)


def exact(axes: Axes, curves: dict[str, Any], ppo: list[dict[str, Any]]) -> None:
    frontier = curves["true_frontier"]
    draw(axes, frontier, INK, "gold frontier", proxy=False, linewidth=1.2)
    draw(axes, curves["word_count"]["tilted"], PURPLE, "best policy for the proxy")
    draw(axes, curves["word_count"]["best_of_n"], ORANGE, "best-of-n")
    colours = {0.0: RED, 0.1: GREEN, 0.3: BLUE, 1.0: MUTED}
    for run in ppo:
        if run["proxy"] == "word-count":
            d = np.sqrt([point["kl"] for point in run["path"]])
            label = f"PPO, β = {run['kl_coef']:g}" if run["seed"] == 1 else None
            gold, proxy = ([point[key] for point in run["path"]] for key in ("gold", "proxy"))
            axes.plot(d, gold, "o", color=colours[run["kl_coef"]], markersize=3, label=label)
            axes.plot(d, proxy, "o", color=colours[run["kl_coef"]], markersize=2, markerfacecolor="none")


def micro_by_size(axes: Axes, tilted: dict[str, Any], ppo: list[dict[str, Any]]) -> None:
    for size, colour in SIZE_COLOURS.items():
        curves = [cell["0"] for name, cell in tilted.items() if name.startswith(f"micro-{size}-")]
        if curves:
            for number, curve in enumerate(curves):
                draw(axes, curve, colour, None if number else f"{size:,} comparisons", proxy=False, linewidth=1.2)
    for run in ppo:
        if run["world"] == "micro" and kind_of(run["proxy"]) == "200 single":
            d = np.sqrt([point["kl"] for point in run["path"]])
            axes.plot(d, [point["gold"] for point in run["path"]], "o", color=RED, markersize=2.5)
    axes.plot([], [], "o", color=RED, markersize=2.5, label="PPO, 200 comparisons")
    axes.set_ylim(top=2.1)


def is_first(run: dict[str, Any], size: int) -> bool:
    """Whether a run optimised the first member of a data set of ``size`` comparisons."""
    return run["proxy"].startswith(f"{size}-") and run["proxy"].endswith("/0")


def upto(path: Curve, d: float = 1.6 * FIT_UP_TO) -> Curve:
    """The part of a run that the panel shows."""
    near = [point for point in path if point["kl"] <= d**2]
    return near or path[:1]


def main() -> None:
    figures = json.loads((RESULTS / "overoptimisation.json").read_text("utf-8"))
    picture(figures).savefig(PICTURE, dpi=110)
    print(PICTURE)


if __name__ == "__main__":
    main()
