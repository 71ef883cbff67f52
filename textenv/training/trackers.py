"""Reports of a training to TensorBoard, Weights & Biases or Trackio, by Accelerate's trackers."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

Tracker = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "textenv"
"""Project of the runs at Weights & Biases and Trackio."""


class Report:
    """Sends what a training logs to its trackers; to none of them where there are none."""

    def __init__(self, trackers: Sequence[Any] = ()) -> None:
        self._trackers = list(trackers)

    def __call__(self, figures: Mapping[str, float], step: int) -> None:
        """Figures of a step."""
        for tracker in self._trackers:
            tracker.log(dict(figures), step=step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """A table of records with the same keys; in TensorBoard, whose texts are Markdown, as such a table."""
        columns = list(rows[0])
        values = [[row[column] for column in columns] for row in rows]
        for tracker in self._trackers:
            if tracker.name == "wandb":
                tracker.log_table(name, columns=columns, data=values, step=step)
            elif tracker.name == "trackio":
                import pandas
                import trackio  # pyrefly: ignore [missing-import]

                tracker.log({name: trackio.Table(dataframe=pandas.DataFrame(values, columns=columns))}, step=step)
            else:
                tracker.log({name: markdown_table(columns, values)}, step=step)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as Markdown; whatever stands in a cell is shown as text."""

    def line(cells: Sequence[Any]) -> str:
        texts = [f"{cell:.4g}" if isinstance(cell, float) else as_text(str(cell)) for cell in cells]
        return f"| {' | '.join(texts)} |"

    return "\n".join([line(columns), f"|{' --- |' * len(columns)}", *map(line, rows)])


def as_text(text: str) -> str:
    """A text that Markdown and HTML show as it stands, lines included."""
    return "<br>".join(re.sub(r"[!-/:-@\[-`{-~]", lambda sign: f"&#{ord(sign[0])};", line) for line in text.split("\n"))


def check_trackers(report_to: Sequence[Tracker]) -> None:
    """Refuse a tracker whose package is missing, before any long work.

    Raises:
        ValueError: names the package.
    """
    from accelerate.tracking import get_available_trackers

    available = [str(tracker) for tracker in get_available_trackers()]
    for name in report_to:
        if name not in available:
            package = "'textenv[trackers]'" if name == "tensorboard" else name
            rule = f"report_to must name trackers whose package is installed, got {name!r} without it"
            raise ValueError(f"{rule}. Install it: pip install {package}.")


@contextmanager
def tracking(
    report_to: Sequence[Tracker],
    output: Path | None,
    settings: Mapping[str, Any],
    step: int = 0,
    *,
    name: str | None = None,
) -> Iterator[Report]:
    """Yield the report of a run; without trackers it does nothing.

    A run is named ``name``, or like its ``output`` folder. TensorBoard's files go into ``tensorboard/`` beside that
    folder, under its name. A run that continues after ``step`` hides what was reported later than that.

    Raises:
        ValueError: a package is missing, or there is no output folder.
    """
    if not report_to:
        yield Report()
        return
    check_trackers(report_to)
    if output is None:
        raise ValueError("report_to needs an output folder, whose name the run gets, got None. Give one.")
    from accelerate import Accelerator
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    output = output.resolve()
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {
            "run_name": output.name,
            "logging_dir": output.parent / "tensorboard",
            "purge_step": step + 1,
        },
        "wandb": {"run_name": PROJECT, "name": name or output.name, "dir": str(output.parent)},
        "trackio": {"run_name": PROJECT, "name": name or output.name},
    }
    trackers: list[Any] = [LOGGER_TYPE_TO_CLASS[name](**options[name]) for name in dict.fromkeys(report_to)]
    accelerator = Accelerator(device_placement=False, log_with=trackers)
    plain = {key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()}
    accelerator.init_trackers(PROJECT, plain)
    try:
        yield Report(accelerator.trackers)
    finally:
        for tracker in accelerator.trackers:  # end_training would also end the group of processes
            tracker.finish()
