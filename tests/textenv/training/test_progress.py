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


@pytest.mark.parametrize("widgets", [True, False])
def test_in_a_notebook_the_streams_stay_its_own(monkeypatch, widgets):
    """A redirected stream prints by the notebook's display, which prints into the stream, and so on."""
    monkeypatch.setattr(progress, "find_spec", lambda name: object() if widgets else None)
    monkeypatch.setattr("rich.live.Live.refresh", lambda self: None)  # needs IPython
    stdout, stderr = sys.stdout, sys.stderr
    with progress_bar("training", Console(force_jupyter=True)) as advance:
        advance(1, 2)
        assert (sys.stdout, sys.stderr) == (stdout, stderr)
