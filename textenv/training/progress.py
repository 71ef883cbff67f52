"""Progress on the terminal: one bar a step, with the latest figures beside it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Advance(Protocol):
    """``advance(done, total, figures)``."""

    def __call__(self, done: int, total: int, figures: Mapping[str, float] | None = None) -> None: ...


@contextmanager
def progress_bar(title: str, console: Console | None = None) -> Iterator[Advance]:
    """A live bar that shows how far a long step is and what it measures; a plain line when not on a terminal."""
    console = console or Console(stderr=True)
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=None, figures="")

        def advance(done: int, total: int, figures: Mapping[str, float] | None = None) -> None:
            text = None if not figures else "  ".join(f"{key} {value:.3g}" for key, value in figures.items())
            fields: dict[str, Any] = {} if text is None else {"figures": text}
            progress.update(task, completed=done, total=total, **fields)

        yield advance
