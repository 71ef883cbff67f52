"""What stays in a run's folder beside the newest checkpoint: earlier checkpoints, and the best policy.

Each save takes them over into the folder that replaces the old one. Their files never change, so that hard links do,
and cost neither time nor space where the disk has them.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agents.logs.files import CURVES, SAMPLES
from textenv.data.folders import MARKER
from textenv.data.records import write_json
from textenv.settings import PositiveInt, check_settings

WINDOW = 10
"""Updates over which a figure is averaged before policies are compared by it."""
Figure = Literal["reward", "rm_score", "gold_score"]
_BESIDE = ("checkpoints", "best", CURVES, SAMPLES, MARKER)


@dataclass(frozen=True, kw_only=True)
class Keep:
    """What to keep besides the newest checkpoint."""

    last: PositiveInt = 1
    """Checkpoints to keep. The newest is the folder itself; earlier ones are in ``checkpoints/``, by their updates."""
    best: Figure | None = None
    """Keep in ``best/`` the policy of the checkpoint at which the mean of this figure over the last 10 updates was
    highest; None keeps none."""

    def __post_init__(self) -> None:
        check_settings(self)


def keep_earlier(old: Path, new: Path, updates: int, last: int) -> None:
    """Take the ``last − 1`` checkpoints before the one of so many ``updates`` from the old folder into the new one."""
    found = {int(folder.name): folder for folder in (old / "checkpoints").glob("[0-9]*")}
    if (old / "state.json").is_file():
        found[len(json.loads((old / "state.json").read_text("utf-8"))["history"])] = old
    earlier = sorted(number for number in found if number < updates)
    for number in earlier[len(earlier) - min(last - 1, len(earlier)) :]:
        _link(found[number], new / "checkpoints" / str(number))


def keep_best(old: Path, new: Path, history: Sequence[Mapping[str, float]], figure: Figure, *, compare: bool) -> None:
    """Take over the best policy so far, or, if they ``compare`` and it is better, that of the new checkpoint."""
    recent = [log[figure] for log in history[-WINDOW:]]
    value = sum(recent) / max(len(recent), 1)
    best = None
    if (old / "best" / "best.json").is_file():
        best = json.loads((old / "best" / "best.json").read_text("utf-8"))
    if compare and recent and (best is None or best["figure"] != figure or value > best["value"]):
        _link(new / "policy", new / "best")
        write_json(new / "best" / "best.json", {"figure": figure, "value": value, "updates": len(history)})
    elif best is not None:
        _link(old / "best", new / "best")


def _link(source: Path, target: Path) -> None:
    """The checkpoint's files of a folder in another one too."""
    shutil.copytree(
        source,
        target,
        copy_function=_link_file,
        ignore=lambda folder, names: _BESIDE if Path(folder) == source else (),
    )


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without hard links
        shutil.copy2(source, target)
