"""The output folder of a training run: one checkpoint while it runs, the finished model at the end."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from textenv.data.folders import check_replaceable, is_of_writing, replace_folder
from textenv.data.records import write_json, write_jsonl
from textenv.training.processes import link, on_main
from textenv.training.trainable import BestWeights, load_trainable, save_trainable

CURVES = "curves.jsonl"
"""The history of a run, an entry a line, in its output folder."""


class RunFolder:
    """Each write replaces the whole folder, so that a kill at any moment leaves either the old or the new state.

    Every process of a run calls the methods; only the main one writes. Without a path nothing is written.
    """

    def __init__(self, path: str | Path | None, *, resume: bool) -> None:
        """Check the folder before any long work.

        Raises:
            ValueError: it holds other files or an unfinished run that is not resumed, or cannot be written.
        """
        self.path = None if path is None else Path(path)
        self.accelerator = link()
        """Links the processes of the run."""
        self._resume = resume
        if self.path is None:
            if resume:
                raise ValueError("resume needs an output_dir to resume from, got None. Give output_dir.")
            return
        on_main(lambda: check_replaceable(Path(str(path))))
        found = self.checkpoint
        if found is not None and not resume:
            raise ValueError(
                f"output_dir must not hold the checkpoint of an unfinished run, got {str(path)!r} ({found.name}). "
                "Continue it with resume=True, remove it, or choose another folder."
            )

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint's folder, if there is one."""
        return None if self.path is None else next(self.path.glob("checkpoint-*"), None)

    def save(
        self, model: nn.Module, state: Mapping[str, Any], identity: Mapping[str, Any], best: BestWeights | None
    ) -> None:
        """Replace the checkpoint: trainable weights, the state of the loop, and what the run depends on."""
        step = state["step"]

        def write(folder: Path) -> None:
            folder = folder / f"checkpoint-{step}"
            save_trainable(model, folder / "trainable.safetensors")
            torch.save(dict(state), folder / "state.pt")
            if best is not None:
                best.save(folder)
            write_json(folder / "run.json", identity)

        self._replace(write, state["history"])

    def finish(self, save_model: Callable[[Path], None], history: Sequence[Mapping[str, float]]) -> None:
        """Replace the checkpoint with the finished model, and the history beside it."""
        self._replace(save_model, history)

    def load(self, model: nn.Module, identity: Mapping[str, Any], best: BestWeights | None) -> dict[str, Any] | None:
        """Read the checkpoint into the model and return the state of the loop; None for a fresh start.

        Raises:
            ValueError: it is damaged, or belongs to a run with another identity.
        """
        folder = self.checkpoint
        if folder is None:
            return None
        try:
            saved = json.loads((folder / "run.json").read_text("utf-8"))
            changed = [key for key in identity if saved.get(key) != identity[key]]
            if not changed:
                load_trainable(model, folder / "trainable.safetensors")
                if best is not None:
                    best.load(folder)
                return torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        except Exception as error:
            raise ValueError(
                f"a checkpoint must be readable, got {str(folder)!r}: {error}. Start elsewhere."
            ) from error
        rule = f"a run must be resumed with the {changed[0]} it started with, {saved.get(changed[0])!r}"
        raise ValueError(f"{rule}, got {identity[changed[0]]!r}. Restore it, or start in another folder.")

    def _replace(self, write: Callable[[Path], None], history: Sequence[Mapping[str, float]]) -> None:
        """Replace everything in the folder with what ``write`` writes, and the history.

        Raises:
            OSError: the disk is full; an earlier checkpoint stays.
        """
        path = self.path
        if path is not None:

            def work() -> None:
                try:
                    with replace_folder(path) as folder:
                        write(folder)
                        write_jsonl(folder / CURVES, history)
                except Exception as error:
                    if not is_of_writing(error):
                        raise
                    rule = f"the output must fit on its disk and be writable, got {str(path)!r}: {error}"
                    remedy = "there is no checkpoint yet. Free space, then start again"
                    if self.checkpoint is not None:
                        remedy = f"{self.checkpoint.name} is whole. Free space, then resume"
                    raise OSError(f"{rule}; {remedy}.") from error

            on_main(work)
