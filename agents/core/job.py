"""What an experiment gets from an algorithm."""

from typing import Any, NamedTuple

from transformers import PreTrainedModel


class Trained(NamedTuple):
    """An agent after its training."""

    agent: Any
    """Has ``respond`` or ``predict``, as :func:`textenv.evaluation.evaluate` wants it."""
    model: PreTrainedModel | None
    """The policy's language model, for exact measurement; None when the agent is no single model."""
    curve: list[dict[str, float]]
    """Means of the training episodes by update: ``episodes, reward, rm_score, kl``, and ``gold_score`` where known."""
    tokens: int
    """Response tokens sampled in training."""
