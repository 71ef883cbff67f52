"""Several reward models as one, to be harder to exploit than any of them.

Where members disagree, a policy may have found an error of one of them. ``min`` pays what the most sceptical member
would, ``mean_minus_std`` and ``uncertainty`` charge for disagreement: λ standard deviations, or λ times the variance
(worst-case and uncertainty-weighted optimisation: Coste et al. 2023, "Reward Model Ensembles Help Mitigate
Overoptimization"). Members should be normalised alike, or the one of the widest scores decides alone.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, cast, final, get_args

import numpy as np
from jaxtyping import Float

from reward_models.base import joint_identity
from reward_models.transformer import TransformerRewardModel
from textenv.registry import RewardFunction
from textenv.scoring import checked_scores, score_texts

Combine = Literal["mean", "min", "mean_minus_std", "uncertainty"]


@final
class Ensemble:
    """Scores with every member and combines; with ``coefficient`` λ where disagreement costs."""

    def __init__(
        self, members: Mapping[str, RewardFunction], *, combine: Combine = "mean", coefficient: float | None = None
    ) -> None:
        if not members:
            raise ValueError("an ensemble must have at least one member, with members (={}).")
        if combine not in get_args(Combine):
            raise ValueError(f"combine must be one of {get_args(Combine)}, with combine (={combine!r}).")
        charged = combine in ("mean_minus_std", "uncertainty")
        if coefficient is not None and not (charged and math.isfinite(coefficient) and coefficient >= 0):
            raise ValueError(
                "coefficient must be finite and ≥ 0, and goes with combine 'mean_minus_std' or 'uncertainty' only, "
                f"with coefficient (={coefficient}), combine (={combine!r})."
            )
        self.members = dict(members)
        self.combine: Combine = cast(Combine, combine)
        self.coefficient = (1.0 if coefficient is None else coefficient) if charged else 0.0

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        scores = self.member_scores(prompts, completions, **columns)
        return combined(scores, self.combine, self.coefficient).tolist()

    def member_scores(self, prompts: list[str], completions: list[str], **columns: Any) -> Float[np.ndarray, "M B"]:
        """Scores of every member. Transformers that read a text as the same tokens share the tokens."""
        encoded: dict[str, Any] = {}
        rows = []
        for name, member in self.members.items():
            label = f"member {name!r} of an ensemble"
            if isinstance(member, TransformerRewardModel):
                if member.reading not in encoded:
                    encoded[member.reading] = member.encode(prompts, completions, columns.get("chat"))
                scores = member.scores(encoded[member.reading]).tolist()
                rows.append(checked_scores(scores, prompts, completions, label))
            else:
                rows.append(score_texts(member, prompts, completions, columns, label))
        return np.stack(rows)

    @property
    def identity(self) -> str | None:
        return joint_identity("ensemble", self.members, combine=self.combine, coefficient=self.coefficient)


def combined(scores: Float[np.ndarray, "M B"], combine: Combine, coefficient: float) -> Float[np.ndarray, " B"]:
    """One score a text from those of M members. Standard deviation and variance are those of the members at hand (over
    M, not M − 1), as in Coste et al.: an ensemble of one costs nothing."""
    if combine == "min":
        return scores.min(0)
    if combine == "mean_minus_std":
        return scores.mean(0) - coefficient * scores.std(0)
    if combine == "uncertainty":
        return scores.mean(0) - coefficient * scores.var(0)
    return scores.mean(0)
