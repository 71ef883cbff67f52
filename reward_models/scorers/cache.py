"""Scores cached on disk: no process that shares the file scores a text twice with the same model."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, final

from reward_models.identity import identity_of
from reward_models.scorers.store import Store
from textenv.protocols import RewardModel
from textenv.scoring import accepted_columns, note_truncated, score_texts, truncations


@final
class CachedRewardModel:
    """Another reward model behind an SQLite file.

    A score is filed under a SHA-256 of the model's identity (:func:`.identity_of`; for a transformer
    a digest of its weights), the prompt, the completion and the columns that the model takes. A changed model therefore
    never finds the scores of the old one. A plain callable has no identity: give it a ``version``, and change that
    whenever the callable changes. Threads, forks and several processes may share the file. A reward model that itemises
    its terms is cached as their sum. The file also keeps which responses the model did not read to their end.
    """

    def __init__(self, model: RewardModel, path: str | Path, *, version: str | None = None) -> None:
        """``version`` is part of the key, beside the model's identity if it has one.

        Raises:
            ValueError: the model has no identity and no version is given, or the file is no SQLite database.
        """
        own = identity_of(model)
        if own is None and version is None:
            raise ValueError(
                "a cached reward model must have an identity or a version, got neither (a plain callable or URL has no "
                "identity). Pass version=… (any string), and another one whenever the model changes."
            )
        self._model, self._store = model, Store(path, "scores", what="score cache")
        self._cut = Store(path, "truncated", what="score cache")  # texts that the model did not read to their end
        self.identity = json.dumps(["cached", own, version])

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        taken = accepted_columns(self._model, columns)
        keys = [
            self._key(prompt, completion, {name: values[i] for name, values in taken.items()})
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        known = self._store.read(keys, lambda score: isinstance(score, float) and math.isfinite(score))
        new = list({key: i for i, key in enumerate(keys) if key not in known}.values())
        if new:
            some = {name: [values[i] for i in new] for name, values in taken.items()}
            texts = [prompts[i] for i in new], [completions[i] for i in new]
            with truncations() as cut:
                scores = score_texts(self._model, *texts, some, "a cached reward model").tolist()
            self._cut.write({keys[i]: 1.0 for i in new if completions[i] in cut})
            fresh = dict(zip((keys[i] for i in new), scores, strict=True))
            self._store.write(fresh)
            known |= fresh
        cut_keys = self._cut.read(keys, lambda mark: mark == 1.0)
        note_truncated(completion for key, completion in zip(keys, completions, strict=True) if key in cut_keys)
        return [known[key] for key in keys]

    def __len__(self) -> int:
        """Scores in the file, of every model."""
        return len(self._store)

    def _key(self, prompt: Any, completion: str, columns: dict[str, Any]) -> bytes:
        try:
            text = json.dumps([self.identity, prompt, completion, columns], sort_keys=True)
        except TypeError as error:
            rule = "columns must be JSON values to be part of a cache's key"
            raise ValueError(f"{rule}, got {columns}: {error}. Leave others out.") from None
        return hashlib.sha256(text.encode()).digest()
