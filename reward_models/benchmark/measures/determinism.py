"""The same text must score the same, whatever stands beside it in the batch."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from reward_models.benchmark.layout import Inputs
from reward_models.benchmark.measure import BenchmarkReport, Column, Measure
from reward_models.benchmark.model import BenchmarkedModel
from reward_models.scorers.heads import score_head
from reward_models.scorers.transformer import TransformerRewardModel
from textenv.lm import length_buckets
from textenv.lm.batch import length_mask

BATCHES = (1, 8, 64)
VARIED = 256
"""Texts that are scored again in other batches."""
TOLERANCE = 1e-3
"""Standard deviations within a prompt; float32 arithmetic in another order stays far below."""


class Determinism(NamedTuple):
    """Largest change of a score, in standard deviations within a prompt."""

    changes: Mapping[str, float]
    """By what was varied: asked again, batches of 1, 8, 64, shuffled order, padding on the left."""
    texts: int

    @property
    def worst(self) -> float:
        return max(self.changes.values())

    @property
    def passed(self) -> bool:
        return self.worst <= TOLERANCE


def determinism(texts: Inputs, scorer: BenchmarkedModel, *, unit: float, seed: int, limit: int = VARIED) -> Determinism:
    """Score up to ``limit`` texts all at once, then in other batches. ``unit``: a standard deviation of the scores."""
    rng = np.random.default_rng(seed)
    count = min(limit, len(texts.responses))
    texts = texts.select(np.sort(rng.permutation(len(texts.responses))[:count]))
    base = scorer(texts, chunk=count)
    changed = {"asked again": scorer(texts, chunk=count)}
    for size in BATCHES:
        changed[f"batches of {size}"] = scorer(texts, chunk=size)
    order = rng.permutation(count)
    shuffled = np.empty(count)
    shuffled[order] = scorer(texts.select(order), chunk=count)
    changed["shuffled"] = shuffled
    if isinstance(scorer.model, TransformerRewardModel) and takes_left_padding(scorer.model):
        changed["left padding"] = left_padded_scores(scorer.model, texts)
    unit = unit if unit > 0 else 1.0
    return Determinism({name: float(np.abs(values - base).max()) / unit for name, values in changed.items()}, count)


def takes_left_padding(model: TransformerRewardModel) -> bool:
    """A decoder whose positions can be given."""
    trunk = model.model.base_model
    return getattr(model, "is_decoder", True) and "position_ids" in inspect.signature(trunk.forward).parameters


@torch.no_grad()
def left_padded_scores(model: TransformerRewardModel, texts: Inputs) -> Float[np.ndarray, " N"]:
    """Scores from rows padded on the left, with mask and positions from the lengths."""
    ragged = model.encode(texts.prompts, texts.responses)
    out = torch.zeros(len(ragged.lengths))
    trunk: Any = model.model.base_model
    for index in length_buckets(ragged.lengths, 3 * model.batch_size):  # wider buckets than usual: more padding
        input_ids, lengths = ragged.padded(index, left=True)
        mask = length_mask(lengths, input_ids.shape[1]).flip(1).long().to(model.model.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        hidden = trunk(
            input_ids=input_ids.to(mask.device), attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state[:, -1]
        out[index] = score_head(model.model)(hidden).squeeze(-1).float().cpu()
    return out.double().numpy()


def cell(report: BenchmarkReport) -> str:
    worst = report.determinism.worst
    return f"{worst:.0e}".replace("-0", "−").replace("+0", "") if worst else "0"


def flags(report: BenchmarkReport) -> Iterator[str]:
    found: Determinism = report.determinism
    if not found.passed:
        varied = max(found.changes, key=lambda name: found.changes[name])
        yield f"scores depend on more than their text: {varied} moves one by {found.worst:.2g} sd"


MEASURE = Measure(
    lambda run: {"determinism": determinism(run.layout.texts, run.scorer, unit=run.sd, seed=run.config.seed)},
    texts=lambda suite, layout: (3 + len(BATCHES)) * min(len(layout.texts.responses), VARIED),
    columns=(Column("batch Δ", "sd", "largest change of a score by what stands beside it", cell),),
    flags=flags,
    title="The same text, the same score?",
    text="Largest change of a score when the rest of its batch changes, in standard deviations within a prompt.",
    rows=lambda report: {
        f"{name}, sd": f"{change:.1e}".replace("e-0", "e-") if change else "0"
        for name, change in report.determinism.changes.items()
    },
)
