"""How a server gets the weights of a policy that learns."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from textenv.data.http import Endpoint, excerpt
from textenv.lm import LanguageModel
from textenv.lm.adapters import adapters

VLLM_LORA, SGLANG_DISK = "vllm-lora", "sglang-disk"

Update = Callable[[Endpoint, LanguageModel, Path, str | None], str | None]
"""Writes a policy's weights into a folder, makes the server hold them, and returns the name of the model to ask for
(None: the server's only one). Given the name before as well."""


def update_named(name: str) -> Update:
    """``vllm-lora``, ``sglang-disk`` or a ``module:callable``, which is called with the folder of the weights.

    Raises:
        ValueError: it is none of these, or cannot be imported.
    """
    module, _, attribute = name.partition(":")
    if name in _UPDATES:
        return _UPDATES[name]
    try:
        if not attribute:
            raise ValueError("it names no callable")
        call = getattr(importlib.import_module(module), attribute)
    except (AttributeError, ImportError, ValueError) as error:
        rule = f"sampler_update must be {VLLM_LORA!r}, {SGLANG_DISK!r} or an importable 'module:callable'"
        raise ValueError(f"{rule}, got {name!r}: {error}. Correct it.") from error

    def update(server: Endpoint, policy: LanguageModel, folder: Path, previous: str | None) -> str | None:
        policy.save_pretrained(folder)
        model = call(folder)
        if not isinstance(model, str | None):
            rule = f"{name} must return the name of the model to ask for, or None for the server's only one"
            raise ValueError(f"{rule}, got {model!r}. Return one of them.")
        return model

    return update


def _load_lora(server: Endpoint, policy: LanguageModel, folder: Path, previous: str | None) -> str | None:
    """A new name each time: cached keys and values of the adapter before must not be taken for those of this one."""
    if not adapters(policy.model):
        rule = f"sampler_update={VLLM_LORA!r} needs a policy with adapters, got {policy.name!r} without any"
        raise ValueError(f"{rule}. Set lora_rank, or use a server that loads all weights.")
    policy.save_pretrained(folder)
    _post(server, "/v1/load_lora_adapter", lora_name=folder.name, lora_path=str(folder))
    if previous is not None:
        _post(server, "/v1/unload_lora_adapter", lora_name=previous)
    return folder.name


def _load_weights(server: Endpoint, policy: LanguageModel, folder: Path, previous: str | None) -> str | None:
    (policy.merged() if adapters(policy.model) else policy).save_pretrained(folder)
    answer = _post(server, "/update_weights_from_disk", model_path=str(folder))
    try:
        loaded = json.loads(answer)["success"]
    except (KeyError, TypeError, ValueError):
        loaded = None
    if loaded is not True:
        rule = f"the sampler at {server.url} must load the weights in {str(folder)!r}"
        raise ValueError(f"{rule}, got {excerpt(answer)!r}. Put sampler_folder where the server can read it.")
    return None


def _post(server: Endpoint, path: str, **body: Any) -> bytes:
    return server.post(json.dumps(body).encode(), path)


_UPDATES: dict[str, Update] = {VLLM_LORA: _load_lora, SGLANG_DISK: _load_weights}
