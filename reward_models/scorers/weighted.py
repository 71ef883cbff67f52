"""A weighted sum of reward models, itemised: an environment lists each part in ``info["reward_terms"]``."""

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, final

import numpy as np
from jaxtyping import Float

from reward_models.identity import joint_identity
from textenv.protocols import RewardModel
from textenv.scoring import score_texts
from textenv.settings import check_value


class Part(NamedTuple):
    """One summand."""

    model: RewardModel
    weight: float = 1.0


@final
class WeightedSum:
    """``Σ_p weight_p · score_p``; the parts have names, which appear as ``reward_model/<name>``."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        if not parts:
            raise ValueError("a weighted sum must have at least one part, got none. Add one.")
        for name, part in parts.items():
            check_value(f"the weight of part {name!r}", part.weight, Annotated[float, "Change it."])
        self.parts = dict(parts)

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return np.asarray(sum(self.terms(prompts, completions, **columns).values())).tolist()

    def terms(self, prompts: list[str], completions: list[str], **columns: Any) -> dict[str, Float[np.ndarray, " B"]]:
        """Weighted scores of each part; a part that is itself a sum lists its own parts as ``<part>/<name>``."""
        out: dict[str, np.ndarray] = {}
        for name, (model, weight) in self.parts.items():
            if isinstance(model, WeightedSum):
                inner = model.terms(prompts, completions, **columns)
                out |= {f"{name}/{key}": weight * scores for key, scores in inner.items()}
            else:
                label = f"part {name!r} of a weighted sum"
                out[name] = weight * score_texts(model, prompts, completions, columns, label)
        return out

    @property
    def identity(self) -> str | None:
        weights = {name: part.weight for name, part in self.parts.items()}
        return joint_identity("weighted", {n: p.model for n, p in self.parts.items()}, weights=weights)
