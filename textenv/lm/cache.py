"""A KV cache with room to spare: a token is written into it, and only the rows that move are copied.

transformers' own layer copies all that it holds for every token, and again for every choice of rows.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """Keys and values ``[N, heads, W, D]``: the first rows and columns of larger tensors."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Float[Tensor, "N A W D"], values: Float[Tensor, "N A W E"], room: int) -> None:
        """``room`` columns are kept free for tokens to come; more are made when they are full."""
        super().__init__()
        self.lazy_initialization(keys, values)
        self._extra = max(1, room)
        self._hold(keys, values)

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        width = keys.shape[2]
        self._stores = [x.new_empty(*x.shape[:2], width + self._extra, x.shape[3]) for x in (keys, values)]
        for store, held in zip(self._stores, (keys, values), strict=True):
            store[:, :, :width] = held
        self._show(len(keys), width)

    def _show(self, rows: int, width: int) -> None:
        self.keys, self.values = (store[:rows, :, :width] for store in self._stores)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the columns of new tokens."""
        rows, start = self.keys.shape[0], self.keys.shape[2]
        end = start + key_states.shape[2]
        while end > self._stores[0].shape[2]:
            self._hold(self.keys, self.values)
        for store, new in zip(self._stores, (key_states, value_states), strict=True):
            store[:rows, :, start:end] = new
        self._show(rows, end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Int[Tensor, " n"]) -> None:
        """Go on with these rows; those that stay where they are cost nothing."""
        moved = (beam_idx != torch.arange(len(beam_idx), device=beam_idx.device)).nonzero().squeeze(1)
        source = beam_idx[moved]
        for held in (self.keys, self.values):
            held[moved] = held[source]
        self._show(len(beam_idx), self.keys.shape[2])

    def join(self, other: "RoomyLayer", width: int) -> None:
        """More rows, behind these; of all, the last ``width`` columns are kept."""
        pairs = zip((self.keys, self.values), (other.keys, other.values), strict=True)
        keys, values = (torch.cat([aligned(old, width), aligned(new, width)]) for old, new in pairs)
        self._hold(keys, values)


def aligned(old: Tensor, width: int) -> Tensor:
    """The last ``width`` columns of ``[N, heads, W, D]``, with zeros before them where there are fewer."""
    spare = old.shape[2] - width
    return old[:, :, spare:] if spare >= 0 else pad(old, (0, 0, -spare, 0))
