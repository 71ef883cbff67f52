"""How well a reward model agrees with rankings: accuracy, NLL and calibration, a prompt or a pair at a time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reward_models.preferences import Ranking, load_rankings, prompt_key
from reward_models.scorers.transformer import TransformerRewardModel
from reward_models.training.losses import ranking_accuracy

MAX_SLOPE = 100.0
"""Where the search for the calibration slope ends: reached when every pair is ordered right, or every one wrong."""


def evaluate_reward_model(
    model: TransformerRewardModel, rankings: Sequence[Ranking | Mapping[str, Any]] | str | Path
) -> dict[str, float]:
    """``accuracy`` (share of pairs ordered right, equal scores one half) and ``nll`` (nats a pair), with standard
    errors ``accuracy_se`` and ``nll_se`` clustered by prompt; ``calibration_slope`` and ``ece``; the counts ``pairs``,
    ``ties`` and ``prompts``.

    Every ranking weighs the same, as in training; margins play no part, and tied pairs only count as ``ties``. The NLL
    is that of ``σ(score_unit · (s_better − s_worse))``, so normalisation changes no figure.
    """
    rankings = load_rankings(rankings)
    return measure_scores(model.scores(model.encode_rankings(rankings)) * model.score_unit, rankings)


def measure_scores(scores: Float[Tensor, " n"], rankings: Sequence[Ranking]) -> dict[str, float]:
    """What :func:`evaluate_reward_model` returns, from the scores (log-odds) of all responses, one after another."""
    counts, ranks = counts_of(rankings), ranks_of(rankings)
    table_scores, mask = table(scores, counts)
    table_ranks = table(ranks, counts)[0]
    better = (table_ranks[:, :, None] < table_ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    decided = better.sum((1, 2))
    some = decided > 0
    if not some.any():
        raise ValueError("rankings must hold a pair that is no tie to measure a model on. Add rankings.")
    keys: dict[str, int] = {}
    cluster = torch.tensor([keys.setdefault(prompt_key(ranking.prompt), len(keys)) for ranking in rankings])[some]
    accuracy, accuracy_se = clustered_mean(ranking_accuracy(table_scores, mask, table_ranks)[some], cluster)
    gaps = (table_scores[:, :, None] - table_scores[:, None, :])[better]
    weights = (1.0 / decided)[:, None, None].expand(better.shape)[better]
    losses = gaps.new_zeros(better.shape).masked_scatter(better, -torch.nn.functional.logsigmoid(gaps))
    nll, nll_se = clustered_mean((losses.sum((1, 2)) / decided.clamp(min=1))[some], cluster)
    return {
        "accuracy": accuracy,
        "accuracy_se": accuracy_se,
        "nll": nll,
        "nll_se": nll_se,
        "calibration_slope": calibration_slope(gaps, weights),
        "ece": expected_calibration_error(gaps, weights),
        "pairs": float(decided.sum()),
        "ties": float((counts * (counts - 1) // 2).sum() - decided.sum()),
        "prompts": float(len(keys)),
    }


def calibration_slope(gaps: Float[Tensor, " n"], weights: Float[Tensor, " n"]) -> float:
    """The b that makes ``σ(b · gap)`` fit best, with gap = better − worse in log-odds; in [−100, 100].

    1 is calibrated, less is over-confident, more under-confident (Cox 1958, without intercept since swapping the two
    responses of a pair must swap the odds). Found by bisection: the likelihood is concave in b. Gaps that are all 0 fit
    every b alike, and get 0.
    """
    gaps, weights = gaps.double(), weights.double()
    if not gaps.any():
        return 0.0
    low, high = -MAX_SLOPE, MAX_SLOPE
    for _ in range(60):
        middle = (low + high) / 2
        rising = (weights * gaps * torch.sigmoid(-middle * gaps)).sum() > 0
        low, high = (middle, high) if rising else (low, middle)
    return (low + high) / 2


def expected_calibration_error(gaps: Float[Tensor, " n"], weights: Float[Tensor, " n"], bins: int = 10) -> float:
    """``Σ_bins share · |accuracy − confidence|`` over bins of equal width of the confidence ``σ(|gap|)`` in [½, 1]
    (Naeini et al. 2015)."""
    gaps, weights = gaps.double(), weights.double() / weights.double().sum()
    confidence = torch.sigmoid(gaps.abs())
    right = (gaps > 0).double() + 0.5 * (gaps == 0).double()
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    off = torch.zeros(bins, dtype=torch.float64).index_add(0, place, weights * (right - confidence))
    return off.abs().sum().item()


def clustered_mean(values: Float[Tensor, " B"], cluster: Int[Tensor, " B"]) -> tuple[float, float]:
    """Mean of ``values`` and its standard error when only the clusters (numbered from 0) are independent.

    ``SE² = G/(G − 1) · Σ_g (Σ_{i ∈ g} (x_i − x̄))² / n²`` over G clusters; 0 with a single one.
    """
    values = values.double()
    mean = values.mean()
    _, place = cluster.unique(return_inverse=True)
    groups = int(place.max()) + 1
    sums = torch.zeros(groups, dtype=torch.float64).index_add(0, place, values - mean)
    se = (sums.square().sum() * groups / max(groups - 1, 1)).sqrt() / len(values)
    return mean.item(), se.item() if groups > 1 else 0.0


def table(scores: Tensor, counts: Int[Tensor, " B"]) -> tuple[Tensor, Bool[Tensor, "B K"]]:
    """Values of ``counts[b]`` responses a prompt, one after another, as ``([B, K], mask)``; with gradient."""
    mask = torch.arange(int(counts.max()), device=scores.device) < counts.to(scores.device)[:, None]
    return scores.new_zeros(mask.shape).masked_scatter(mask, scores), mask


def counts_of(rankings: Sequence[Ranking]) -> Int[Tensor, " N"]:
    """Responses of each ranking."""
    return torch.tensor([len(ranking.responses) for ranking in rankings])


def ranks_of(rankings: Sequence[Ranking]) -> Int[Tensor, " n"]:
    """Ranks of all responses, one after another."""
    return torch.tensor([rank for ranking in rankings for rank in ranking.levels])
