"""Progress bars, on a terminal and in a notebook."""

import io
import sys

import pytest
from rich.console import Console

from textenv.training import progress
from textenv.training.progress import progress_bar


def test_a_bar_shows_progress_and_figures():
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with progress_bar("training", console) as advance:
        advance(3, 4, {"loss": 0.25})
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for text in ("training", "3/4", "loss 0.25"):
        assert text in shown


def test_in_a_file_there_is_a_line_at_the_start_one_now_and_then_and_one_at_the_end(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=20)  # narrower than a line
    with progress_bar("training", console) as advance:
        for done in range(1, 91):
            now += 1.0
            advance(done, 90, {"loss": 1 / done})
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "training 1/90 0:00:01 loss 1",
        "training 31/90 0:00:31 loss 0.0323",
        "training 61/90 0:01:01 loss 0.0164",
        "training 90/90 0:01:30 loss 0.0111",
    ]


@pytest.mark.parametrize("widgets", [True, False])
def test_in_a_notebook_the_streams_stay_its_own(monkeypatch, widgets):
    """A redirected stream prints by the notebook's display, which prints into the stream, and so on."""
    monkeypatch.setattr(progress, "find_spec", lambda name: object() if widgets else None)
    monkeypatch.setattr("rich.live.Live.refresh", lambda self: None)  # needs IPython
    stdout, stderr = sys.stdout, sys.stderr
    with progress_bar("training", Console(force_jupyter=True)) as advance:
        advance(1, 2)
        assert (sys.stdout, sys.stderr) == (stdout, stderr)
