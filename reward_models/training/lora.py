"""Low-rank adapters (Hu et al. 2021) while training, merged into the weights afterwards; needs ``peft``."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from reward_models.scorers.heads import score_head
from textenv.training.isolation import untouched_globals


class LoRA:
    """Adapters on every linear layer of a reward model but its last, which trains as it is.

    ``W + (alpha / rank) · B A`` with A random (``seed``) and B zero: nothing changes before the first step. The model
    itself is changed in place, and stays a Hugging Face model without adapters once :meth:`merge` has run.
    """

    def __init__(self, model: PreTrainedModel, *, rank: int, alpha: float, seed: int) -> None:
        try:
            from peft import LoraConfig, LoraModel
        except ImportError as error:
            raise ValueError("lora_rank above 0 needs the package peft: pip install 'textenv[lora]'.") from error
        head = score_head(model)
        layers: dict[str, Any] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
        }
        transposed = any(isinstance(module, Conv1D) for module in layers.values())
        scale: Any = alpha  # peft computes with any number, and declares whole ones
        config = LoraConfig(
            r=rank, lora_alpha=scale, lora_dropout=0.0, target_modules=list(layers), fan_in_fan_out=transposed
        )
        with untouched_globals():
            torch.manual_seed(seed)
            self._tuner = LoraModel(model, config, "default")
        head.requires_grad_(True)
        model.eval()

    def merge(self) -> None:
        """Add the adapters to the weights that they adapt, and take them away; all weights can be trained again."""
        model = self._tuner.merge_and_unload()
        model.requires_grad_(True)
