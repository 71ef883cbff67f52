"""Settings, colours and helpers of the package's pictures, all made without pyplot.

Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart.
"""

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from textenv.stats import Bin

BLUE, ORANGE, GREEN, PURPLE, RED = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00"
INK, MUTED = "#24292f", "#6b7280"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    # The reader's browser draws the text of an SVG; DejaVu, a wide font, sets the layout where the others are missing.
    "font.sans-serif": ["Helvetica Neue", "Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "textenv",  # the same data give the same bytes
}


class Picture(NamedTuple):
    """A picture of a page."""

    uri: str
    description: str
    """For readers who cannot see it."""
    caption: str = ""


def panel(width: float = 3.9, height: float = 3.2, title: str = "") -> tuple[Figure, Axes]:
    """A figure of ``width × height`` inches with one pair of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


@matplotlib.rc_context(STYLE)
def reliability_diagram(bins: Sequence[Bin], width: float = 3.9, height: float = 3.2, title: str = "") -> Figure:
    """Observed against stated agreement, with intervals and the diagonal of perfect calibration."""
    figure, axes = panel(width, height, title)
    axes.plot([0.5, 1.0], [0.5, 1.0], color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
    stated, observed, ci95, _ = (np.asarray(column) for column in zip(*bins, strict=True))
    ci95 = np.where(np.isfinite(ci95), ci95, 1.0)  # the interval of a single prompt is unknown: draw all of it
    low, high = np.clip(observed - ci95, 0.0, 1.0), np.clip(observed + ci95, 0.0, 1.0)
    bars = (observed - low, high - observed)
    axes.errorbar(stated, observed, bars, color=BLUE, fmt="o", markersize=5, elinewidth=1.2)
    axes.set(xlabel="stated agreement, σ(|margin|)", ylabel="observed agreement", xlim=(0.48, 1.02))
    axes.set_ylim(min(0.4, float(low.min()) - 0.02), 1.02)
    return figure


@matplotlib.rc_context(STYLE)
def save(figure: Figure, target: Path | BytesIO, image_format: str) -> None:
    """Write a picture as ``svg`` or ``png``; the same data give the same bytes."""
    if image_format == "svg":
        figure.savefig(target, format="svg", metadata={"Date": None})
        return
    from PIL import Image

    pixels = BytesIO()
    figure.savefig(pixels, format="png", dpi=200)
    # The colours are flat: a palette keeps the picture at a third of its size.
    Image.open(pixels).convert("RGB").quantize(256).save(target, format="png", optimize=True)


def data_uri(figure: Figure, image_format: str = "svg") -> str:
    """A picture as a ``data:`` address, to embed in a page."""
    stream = BytesIO()
    save(figure, stream, image_format)
    kind = {"svg": "svg+xml"}.get(image_format, image_format)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
