"""Reports of a training to TensorBoard, Weights & Biases or Trackio, by Accelerate's trackers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

Tracker = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "textenv"
"""Project of the runs at Weights & Biases and Trackio."""


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
) -> Iterator[Callable[[Mapping[str, float], int], None]]:
    """Yield ``report(figures, step)``; without trackers it does nothing.

    A run is named ``name``, or like its ``output`` folder. TensorBoard's files go into ``tensorboard/`` beside that
    folder, under its name. A run that continues after ``step`` hides what was reported later than that.

    Raises:
        ValueError: a package is missing, or there is no output folder.
    """
    if not report_to:
        yield lambda figures, step: None
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
        yield lambda figures, step: accelerator.log(dict(figures), step=step)
    finally:
        for tracker in accelerator.trackers:  # end_training would also end the group of processes
            tracker.finish()
