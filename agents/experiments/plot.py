"""Curves of several runs in one picture, the objective first: learners by episodes, supervised training by steps."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from agents.experiments.bounds import draw_bounds, known_bounds
from agents.experiments.page import COLOURS, training_curves
from agents.logs.files import CURVES, read_bounds
from textenv.pages.figures import STYLE

PANELS = {
    "reward": "objective (score − β KL)",
    "rm_score": "reward-model score",
    "gold_score": "gold score",
    "kl": "KL from the reference, nats",
    "response_tokens": "response length, tokens",
    "eos_rate": "share of responses that end",
}
SUPERVISED = {
    "loss": "training loss",
    "eval_nll": "held-out NLL",
    "eval_nll_per_ranking": "held-out NLL in a ranking",
    "eval_accuracy_per_ranking": "held-out accuracy in a ranking",
}
"""Figures of SFT, reward models and DPO, by optimiser steps."""
Run = dict[str, Any]
"""``{"curve": [{"episodes": 256.0, "reward": …}, …], "bounds": {"reference": …, "optimum": …} or None}``."""


def read_runs(folders: Sequence[Path]) -> dict[str, list[Run]]:
    """Names, and the runs of each: those of a name differ in their seed.

    A folder is that of a learner, of an experiment (one name for each agent), or holds such folders, like the demo's.

    Raises:
        ValueError: a folder holds no curves.
    """
    names = [folder.resolve().name for folder in folders]
    runs: dict[str, list[Run]] = {}
    for folder, name in zip(folders, names, strict=True):
        name = str(folder) if names.count(name) > 1 else name
        found = list(_runs_below(folder, name))
        if not found:
            rule = f"a run must be a folder with {CURVES}, or an experiment's, got {str(folder)!r} without curves"
            raise ValueError(f"{rule}. Name the --output of a training.")
        for label, run in found:
            runs.setdefault(label, []).append(run)
    return runs


def _runs_below(folder: Path, name: str) -> Iterator[tuple[str, Run]]:
    if (folder / CURVES).is_file():
        yield name, {"curve": read_curve(folder / CURVES), "bounds": read_bounds(folder)}
        return
    cells = {path.parent: json.loads(path.read_text("utf-8")) for path in sorted(folder.rglob("cell.json"))}
    cells |= {path.parent: json.loads(path.read_text("utf-8")) for path in sorted(folder.rglob("result.json"))}
    for cell, content in cells.items():
        settings, unfinished = content["settings"], cell / "checkpoint" / CURVES
        curve = content.get("curve") or (read_curve(unfinished) if unfinished.is_file() else [])
        if curve:
            bounds = known_bounds(folder, settings) if _trained_as_measured(settings) else None
            yield f"{name}: {settings['agent']} in {settings['env_id']}", {"curve": curve, "bounds": bounds}
    if not cells:
        for path in sorted(folder.rglob(CURVES)):
            run = {"curve": read_curve(path), "bounds": read_bounds(path.parent)}
            yield f"{name}/{path.parent.relative_to(folder)}", run


def _trained_as_measured(settings: Mapping[str, Any]) -> bool:
    """Whether an agent was measured on the objective that it was trained on, other prompts apart."""
    trained, measured = ({**settings.get(name, {}), "prompts": None} for name in ("environment", "evaluated"))
    return trained == measured


def read_curve(path: Path) -> list[dict[str, float]]:
    """The lines of a file of curves, without one that is being written."""
    lines = path.read_text("utf-8").splitlines(keepends=True)
    return [on_one_axis(json.loads(line)) for line in lines if line.endswith("\n")]


def on_one_axis(entry: dict[str, float]) -> dict[str, float]:
    """An entry of a history whose place is called ``episodes``; supervised training counts steps."""
    return entry if "episodes" in entry else {**entry, "episodes": entry["step"]}


@matplotlib.rc_context(STYLE)
def compare_curves(runs: dict[str, list[Run]]) -> Figure:
    """A panel for each quantity that a run knows, a line for each name; the band is the range over seeds. Reference and
    optimum are drawn where all runs have the same.

    Raises:
        ValueError: no run has two updates yet.
    """
    panels_of = PANELS | SUPERVISED
    curves = {
        key: {name: training_curves(group, key, points=200) for name, group in runs.items()} for key in panels_of
    }  # fmt: skip
    known = [key for key, lines in curves.items() if any(len(values) for _, values in lines.values())]
    if not known:
        raise ValueError(f"a curve must have two updates or more, got fewer in {', '.join(runs)}. Wait for more.")
    bounds: list[Any] = []  # of each learner, once
    for run in (run for group in runs.values() for run in group if any("reward" in log for log in run["curve"])):
        if run.get("bounds") not in bounds:
            bounds.append(run.get("bounds"))
    columns = min(len(known), 3)
    rows = -(-len(known) // columns)
    figure = Figure(figsize=(3.9 * columns, 3.1 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, key in zip(panels, known, strict=False):
        for colour, (name, (episodes, values)) in zip(np.resize(COLOURS, len(runs)), curves[key].items(), strict=True):
            if len(values):
                axes.plot(episodes, values.mean(0), color=colour, label=name)
                axes.fill_between(episodes, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        if key == "reward" and len(bounds) == 1 and bounds[0]:
            draw_bounds(axes, bounds[0])
        axes.set(title=panels_of[key], xlabel="steps" if key in SUPERVISED else "episodes")
        axes.set_xlim(left=0)
    for axes in panels[len(known) :]:
        axes.set_axis_off()
    lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    labels = [name for name in runs if name in lines]
    figure.legend(
        [lines[name] for name in labels],
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 3),
        handlelength=2.2,
    )
    return figure
