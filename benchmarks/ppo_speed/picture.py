"""Draws ``results/ppo_speed.json``: seconds of an iteration, collecting and updating, of every side.

Command: ``python -m benchmarks.ppo_speed.picture docs/ppo-speed.png``.
"""

import json
from pathlib import Path

import matplotlib
import tyro
from matplotlib.figure import Figure

from benchmarks.record import RESULTS
from textenv.pages.figures import BLUE, ORANGE, STYLE, save

NAMES = {
    "trl": "TRL 1.12",
    "ours": "ours",
    "ours-bfloat16": "ours, bfloat16",
    "ours-trunk": "ours, trunk",
    "ours-checkpointing": "ours, checkpointing",
    "ours-lora": "ours, LoRA",
    "ours-lora-bfloat16": "ours, LoRA, bfloat16",
}


@matplotlib.rc_context(STYLE)
def picture(cells: dict[str, dict]) -> Figure:
    """A panel for each cell, a bar for each side, and how many times as fast it is."""
    columns = min(len(cells), 3)
    rows = -(-len(cells) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (cell, figures), axes in zip(cells.items(), panels, strict=False):
        sides = [side for side in NAMES if side in figures["sides"]]
        for place, side in enumerate(sides):
            measured = figures["sides"][side]
            axes.barh(place, measured["collect"], color=BLUE, label="collect" if not place else None)
            axes.barh(place, measured["update"], left=measured["collect"], color=ORANGE,
                      label="update" if not place else None)  # fmt: skip
            axes.annotate(f" {measured['speedup']:.2f} ×", (measured["iteration"], place), va="center", fontsize=9)
        axes.set_yticks(range(len(sides)), [NAMES[side] for side in sides])
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set(title=cell, xlabel="seconds of an iteration")
    for axes in list(panels):
        axes.set_axis_off()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    return figure


def main(output: tyro.conf.Positional[Path]) -> None:
    cells = json.loads((RESULTS / "ppo_speed.json").read_text("utf-8"))["cells"]
    save(picture(cells), output, output.suffix[1:])


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
