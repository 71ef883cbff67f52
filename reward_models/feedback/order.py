"""Active learning: ask people first where reward models disagree (Seung, Opper, Sompolinsky 1992: query by committee).

The disagreement on an item is the mean, over its pairs of responses, of the standard deviation between the models of
``P(first better) = σ(score difference)``.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Float
from scipy.special import expit

from reward_models.feedback.project import Item, Project
from textenv.protocols import RewardModel
from textenv.scoring import score_texts


def order_by_disagreement(
    project: Project, models: Sequence[RewardModel], advance: Callable[[int, int], object] = lambda done, total: None
) -> None:
    """Let a project's queue begin with the items on which the models disagree most.

    Raises:
        ValueError: there are not two models.
    """
    if len(models) < 2:
        raise ValueError(
            f"order 'uncertain' must have two or more reward models, got {len(models)}. Name them with --reward-model."
        )
    items = project.items()
    scores = []
    for number, model in enumerate(models, start=1):
        scores.append(item_scores(items, model))
        advance(number, len(models))
    values = [disagreement(np.stack(own)) for own in zip(*scores, strict=True)]
    with project.write() as database:
        rows = [(value, item.id) for value, item in zip(values, items, strict=True)]
        database.executemany("UPDATE items SET priority = ? WHERE id = ?", rows)


def item_scores(items: Sequence[Item], model: RewardModel) -> list[Float[np.ndarray, " K"]]:
    """Scores of each item's responses."""
    responses = [response for item in items for response in item.responses]
    prompts = [item.prompt for item in items for _ in item.responses]
    reasons = [response.finish_reason for response in responses]
    scores = score_texts(model, prompts, [response.text for response in responses], {"finish_reason": reasons})
    return np.split(np.asarray(scores), np.cumsum([len(item.responses) for item in items])[:-1])


def disagreement(scores: Float[np.ndarray, "M K"]) -> float:
    """How far M models disagree about the order of K responses; 0 if they agree."""
    pairs = list(combinations(range(scores.shape[1]), 2))
    chances = np.stack([expit(scores[:, a] - scores[:, b]) for a, b in pairs], axis=1) if pairs else np.zeros((1, 1))
    return float(chances.std(0).mean())
