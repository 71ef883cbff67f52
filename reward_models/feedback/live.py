"""A reward model that learns while people rank: trained again every few answers, measured on rankings it never saw."""

import sqlite3
import threading
from collections.abc import Sequence

from reward_models.evaluation import evaluate_reward_model
from reward_models.feedback.export import records
from reward_models.feedback.project import Project
from reward_models.feedback.web.dashboard import Figure
from reward_models.preferences import Ranking, load_rankings, prompt_key
from reward_models.training.trainer import RewardConfig, train_reward_model
from textenv.lm import LanguageModel
from textenv.pages.numbers import percent

CONFIG = RewardConfig(learning_rate=1e-3, epochs=3, batch_size=8, freeze_embeddings=True)
EVERY = 4
"""One of so many prompts is held out; the model is trained again after so many answers."""


class LiveModel:
    """Trains in a thread of its own, on all rankings so far but the held-out ones."""

    def __init__(self, project: Project, model: LanguageModel, config: RewardConfig = CONFIG) -> None:
        """The trunk of ``model`` is copied for each training."""
        self.project, self.model, self.config = project, model, config
        self.trained = 0
        """Rankings that the present model has learned from."""
        self.agreement: dict[str, float] | None = None
        """Figures of :func:`reward_models.evaluate_reward_model` on the held-out rankings."""
        self._lock = threading.Lock()

    def answered(self) -> None:
        """Train again if enough came in and no training runs."""
        threading.Thread(target=self.update, daemon=True).start()

    def update(self) -> None:
        """Train and measure, unless another thread does or the project is closed."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            items = {item.id: item for item in self.project.items()}
            rows = [row for own in self.project.annotations() for row in records([items[own.item]], [own], "annotator")]
            train, held_out = split(rows)
            if len(train) - self.trained >= EVERY and any(len(set(ranking.levels)) > 1 for ranking in held_out):
                trained = train_reward_model(self.model, train, self.config).model
                self.agreement = evaluate_reward_model(trained, held_out)
                self.trained = len(train)
        except sqlite3.ProgrammingError:  # closed: the server has ended
            pass
        finally:
            self._lock.release()

    def figures(self) -> list[Figure]:
        """What pages show of it."""
        if self.agreement is None:
            return [Figure("reward model", "not yet", "it learns after some answers")]
        share, ci95 = self.agreement["accuracy_per_pair"], self.agreement["accuracy_per_pair_ci95"]
        pairs, prompts = self.agreement["pairs"], self.agreement["prompts"]
        note = f"± {percent(ci95)}; {pairs:.0f} pairs of {prompts:.0f} held-out prompts, after {self.trained} rankings"
        return [Figure("reward model agrees with you", f"{percent(share)} %", note)]


def split(rows: Sequence[dict]) -> tuple[list[Ranking], list[Ranking]]:
    """``(training, held out)``: every fourth prompt is held out, in the order in which prompts were first ranked."""
    rankings = load_rankings(rows) if rows else []
    prompts = list(dict.fromkeys(prompt_key(ranking.prompt) for ranking in rankings))
    held_out = set(prompts[EVERY - 1 :: EVERY])
    sides: tuple[list[Ranking], list[Ranking]] = ([], [])
    for ranking in rankings:
        sides[prompt_key(ranking.prompt) in held_out].append(ranking)
    return sides
