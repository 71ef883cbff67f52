"""A run in steps, each of which leaves its result in the run folder, so that an interrupted run continues."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console

from textenv.data.folders import check_writable
from textenv.data.records import write_json
from textenv.training.progress import progress_bar


class StepRun:
    """A run folder: what is done, and what was measured."""

    def __init__(self, config: Any, titles: Mapping[str, str], console: Console) -> None:
        """``config``: a dataclass with ``output``, the folder; ``titles``: the steps, by name, as the terminal shows
        them.

        Raises:
            ValueError: the folder holds something else, or a run of other settings.
        """
        self.config, self.titles, self.folder, self.console = config, titles, config.output, console
        self.state = earlier_state(config) or {"settings": settings_of(config), "seconds": {}}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "progress.json", self.state)

    def _read(self, name: str, default: Any) -> Any:
        path = self.folder / name
        return json.loads(path.read_text("utf-8")) if path.is_file() else default

    @property
    def settings(self) -> dict[str, Any]:
        return self.state["settings"]

    def step(self, name: str, work: Callable[[Any], list[dict[str, float]] | None]) -> None:
        """Do a step unless it is done; keep its learning curve and its time."""
        if name in self.state["seconds"]:
            self.console.print(f"{self.titles[name]}: done before", style="dim")
            return
        start = time.perf_counter()
        with progress_bar(self.titles[name], self.console) as advance:
            curve = work(advance)
        if curve is not None:
            write_json(self.folder / "history.json", {**self._read("history.json", {}), name: curve})
        self.state["seconds"][name] = time.perf_counter() - start
        write_json(self.folder / "progress.json", self.state)

    def finish(self) -> dict[str, Any]:
        """The summary with the seconds of every step, which only the run knows."""
        summary = self._read("summary.json", {}) | {"seconds": self.state["seconds"]}
        write_json(self.folder / "summary.json", summary)
        return summary


def earlier_state(config: Any) -> dict[str, Any]:
    """The settings and the seconds of each finished step of the run in the folder of a config; empty: there is none.

    Raises:
        ValueError: the folder holds something else, or a run of other settings, or cannot be written.
    """
    folder, path = config.output, config.output / "progress.json"
    state = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if not state and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"output must be a new or empty folder, or one with an earlier run, got {str(folder)!r} with "
            "other files. Nothing was removed. Name another folder."
        )
    if state and state["settings"] != settings_of(config):
        raise ValueError(
            f"output must be a folder of its own for each choice of settings, got {str(folder)!r}, "
            "which holds a run with others. Nothing was removed. Name another folder, or remove that one yourself."
        )
    check_writable(folder)
    return state


def settings_of(config: Any) -> dict[str, Any]:
    """A config as JSON values."""
    return json.loads(json.dumps(asdict(config), default=str))


def show_loss(advance: Any) -> Callable[[int, int, Mapping[str, float]], None]:
    """Show the loss of a training beside its bar."""

    def on_progress(done: int, total: int, metrics: Mapping[str, float]) -> None:
        advance(done, total, {"loss": metrics["loss"]} if "loss" in metrics else None)

    return on_progress
