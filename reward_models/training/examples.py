"""Rankings as tensors to train on."""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reward_models.preferences import Ranking
from reward_models.scorers.texts import EncodedTexts

Featurize = Callable[[EncodedTexts], Float[Tensor, "n H"]]


class Texts(Protocol):
    """Texts as tokens, numbered from 0."""

    @property
    def lengths(self) -> Int[Tensor, " n"]: ...

    def digest(self) -> str: ...

    def batch(self, index: Int[Tensor, " B"]) -> dict[str, Tensor]: ...


class Examples(NamedTuple):
    """The responses of prompt b are the texts ``starts[b] … starts[b] + counts[b] − 1``."""

    texts: Texts
    starts: Int[Tensor, " N"]
    counts: Int[Tensor, " N"]
    ranks: Int[Tensor, " n"]
    margins: Float[Tensor, " N"]
    features: Float[Tensor, "n H"] | None
    """Features of each text, where the trunk is frozen."""

    @classmethod
    def of(cls, texts: Texts, rankings: Sequence[Ranking], features: Float[Tensor, "n H"] | None = None) -> Self:
        """``texts`` are the responses of all rankings, one after another, each from best to worst."""
        counts = torch.tensor([len(ranking.responses) for ranking in rankings])
        ranks = torch.tensor([rank for ranking in rankings for rank in ranking.levels])
        margins = torch.tensor([ranking.margin for ranking in rankings], dtype=torch.float32)
        return cls(texts, counts.cumsum(0) - counts, counts, ranks, margins, features)

    @property
    def lengths(self) -> Int[Tensor, " N"]:
        """Longest text of each prompt."""
        return torch.stack([part.max() for part in self.texts.lengths.split(self.counts.tolist())])

    def digest(self) -> str:
        """A fingerprint of all that is trained on."""
        labels = b"".join(values.numpy().tobytes() for values in (self.counts, self.ranks, self.margins))
        return hashlib.sha256(self.texts.digest().encode() + labels).hexdigest()[:16]

    def collate(self, index: Int[Tensor, " B"]) -> dict[str, Tensor]:
        """The responses of the prompts numbered ``index``, as arguments of the loss."""
        counts = self.counts[index]
        within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        rows = self.starts[index].repeat_interleave(counts) + within
        texts = self.texts.batch(rows) if self.features is None else {"features": self.features[rows]}
        batch = {"counts": counts, "ranks": self.ranks[rows], "margins": self.margins[index]}
        return {**texts, **batch}

    def items(self, index: Int[Tensor, " B"]) -> int:
        """Prompts, which weigh the same however many responses they have."""
        return len(index)


def table(values: Tensor, counts: Int[Tensor, " B"]) -> tuple[Tensor, Bool[Tensor, "B K"]]:
    """Values of ``counts[b]`` responses per prompt, one after another, as ``([B, K], mask)``; keeps the gradient."""
    mask = torch.arange(int(counts.max()), device=values.device) < counts.to(values.device)[:, None]
    return values.new_zeros(mask.shape).masked_scatter(mask, values), mask
