"""Low-rank adapters (Hu et al. 2021) on models that share their weights with others; needs ``peft``.

Adapters stand inside a Hugging Face model, which stays one: nothing else needs to know about them. They are saved as a
folder that ``peft.PeftModel.from_pretrained(base, folder)`` loads.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from textenv.training.isolation import untouched_globals

_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
"""What peft puts before the name of each weight in a file."""


def plain_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model that a ``PeftModel`` wraps, its adapters inside it; any other model unchanged.

    Raises:
        ValueError: the adapter is not inside the model but in the prompt.
    """
    if not hasattr(model, "get_base_model"):
        return model  # type: ignore[return-value]
    wrapped: Any = model
    if wrapped.active_peft_config.is_prompt_learning:
        kind = wrapped.active_peft_config.peft_type.value
        raise ValueError(f"adapters must change layers of a model, got {kind}, which changes its prompt. Use LoRA.")
    return wrapped.get_base_model()


def adapters(model: nn.Module) -> dict[str, Any]:
    """The configs of the adapters in a model, by name; empty without any."""
    configs: Any = getattr(model, "peft_config", {})
    return dict(configs)


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own on the very same weights, which are frozen in the copy and not changed in the original."""
    frozen = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    return copy.deepcopy(model, frozen)


def add_adapters(model: PreTrainedModel, *, rank: int, alpha: float, seed: int, leave: nn.Module | None) -> Any:
    """Put adapters on every linear layer but ``leave``, in place, and freeze all else. Returns peft's ``LoraModel``.

    ``W + (alpha / rank) · B A`` with A random (``seed``) and B zero: nothing changes before the first step.

    Raises:
        ValueError: peft is not installed, or the model has adapters already.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise ValueError("lora_rank above 0 needs the package peft: pip install 'textenv[lora]'.") from error
    if adapters(model):
        rule = "a model must have no adapters before new ones are added"
        raise ValueError(f"{rule}, got {', '.join(adapters(model))}. Merge them first: LanguageModel.merged().")
    layers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not leave
    }
    transposed = any(isinstance(module, Conv1D) for module in layers.values())
    scale: Any = alpha  # peft computes with any number, and declares whole ones
    config = LoraConfig(
        r=rank, lora_alpha=scale, lora_dropout=0.0, target_modules=list(layers), fan_in_fan_out=transposed
    )
    with untouched_globals():
        torch.manual_seed(seed)
        tuner = LoraModel(model, config, "default")
    _hold_in_float32(model)
    model.eval()
    return tuner


def merged_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the adapters added to the weights that they adapt; all its weights can be trained."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        layer: Any = module
        if hasattr(layer, "unload_and_optionally_merge_module"):
            plain = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            setattr(model.get_submodule(parent), child, plain)
        elif hasattr(layer, "base_layer"):
            layer.merge()
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if adapters(model):
        del model.peft_config
    return model.requires_grad_(True)


def save_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Write the one adapter of a model as a folder that plain peft loads.

    Raises:
        ValueError: the model has several adapters.
    """
    from peft import get_peft_model_state_dict

    if len(adapters(model)) > 1:
        rule = "a model must have one adapter to be saved"
        raise ValueError(f"{rule}, got {', '.join(adapters(model))}. Delete the others, or save it merged.")
    [(name, config)] = adapters(model).items()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    named = {f"{_PREFIX}{key}": weight.detach().cpu().contiguous() for key, weight in weights.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(config)
    config.inference_mode = True
    config.save_pretrained(str(folder))


def adapter_base(folder: str | Path) -> str | None:
    """What an adapter folder calls its base model; None for anything else."""
    file = Path(folder) / _FILE
    return str(json.loads(file.read_text("utf-8"))["base_model_name_or_path"]) if file.is_file() else None


def load_adapter(base: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """A model on the weights of ``base`` with the adapter of a folder, which can be trained further.

    Raises:
        ValueError: peft is not installed, the folder is not readable, or the adapter is for another model.
    """
    try:
        from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
    except ImportError as error:
        raise ValueError(f"{str(folder)!r} needs the package peft: pip install 'textenv[lora]'.") from error
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        weights = load_file(Path(folder) / "adapter_model.safetensors")
        weights = {name.removeprefix(_PREFIX): weight for name, weight in weights.items()}
        with untouched_globals():
            model: Any = inject_adapter_in_model(config, shared_copy(base))
        _hold_in_float32(model)
        # Exactly those: a file with weights of the base in it would overwrite what others share.
        other = weights.keys() ^ get_peft_model_state_dict(model, save_embedding_layers=False).keys()
        if other:
            raise ValueError(f"{sorted(other)[0]} is on one side only")
        set_peft_model_state_dict(model, weights)
    except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        rule = f"an adapter must fit its base, a {type(base).__name__}"
        raise ValueError(f"{rule}, got {str(folder)!r}: {error}. Name the model that it was trained on.") from error
    return model.eval()


def trained_modules(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, in which modules that an adapter trains whole (a score head) stand in their own place."""
    for name, module in list(model.named_modules()):
        whole: Any = module
        if hasattr(whole, "modules_to_save") and hasattr(whole, "original_module"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, whole.modules_to_save[whole.active_adapter])
    return model


def _hold_in_float32(model: nn.Module) -> None:
    """Adapters start in the precision of what they adapt, in which small steps would round to nothing."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
