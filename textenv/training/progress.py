"""Progress on the terminal: one bar per task, with the latest figures beside it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn


class Advance(Protocol):
    """``advance(done, total, figures)``."""

    def __call__(self, done: int, total: int, figures: Mapping[str, float] | None = None) -> None: ...


@contextmanager
def progress_bar(title: str, console: Console | None = None) -> Iterator[Advance]:
    """A live bar with the progress and figures of a long task; a plain line when not on a terminal.

    It appears with the first step, so that an error before it is shown without a bar.
    """
    console = console or Console(stderr=True)
    steps = BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn()
    notebook = console.is_jupyter
    progress = Progress(
        "{task.description:<34}",
        *steps,
        "{task.fields[figures]}",
        console=console,
        redirect_stdout=not notebook,  # a notebook prints through these streams, which would end in themselves
        redirect_stderr=not notebook,
        disable=notebook and find_spec("ipywidgets") is None,
    )
    try:
        task = progress.add_task(title, total=None, figures="")

        def advance(done: int, total: int, figures: Mapping[str, float] | None = None) -> None:
            text = None if not figures else "  ".join(f"{key} {value:.3g}" for key, value in figures.items())
            fields: dict[str, Any] = {} if text is None else {"figures": text}
            progress.start()
            progress.update(task, completed=done, total=total, **fields)

        yield advance
    finally:
        if progress.live.is_started:
            progress.stop()


def quiet_libraries() -> None:
    """Hide the progress bars of transformers, the hub and datasets, which would disturb ours."""
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")
    from transformers.utils import logging

    logging.disable_progress_bar()
