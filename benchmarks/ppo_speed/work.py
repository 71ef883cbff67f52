"""How many floating-point operations an iteration cannot do without."""

import json
from pathlib import Path
from typing import NamedTuple

EPOCHS = 4


class Shape(NamedTuple):
    """Weights that a token is multiplied by."""

    trunk: int
    """Matrices of all blocks, without embeddings, norms and biases."""
    head: int
    """The LM head."""

    @classmethod
    def of_folder(cls, folder: str | Path) -> "Shape":
        config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
        if config["model_type"] == "gpt2":
            width = config["n_embd"]
            return cls(config["n_layer"] * 12 * width**2, config["vocab_size"] * width)
        width, heads, shared = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
        attention = 2 * width**2 + 2 * width**2 * shared // heads
        block = attention + 3 * width * config["intermediate_size"]
        return cls(config["num_hidden_layers"] * block, config["vocab_size"] * width)


def iteration_flops(shape: Shape, tokens: float, response_tokens: float, epochs: int = EPOCHS) -> float:
    """Products of weights and real tokens alone: attention, norms and the optimiser are left out, padding as well.

    The policy decodes, the reference and the reward model (without an LM head) read; an epoch costs a pass forward and
    two backward. A multiplication and an addition are two operations.
    """
    passes = 3 * epochs
    trunk = shape.trunk * tokens * (3 + passes)
    head = shape.head * response_tokens * (2 + passes)
    return 2 * (trunk + head)
