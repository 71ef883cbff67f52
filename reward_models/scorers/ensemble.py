"""Several reward models combined into one that is harder to exploit than any of them.

Where members disagree, a policy may have found an error of one of them. ``min`` pays what the most sceptical member
would, ``mean_minus_std`` and ``uncertainty`` charge for disagreement: λ standard deviations, or λ times the variance
(worst-case and uncertainty-weighted optimisation: Coste et al. 2023, "Reward Model Ensembles Help Mitigate
Overoptimization"). Members should be normalised alike, or the one with the widest scores decides alone.

Every member scores a whole batch at once. Transformers that encode texts alike share the tokens, and heads on one
frozen trunk share its pass, so that an ensemble of them costs no more than one of them.
"""

import math
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, final, get_args

import numpy as np
from jaxtyping import Float
from torch import Tensor

from reward_models.identity import joint_identity
from reward_models.scorers.features import trunk_features
from reward_models.scorers.texts import EncodedTexts
from reward_models.scorers.transformer import TransformerRewardModel
from textenv.protocols import RewardModel
from textenv.scoring import checked_scores, score_texts

Combine = Literal["mean", "min", "mean_minus_std", "uncertainty"]


@final
class Ensemble:
    """Combines the scores of its members; ``coefficient`` is the price λ of disagreement."""

    def __init__(
        self, members: Mapping[str, RewardModel], *, combine: Combine = "mean", coefficient: float | None = None
    ) -> None:
        if not members:
            raise ValueError("an ensemble must have at least one member, got none. Add one.")
        if combine not in get_args(Combine):
            ways = ", ".join(map(repr, get_args(Combine)))
            raise ValueError(f"combine must be one of {ways}, got {combine!r}. Choose one.")
        charged = combine in ("mean_minus_std", "uncertainty")
        if coefficient is not None and not (charged and math.isfinite(coefficient) and coefficient >= 0):
            rule = "coefficient must be finite and 0 or more, and needs combine 'mean_minus_std' or 'uncertainty'"
            raise ValueError(f"{rule}, got {coefficient} with combine {combine!r}. Leave it out or change combine.")
        self.members = dict(members)
        self.combine: Combine = combine
        self.coefficient = (1.0 if coefficient is None else coefficient) if charged else 0.0

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        scores = self.member_scores(prompts, completions, **columns)
        return combined(scores, self.combine, self.coefficient).tolist()

    def member_scores(self, prompts: list[str], completions: list[str], **columns: Any) -> Float[np.ndarray, "M B"]:
        """Scores of every member; tokens and features that members share are computed once."""
        tokens: dict[str, EncodedTexts] = {}
        features: dict[tuple[str, str], Tensor] = {}
        rows = []
        for name, member in self.members.items():
            label = f"member {name!r} of an ensemble"
            if not isinstance(member, TransformerRewardModel):
                rows.append(score_texts(member, prompts, completions, columns, label))
                continue
            reading, trunk = self._kinds[name]
            if reading not in tokens:
                tokens[reading] = member.encode(prompts, completions, columns.get("chat"))
            if self._members_of_a_kind[reading, trunk] == 1:
                scores = member.scores(tokens[reading])
            else:
                if (reading, trunk) not in features:
                    features[reading, trunk] = trunk_features(member, tokens[reading])
                scores = member.scores_of(features[reading, trunk])
            rows.append(checked_scores(scores.tolist(), prompts, completions, label))
        return np.stack(rows)

    @cached_property
    def _kinds(self) -> dict[str, tuple[str, str]]:
        """How each transformer encodes a text, and the identity of its trunk."""
        members = self.members.items()
        return {name: (m.reading, m.trunk_identity) for name, m in members if isinstance(m, TransformerRewardModel)}

    @cached_property
    def _members_of_a_kind(self) -> Counter[tuple[str, str]]:
        return Counter(self._kinds.values())

    @property
    def identity(self) -> str | None:
        return joint_identity("ensemble", self.members, combine=self.combine, coefficient=self.coefficient)


def combined(scores: Float[np.ndarray, "M B"], combine: Combine, coefficient: float) -> Float[np.ndarray, " B"]:
    """One score per text from those of M members. Standard deviation and variance divide by M, not M − 1, as in Coste
    et al.: an ensemble of one pays nothing for disagreement."""
    if combine == "min":
        return scores.min(0)
    if combine == "mean_minus_std":
        return scores.mean(0) - coefficient * scores.std(0)
    if combine == "uncertainty":
        return scores.mean(0) - coefficient * scores.var(0)
    return scores.mean(0)
