"""How well a reward model agrees with held-out rankings: accuracy, NLL and calibration."""

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from reward_models.preferences import Ranking, better_pairs, load_rankings, prompt_key
from reward_models.scorers.transformer import TransformerRewardModel
from textenv import stats


def evaluate_reward_model(
    model: TransformerRewardModel, rankings: Sequence[Ranking | Mapping[str, Any]] | str | Path
) -> dict[str, float]:
    """Measure a reward model on rankings.

    Returns:
        ``accuracy_per_pair`` (share of pairs ordered as ranked; equal scores count one half) and ``nll_per_pair``
        (nats), in which every pair weighs the same; ``accuracy_per_ranking`` and ``nll_per_ranking``, in which every
        ranking does, as in training. Each has half the width of its 95 % interval over prompts beside it (``…_ci95``).
        Then ``margin_per_pair`` (mean log-odds of the better response), ``calibration_slope_per_pair``,
        ``ece_per_pair``, and the counts ``pairs``, ``ties`` and ``prompts``.

        The NLL is that of ``σ(score_unit · (s_better − s_worse))``, so that normalisation changes no figure. Margins
        play no part; tied pairs are only counted; two equal responses are no pair.

    Raises:
        ValueError: a record is malformed, or no pair is decided.
    """
    rankings = load_rankings(rankings)
    return measure_scores(model.scores(model.encode_rankings(rankings)) * model.score_unit, rankings)


def measure_scores(scores: Float[Tensor, " n"], rankings: Sequence[Ranking]) -> dict[str, float]:
    """The figures of :func:`evaluate_reward_model`, from the scores (log-odds) of all responses in order."""
    starts = np.cumsum([0, *(len(ranking.responses) for ranking in rankings)])
    rows = [
        (starts[i] + better, starts[i] + worse, i)
        for i, ranking in enumerate(rankings)
        for better, worse in better_pairs(ranking.responses, ranking.levels)
    ]
    if not rows:
        raise ValueError(f"rankings must hold a decided pair to measure on, got {len(rankings)} of ties. Add rankings.")
    better, worse, ranking = np.array(rows).T
    margins = scores.double().numpy()[better] - scores.double().numpy()[worse]
    _, prompt = np.unique([prompt_key(ranking.prompt) for ranking in rankings], return_inverse=True)
    some = np.unique(ranking)  # rankings with a decided pair
    figures: dict[str, float] = {}
    for name, values in {"accuracy": stats.correct(margins), "nll": stats.nll(margins)}.items():
        sums, counts = stats.cluster_sums(values, ranking)
        for weighting, per, cluster in (("ranking", sums / counts, prompt[some]), ("pair", values, prompt[ranking])):
            mean = stats.mean_ci95(per, cluster)
            figures |= {f"{name}_per_{weighting}": mean.mean, f"{name}_per_{weighting}_ci95": mean.ci95}
    ties = sum(len(list(better_pairs(r.responses, r.levels, operator.eq))) for r in rankings)
    return figures | {
        "margin_per_pair": float(margins.mean()),
        "calibration_slope_per_pair": stats.calibration_slope(margins, prompt[ranking]).value,
        "ece_per_pair": stats.ece(stats.reliability(margins, prompt[ranking])),
        "pairs": float(len(rows)),
        "ties": float(ties),
        "prompts": float(prompt.max() + 1),
    }
