"""The trainable part of a model: saving it, loading it, and keeping its best version during training."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from textenv.data.records import write_json


def check_trainable(model: nn.Module) -> None:
    """Refuse weights to train of lower precision than float32; frozen ones may have any."""
    dtype = min((weight.dtype for weight in trainable_weights(model).values()), key=lambda dtype: dtype.itemsize)
    if dtype.itemsize < 4:
        raise ValueError(
            f"a policy to train must have float32 weights, got {dtype}, in which Adam's small steps round to nothing. "
            "Load it in float32; the environment's dtype='bfloat16' computes in bfloat16."
        )


def trainable_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes, by name, not copied."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_trainable(model: nn.Module, path: Path) -> None:
    """Write only the trainable parameters, as safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.detach().cpu().contiguous() for name, weight in trainable_weights(model).items()}, path)


def load_trainable(model: nn.Module, path: Path) -> None:
    """Restore what :func:`save_trainable` wrote; ValueError if the file holds other parameters."""
    _assign(model, load_file(path), path)


class BestWeights:
    """The trainable weights at the lowest ``metric``; exhausted after ``patience`` evaluations without a lower one."""

    def __init__(self, model: nn.Module, metric: str, patience: int) -> None:
        self._model, self._metric, self._patience = model, metric, patience
        self._weights: dict[str, Tensor] = {}
        self.evaluation: dict[str, float] = {}
        """Figures of the best evaluation; empty before the first."""
        self.since = 0
        """Evaluations since the best one."""

    @property
    def exhausted(self) -> bool:
        return self.since >= self._patience

    def update(self, evaluation: dict[str, float]) -> None:
        """Compare an evaluation of the current weights with the best one."""
        if self.evaluation and not evaluation[self._metric] < self.evaluation[self._metric]:
            self.since += 1
            return
        self.since, self.evaluation = 0, dict(evaluation)
        self._weights = {name: weight.detach().clone() for name, weight in trainable_weights(self._model).items()}

    def restore(self) -> None:
        """Load the best weights into the model."""
        if self._weights:
            _assign(self._model, self._weights, "the best weights")

    def save(self, folder: Path) -> None:
        """Save to a checkpoint, for a resumed run."""
        if self._weights:
            save_file({name: weight.cpu() for name, weight in self._weights.items()}, folder / "best.safetensors")
            write_json(folder / "best.json", {"evaluation": self.evaluation, "since": self.since})

    def load(self, folder: Path) -> None:
        """Restore what :meth:`save` wrote, if anything."""
        if not (folder / "best.json").is_file():
            return
        saved = json.loads((folder / "best.json").read_text("utf-8"))
        self.evaluation, self.since = saved["evaluation"], saved["since"]
        own, best = trainable_weights(self._model), load_file(folder / "best.safetensors")
        self._weights = {name: weight.to(own[name].device) for name, weight in best.items()}


@torch.no_grad()
def _assign(model: nn.Module, weights: dict[str, Tensor], source: object) -> None:
    own = trainable_weights(model)
    if own.keys() != weights.keys():
        raise ValueError(
            f"saved weights must match the trainable parameters, got {sorted(own.keys() ^ weights.keys())} on one side "
            f"only, in {source}. Use the settings that the run started with."
        )
    for name, parameter in own.items():
        parameter.copy_(weights[name])
