"""Progress on the terminal: one bar per task, with the latest figures beside it."""

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

LINE_SECONDS = 30.0
"""Between two lines of progress in a file."""


class Advance(Protocol):
    """``advance(done, total, figures)``."""

    def __call__(self, done: int, total: int, figures: Mapping[str, float] | None = None) -> None: ...


@contextmanager
def progress_bar(title: str, console: Console | None = None) -> Iterator[Advance]:
    """A live bar with the progress and figures of a long task; where it goes into a file, a line every half minute.

    It appears with the first step, so that an error before it is shown without a bar.
    """
    console = console or Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield _lines(title, console)
        return
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
            fields: dict[str, Any] = {"figures": _shown(figures)} if figures else {}
            progress.start()
            progress.update(task, completed=done, total=total, **fields)

        yield advance
    finally:
        if progress.live.is_started:
            progress.stop()


def _lines(title: str, console: Console) -> Advance:
    """Progress in lines: of the first step, of the last one, and of one every :data:`LINE_SECONDS` between."""
    start, shown = time.monotonic(), -math.inf

    def advance(done: int, total: int, figures: Mapping[str, float] | None = None) -> None:
        nonlocal shown
        now = time.monotonic()
        if done >= total or now - shown >= LINE_SECONDS:
            shown = now
            took = timedelta(seconds=int(now - start))
            console.print(f"{title} {done}/{total} {took} {_shown(figures)}".rstrip(), soft_wrap=True, highlight=False)

    return advance


def _shown(figures: Mapping[str, float] | None) -> str:
    return "  ".join(f"{name} {value:.3g}" for name, value in (figures or {}).items())


def quiet_libraries() -> None:
    """Hide the progress bars of transformers, the hub and datasets, which would disturb ours."""
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")
    from transformers.utils import logging

    logging.disable_progress_bar()
