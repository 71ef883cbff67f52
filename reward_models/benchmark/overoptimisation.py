"""How gold gains bend over as a proxy is optimised: the functional forms of Gao, Schulman, Hilton (2022).

With ``d = √KL(π ‖ π_ref)`` and gains over the reference:

* best-of-n  ``R(d) = d (α − β d)``, highest at ``d = α / 2β``;
* RL         ``R(d) = d (α − β log d)``, highest at ``d = exp(α/β − 1)``.

α is the slope of early gains (for RL the slope at d = 1), β how fast they fade. Both forms are linear in (α, β) and
are fitted by least squares.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

Form = Literal["best-of-n", "rl"]


class Bend(NamedTuple):
    """A fitted form."""

    form: Form
    alpha: float
    beta: float
    r_squared: float
    """Share of the gains' variance that the form explains; NaN where they do not vary."""

    def gain(self, d: Float[np.ndarray, " D"]) -> Float[np.ndarray, " D"]:
        """``R(d)``; 0 at d = 0."""
        first, second = _columns(self.form, np.asarray(d, dtype=np.float64))
        return self.alpha * first + self.beta * second

    @property
    def peak(self) -> float:
        """The d of the highest gain; ∞ where the form never bends down (β ≤ 0)."""
        if self.beta <= 0:
            return math.inf
        if self.form == "best-of-n":
            return max(self.alpha / (2 * self.beta), 0.0)
        return math.exp(min(self.alpha / self.beta - 1, 700.0))


def fit_bend(form: Form, d: Sequence[float] | Any, gains: Sequence[float] | Any) -> Bend:
    """Fit a form to points of d = √KL (≥ 0) and gain over the reference.

    Raises:
        ValueError: fewer than two points lie away from d = 0, or a value is not finite.
    """
    d, gains = np.asarray(d, dtype=np.float64), np.asarray(gains, dtype=np.float64)
    if len(np.unique(d[d > 0])) < 2 or not (np.isfinite(d).all() and np.isfinite(gains).all()) or (d < 0).any():
        rule = "a form needs finite points, two or more of them at different d > 0"
        raise ValueError(f"{rule}, got d {d.tolist()} and gains {gains.tolist()}. Measure more points.")
    columns = np.stack(_columns(form, d), axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(columns, gains, rcond=None)
    total = float(np.sum((gains - gains.mean()) ** 2))
    left = float(np.sum((gains - columns @ np.array([alpha, beta])) ** 2))
    return Bend(form, float(alpha), float(beta), 1 - left / total if total else math.nan)


def _columns(form: Form, d: Float[np.ndarray, " D"]) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
    """What α and β multiply."""
    if form == "best-of-n":
        return d, -(d**2)
    return d, -d * np.log(np.where(d > 0, d, 1.0))
