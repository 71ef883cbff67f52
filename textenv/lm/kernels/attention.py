"""Attention by plain products: for logits that PyTorch's kernels cannot cap, and short rows in bfloat16 on a CPU.

The backward pass of PyTorch's flash attention takes six times as long there (16 rows of 48 tokens, a Zen 5).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import dropout as drop

SHORT = 256
"""Columns up to which it is used where there is a choice: its weights fill columns² numbers a head."""


def causal_mask(size: int, window: int, device: torch.device) -> Bool[Tensor, "S S"]:
    """True where a row's token may look: at itself and the ``window − 1`` tokens before it."""
    column = torch.arange(size, device=device)
    distance = column[:, None] - column
    return (distance >= 0) & (distance < window)


def written_out(
    query: Float[Tensor, "B A S D"],
    key: Float[Tensor, "B K S D"],
    value: Float[Tensor, "B K S D"],
    mask: Bool[Tensor, "S S"],
    scaling: float | None,
    *,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B A S D"]:
    """``softmax(scaling · q kᵀ) v`` with weights in float32; A / K consecutive heads share keys and values.

    ``softcap`` c keeps the logits l within ±c: ``c tanh(l / c)`` (Gemma 2: Gemma Team 2024, section 2).
    """
    size = query.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    shared = (query * scale).unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    scores = (shared @ key.transpose(2, 3)).unflatten(2, (-1, size))
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).to(value.dtype)
    return (drop(weights, dropout).flatten(2, 3) @ value).unflatten(2, (-1, size)).flatten(1, 2)
