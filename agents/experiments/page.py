"""The page of an experiment: a table for each environment, and learning curves with their range over seeds."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agents.experiments.bounds import draw_bounds
from agents.experiments.run import markdown, summarise, tables
from textenv.data.records import write_json
from textenv.pages import write_page
from textenv.pages.figures import STYLE, Picture, data_uri, save
from textenv.pages.numbers import Cell

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#24292f", "#8c8c8c")
"""Colours of learners (Okabe and Ito 2008)."""
DASHES = ((5, 2), (1, 1.5), (7, 2, 1, 2), (3, 1, 1, 1, 1, 1))
"""Lines of agents that do not learn."""
CURVES = {
    "reward": "objective (score − β KL)",
    "gold_score": "gold score",
    "rm_score": "reward-model score",
    "kl": "KL from the reference, nats",
}


def training_curves(
    results: list[dict[str, Any]], key: str, points: int = 60
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "S n"]]:
    """A grid of episodes, and one row of values per seed; empty without curves."""
    logs = [[(log["episodes"], log[key]) for log in result["curve"] if key in log] for result in results]
    series = [np.asarray(log, dtype=np.float64).T for log in logs if len(log) > 1]
    if not series:
        return np.zeros(0), np.zeros((0, 0))
    episodes = np.linspace(max(x[0] for x, _ in series), min(x[-1] for x, _ in series), points)
    return episodes, np.stack([np.interp(episodes, x, smoothed(y)) for x, y in series])


def smoothed(values: Float[np.ndarray, " n"], window: int = 5) -> Float[np.ndarray, " n"]:
    """Centred moving average; shorter at the ends."""
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


@matplotlib.rc_context(STYLE)
def learning_curves(results: list[dict[str, Any]]) -> Figure | None:
    """Learning curves of the agents of one environment, one panel per quantity; None without curves."""
    keys = [key for key in CURVES if any(key in log for result in results for log in result["curve"])]
    if not keys:
        return None
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["settings"]["agent"], []).append(result)
    learners = [agent for agent, group in groups.items() if any(result["curve"] for result in group)]
    figure = Figure(figsize=(3.9 * len(keys), 3.6), layout="constrained")
    panels = figure.subplots(1, len(keys), squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=True):
        for colour, agent in zip(np.resize(COLOURS, len(learners)), learners, strict=True):
            episodes, values = training_curves(groups[agent], key)
            if len(values):
                axes.plot(episodes, values.mean(0), color=colour, label=agent)
                axes.fill_between(episodes, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        bounds = results[0].get("bounds") if key == "reward" else None
        hidden = {*learners, "reference"} if bounds else set(learners)
        draw_levels(axes, key, {agent: group for agent, group in groups.items() if agent not in hidden})
        if bounds:
            draw_bounds(axes, bounds)
        axes.set(title=CURVES[key], xlabel="episodes")
        axes.set_xlim(left=0)
    lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    handles = [lines[agent] for agent in groups if agent in lines]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), handlelength=2.2)
    return figure


def draw_levels(axes: Axes, key: str, groups: dict[str, list[dict[str, Any]]]) -> None:
    """Agents that do not learn, as lines across; one far from the curves is named at the edge instead."""
    low, high = axes.get_ylim()
    for dashes, (agent, group) in zip(itertools.cycle(DASHES), groups.items()):
        if any(key not in result["figures"] for result in group):
            continue
        level = float(np.mean([result["figures"][key] for result in group]))
        inside = 2 * low - high < level < 2 * high - low
        axes.axhline(level if inside else np.nan, color="#57606a", linewidth=1.2, linestyle=(0, dashes), label=agent)
        if not inside:
            axes.annotate(
                f"{agent}: {level:.3g}", (0.98, 0.12 if level < low else 0.98), xycoords="axes fraction", ha="right",
                va="bottom" if level < low else "top", fontsize=9, color="#57606a",
            )  # fmt: skip


def write_summary(results: list[dict[str, Any]], output: str | Path) -> Path:
    """``summary.json``, ``summary.md``, one ``curves-….png`` per environment, and ``index.html``; returns the page."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    rows = summarise(results)
    write_json(output / "summary.json", {"rows": rows})
    (output / "summary.md").write_text(markdown(rows), "utf-8")
    sections = []
    for env_id, (header, body) in tables(rows).items():
        figure = learning_curves([result for result in results if result["settings"]["env_id"] == env_id])
        picture = None
        if figure is not None:
            save(figure, output / f"curves-{env_id.replace('/', '-')}.png", "png")
            picture = Picture(data_uri(figure, "png"), f"Learning curves in {env_id}")
        lines = [(Cell(agent), list(map(Cell, cells))) for agent, *cells in body]
        sections.append({"title": env_id, "heads": list(map(Cell, header[1:])), "rows": lines, "picture": picture})
    page = output / "index.html"
    write_page(page, Path(__file__).with_name("summary.html.j2"), sections=sections)
    return page
