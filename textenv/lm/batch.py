"""The one padding rule.

Lengths are explicit, and no mask comes from token values: a pad id equal to EOS, or an EOS in a prompt, is harmless.

* **Decoding** wants every row to end in the same column: prompts are padded on the *left*, with an attention mask and
  position ids made from the lengths (:func:`pad_left`).
* **Teacher forcing** wants no mask at all: prompt and response are joined and padded on the *right*
  (:func:`rows`). Attention is causal, so a real token never sees what lies to its right, whatever that is.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Responses(NamedTuple):
    """A batch of prompts with their responses, as every part of the package passes it on."""

    prompt_ids: Int[Tensor, "B P"]
    """Prompt tokens, left-padded."""
    prompt_lengths: Int[Tensor, " B"]
    """Real tokens in each prompt, ≥ 1."""
    response_ids: Int[Tensor, "B T"]
    """Response tokens, right-padded, the ending EOS included."""
    response_lengths: Int[Tensor, " B"]
    """Real tokens in each response, ≥ 0."""

    @property
    def response_mask(self) -> Bool[Tensor, "B T"]:
        """True on real response tokens."""
        return length_mask(self.response_lengths, self.response_ids.shape[1])

    @property
    def total_lengths(self) -> Int[Tensor, " B"]:
        return self.prompt_lengths + self.response_lengths

    def select(self, index: Int[Tensor, " n"]) -> "Responses":
        """The rows of ``index``, without padding columns that none of them needs."""
        picked = Responses(*(field[index] for field in self))
        return picked.trim()

    def trim(self) -> "Responses":
        """The same rows without columns in which every row is padding (at least one column stays)."""
        width = max(int(self.prompt_lengths.max()), 1)
        length = max(int(self.response_lengths.max()), 1)
        return self._replace(
            prompt_ids=self.prompt_ids[:, self.prompt_ids.shape[1] - width :],
            response_ids=self.response_ids[:, :length],
        )

    def to(self, device: torch.device | str) -> "Responses":
        return Responses(*(field.to(device) for field in self))


class Rows(NamedTuple):
    """Prompt and response joined, right-padded, for teacher forcing."""

    input_ids: Int[Tensor, "B S"]
    predictors: Int[Tensor, "B T"]
    """Column of ``input_ids`` whose output predicts response token t (0 where t is padding)."""


def length_mask(lengths: Int[Tensor, " B"], width: int) -> Bool[Tensor, "B W"]:
    """True in the first ``lengths[b]`` of ``width`` columns."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def rows(batch: Responses) -> Rows:
    """Join prompt and response without a gap, padding on the right with token 0.

    The one-token shift lives here and nowhere else: the output at column ``c`` predicts the token at column ``c + 1``,
    so response token ``t`` of a prompt of ``p`` tokens is predicted at column ``p + t - 1``.
    """
    prompt_width = batch.prompt_ids.shape[1]
    joined = torch.cat([batch.prompt_ids, batch.response_ids], dim=1)
    width = max(int(batch.total_lengths.max()), 1)
    column = torch.arange(width, device=joined.device)
    source = (prompt_width - batch.prompt_lengths)[:, None] + column
    real = column < batch.total_lengths[:, None]
    input_ids = joined.gather(1, source.clamp(max=joined.shape[1] - 1)).masked_fill(~real, 0)
    step = torch.arange(batch.response_ids.shape[1], device=joined.device)
    predictors = (batch.prompt_lengths - 1)[:, None] + step
    return Rows(input_ids, predictors.masked_fill(~batch.response_mask, 0))


def pad_left(sequences: Sequence[Sequence[int]], pad_id: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Ragged token lists → ``(ids [B, P], lengths [B])``, padded on the left to ``width`` or the longest."""
    return _pad(sequences, pad_id, width, left=True)


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Ragged token lists → ``(ids [B, T], lengths [B])``, padded on the right to ``width`` or the longest."""
    return _pad(sequences, pad_id, width, left=False)


def _pad(sequences: Sequence[Sequence[int]], pad_id: int, width: int | None, *, left: bool) -> tuple[Tensor, Tensor]:
    lengths = [len(sequence) for sequence in sequences]
    longest = max(lengths, default=0)
    width = longest if width is None else width
    if longest > width:
        raise ValueError(f"a row must fit its width ({width}), got {longest} tokens. Raise the width.")
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        if sequence:
            start = width - len(sequence) if left else 0
            ids[row, start : start + len(sequence)] = torch.as_tensor(sequence, dtype=torch.int64)
    return ids, torch.tensor(lengths, dtype=torch.int64)


_FULL = 512
"""The cost of a pass grows with its tokens from about here on; below, a few more are free."""


def length_buckets(
    lengths: Int[Tensor, " B"], size: int, *, max_padding: float = 1.0, max_tokens: int | None = None
) -> Iterator[Int[Tensor, " n"]]:
    """Row indices in chunks of at most ``size``, each of rows of similar length (less padding, fewer FLOPs).

    No chunk of several rows has more than ``max_tokens`` real tokens.

    A chunk of ``_FULL`` tokens or more is closed early if one more row would raise its share of padding above
    ``max_padding``: otherwise a few long rows would be padded to the longest of all.
    """
    order = torch.argsort(lengths, stable=True)
    start = real = 0
    for end, length in enumerate(lengths[order].tolist()):
        wide = real >= _FULL and real + length < (1 - max_padding) * (end + 1 - start) * length
        full = max_tokens is not None and end > start and real + length > max_tokens
        if end - start == size or wide or full:
            yield order[start:end]
            start, real = end, 0
        real += length
    if start < len(order):
        yield order[start:]
