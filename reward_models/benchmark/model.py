"""The reward model under test: asks it for scores, refuses those that are not finite, and counts texts for progress."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

import textenv
from reward_models.benchmark.layout import Inputs
from textenv.lm import Responses
from textenv.protocols import RewardModel
from textenv.scoring import Finished, call_reward_model

CHUNK = 512
"""Texts per call: small enough for a moving progress bar, large enough for any batch."""


class Refused(NamedTuple):
    """The model would not score an altered text (an empty prompt, say); that is a result, not an error."""

    reason: str
    crashed: bool
    """It raised something other than a ValueError: it broke rather than refused."""


class BenchmarkedModel:
    """A reward model with its name, its declared scale, and the number of texts that it has scored."""

    def __init__(
        self,
        model: RewardModel | str,
        name: str | None = None,
        expected: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """``model``: a callable, or a registered name, ``module:callable``, folder or hub id. ``expected`` texts in
        all; ``on_progress`` is called with the number done and the number expected."""
        self.model: RewardModel = textenv.reward_model(model) if isinstance(model, str) else model
        self.name = name or (model if isinstance(model, str) else getattr(model, "__name__", type(model).__name__))
        self._done, self._expected, self._on_progress = 0, expected, on_progress

    @property
    def score_unit(self) -> float | None:
        """Log-odds in one unit of score, where the model says so."""
        unit = getattr(self.model, "score_unit", None)
        return None if unit is None else float(unit)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return getattr(self.model, "tokenizer", None)

    def __call__(self, texts: Inputs, chunk: int = CHUNK) -> Float[np.ndarray, " N"]:
        """One finite score per text.

        Raises:
            ValueError: a score is not finite or missing (names the prompt), or the model refuses a text.
        """
        parts = [np.zeros(0)]
        for start in range(0, len(texts.responses), chunk):
            part = texts.select(range(start, min(start + chunk, len(texts.responses))))
            parts.append(call_reward_model(self.model, _finished(part)))
            self._done += len(part.responses)
            if self._on_progress is not None:
                self._on_progress(self._done, max(self._expected, self._done))
        return np.concatenate(parts)

    def finish(self) -> None:
        """Tell the progress bar that nothing more will be scored."""
        if self._on_progress is not None:
            self._on_progress(max(self._done, self._expected), max(self._done, self._expected))

    def attempt(self, texts: Inputs) -> Float[np.ndarray, " N"] | Refused:
        """Scores of altered texts, or why the model did not give them: the report says so and goes on."""
        try:
            return self(texts)
        except ValueError as error:
            return Refused(str(error), crashed=False)
        except Exception as error:  # whatever a model may raise on odd texts
            return Refused(f"{type(error).__name__}: {error}", crashed=True)


def _finished(texts: Inputs) -> Finished:
    """The texts as the environment's scorer takes them; tokens play no part in a reward model's score."""
    none, lengths = torch.zeros(len(texts.responses), 0, dtype=torch.int64), torch.zeros(len(texts.responses)).long()
    return Finished(Responses(none, lengths, none, lengths), texts.prompts, texts.responses, texts.columns, None)
