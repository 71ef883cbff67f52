"""The pictures of the demo's report: learning curves, gold against √KL, gold by stage.

Every function takes plain values and returns a matplotlib ``Figure``. Shapes and labels repeat what a colour says.
"""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from agents.experiments.bounds import draw_bounds
from textenv.pages.figures import BLUE, GREEN, INK, ORANGE, PURPLE, STYLE, panel

STAGE_NAMES = {"base": "Base", "sft": "SFT", "best_of_4": "Best of 4", "ppo": "PPO"}
STAGE_COLOURS = {"base": "#8c8c8c", "sft": BLUE, "best_of_4": ORANGE, "ppo": GREEN}
PPO_PATH = "#8fd3bf"


@matplotlib.rc_context(STYLE)
def learning_curve(
    updates: Sequence[Mapping[str, float]],
    key: str,
    title: str,
    *,
    unit: str = "",
    scale: float = 1.0,
    levels: Mapping[str, float] | None = None,
    bounds: Mapping[str, float] | None = None,
) -> Figure:
    """One logged quantity, divided by ``scale``, against episodes; ``levels``: stages' held-out means, dashed;
    ``bounds``: objective of the reference and of the best policy, dotted."""
    figure, axes = panel(4.0, 3.0)
    axes.plot(*curve(updates, key, scale), color=STAGE_COLOURS["ppo"])
    for stage, level in (levels or {}).items():
        axes.axhline(level, color=STAGE_COLOURS[stage], linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            STAGE_NAMES[stage], (1.0, level), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    if bounds:
        draw_bounds(axes, bounds)
    axes.set(title=title, xlabel="episodes", ylabel=unit)
    axes.set_xlim(left=0)
    return figure


@matplotlib.rc_context(STYLE)
def gold_against_kl(
    updates: Sequence[Mapping[str, float]],
    gold_unit: float | None,
    best_of_n: Sequence[Mapping[str, float]],
    sft: tuple[float, float] | None,
    ppo: tuple[float, float, float] | None,
    name: str = "gold score",
) -> Figure:
    """Gold score against √KL (Gao, Schulman and Hilton 2022).

    Args:
        updates: PPO's log; its path is drawn if every update knows ``kl`` and raw ``gold_score``.
        gold_unit: the standard deviation of SFT's gold score, the unit of the vertical axis.
        best_of_n: records of ``n, gold, ci95, kl_bound``.
        sft: held-out gold score of SFT, with its interval; its KL is 0.
        ppo: held-out KL, gold score and its interval.
        name: what the gold score is called.
    """
    figure, axes = panel(4.6, 4.2)
    if best_of_n:
        bound, gold, ci95 = np.asarray([(r["kl_bound"], r["gold"], r.get("ci95") or 0.0) for r in best_of_n]).T
        axes.errorbar(
            np.sqrt(bound), gold, ci95, color=STAGE_COLOURS["best_of_4"], linestyle=(0, (4, 3)), linewidth=1.2,
            marker="s", markersize=6, label="best of n (KL: upper bound)",
        )  # fmt: skip
        for record in best_of_n:
            if record["n"] > 1:  # best of 1 is SFT
                axes.annotate(
                    f"n = {record['n']}", (math.sqrt(record["kl_bound"]), record["gold"]), xytext=(-7, 6),
                    textcoords="offset points", ha="right", fontsize=9,
                )  # fmt: skip
    (kl_episodes, kl), (episodes, gold) = curve(updates, "kl"), curve(updates, "gold_score")
    if gold_unit and len(gold) and np.array_equal(kl_episodes, episodes):
        # A Monte-Carlo estimate of a KL near 0 can be negative; its root is drawn at 0.
        axes.plot(
            np.sqrt(np.maximum(kl, 0.0)), gold / gold_unit, color=PPO_PATH, linewidth=1.0, marker=".",
            markersize=5, label="PPO by update (training prompts)",
        )  # fmt: skip
    if sft:
        axes.errorbar(
            0.0, sft[0], sft[1], color=STAGE_COLOURS["sft"], marker="D", markersize=7, linestyle="", label="SFT",
            zorder=3,
        )  # fmt: skip
    if ppo:
        axes.errorbar(
            math.sqrt(max(ppo[0], 0.0)), ppo[1], ppo[2], color=STAGE_COLOURS["ppo"], ecolor=INK, marker="o",
            markersize=9, markeredgecolor=INK, linestyle="", label="PPO at the end (held-out prompts)", zorder=4,
        )  # fmt: skip
    axes.set(xlabel="√KL from SFT (√nats)", ylabel=f"{name} (SFT sd)")
    axes.margins(x=0.08)
    if axes.has_data():
        figure.legend(loc="outside lower left", handlelength=1.4)
    return figure


@matplotlib.rc_context(STYLE)
def summary_picture(
    updates: Sequence[Mapping[str, float]],
    gold_unit: float | None,
    gold_by_stage: Mapping[str, tuple[float, float]],
    bounds: Mapping[str, float] | None = None,
    name: str = "gold score",
) -> Figure:
    """PPO's curves and every stage's held-out gold score, in one wide picture; ``bounds`` as in ``learning_curve``,
    ``name`` as in ``gold_against_kl``."""
    figure = Figure(figsize=(10.8, 3.6), layout="constrained")
    objective, others, right = figure.subplots(1, 3)
    objective.plot(*curve(updates, "reward"), color=STAGE_COLOURS["ppo"])
    objective.set(title="Objective: score − β KL", xlabel="episodes of PPO")
    if bounds:
        draw_bounds(objective, bounds)
    lines = [("rm_score", "reward-model score", 1.0, INK), ("kl", "KL from SFT (nats)", 1.0, PURPLE)]
    if gold_unit:
        lines.insert(0, ("gold_score", f"{name} (SFT sd)", gold_unit, STAGE_COLOURS["ppo"]))
    for key, label, scale, colour in lines:
        episodes, values = curve(updates, key, scale)
        if len(values):
            others.plot(episodes, values, color=colour, label=label)
    others.set(title="Scores and KL", xlabel="episodes of PPO")
    for axes in (objective, others):
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=5)
        axes.margins(y=0.12)
    if others.lines:
        others.legend(loc="best", handlelength=1.2)
    for position, (stage, (mean, ci95)) in enumerate(gold_by_stage.items()):
        right.bar(position, mean, 0.62, color=STAGE_COLOURS[stage], yerr=ci95, error_kw={"ecolor": INK, "capsize": 3})
        top = max(mean + np.nan_to_num(ci95), 0.0)
        right.annotate(
            f"{mean:.2f}".replace("-", "−"),
            (position, top),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    right.set_xticks(range(len(gold_by_stage)), [STAGE_NAMES[stage] for stage in gold_by_stage])
    right.set(title="Held-out prompts", ylabel=f"{name} (SFT sd)")
    right.grid(axis="x", visible=False)
    right.margins(y=0.14)
    return figure


def curve(updates: Sequence[Mapping[str, float]], key: str, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Episodes and ``key / scale`` of the updates that logged it."""
    points = [(log["episodes"], log[key] / scale) for log in updates if log.get(key) is not None]
    episodes, values = np.asarray(points, dtype=np.float64).reshape(-1, 2).T
    return episodes, values
