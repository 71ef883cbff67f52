"""The reward model: one score a text, whatever stands beside it, and of the whole text."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from agents.doctor.finding import Check, Seen
from reward_models.benchmark.layout import Inputs
from reward_models.benchmark.measures.determinism import TOLERANCE, Determinism, determinism
from reward_models.benchmark.measures.length import within_prompt_spearman
from reward_models.benchmark.model import BenchmarkedModel, Refused
from reward_models.preferences import prompt_key
from textenv.conformance.subject import Skipped
from textenv.protocols import RewardModel
from textenv.scoring import truncations
from textenv.stats import mean_ci95, within_prompt_sd

MOVED, FAR = 0.01, 0.5
"""Standard deviations by which an invisible change of a text moves its score: to be noted, to be warned of."""
LINKED, BOUND = 0.3, 0.8
"""Rank correlations of score and length: to be noted, to be warned of."""


class RewardPart:
    """A reward model with texts to score."""

    def __init__(self, model: RewardModel, name: str, texts: Inputs) -> None:
        self.scorer, self.name, self.texts = BenchmarkedModel(model, name), name, texts

    @functools.cached_property
    def prompt(self) -> Int[np.ndarray, " N"]:
        """The prompt of each text, as a number."""
        return np.unique([prompt_key(prompt) for prompt in self.texts.prompts], return_inverse=True)[1]

    @functools.cached_property
    def scores(self) -> Float[np.ndarray, " N"]:
        """Raises :class:`Skipped` where there are none: another check says why."""
        found = self.scorer.attempt(self.texts)
        if isinstance(found, Refused):
            raise Skipped("the texts cannot be scored")
        return found

    @functools.cached_property
    def unit(self) -> float:
        """Standard deviation of the scores, within a prompt where that is known; 1 where they are all alike."""
        within = within_prompt_sd(self.scores, self.prompt)
        spread = within if within > 0 else float(self.scores.std())
        return spread if spread > 0 else 1.0

    @functools.cached_property
    def changes(self) -> Determinism:
        return determinism(self.texts, self.scorer, unit=self.unit if self.scores.size else 1.0, seed=0, limit=64)

    def moved(self, texts: Inputs) -> float:
        """The median change of a score, in units; infinite where the altered texts are refused."""
        found = self.scorer.attempt(texts)
        return np.inf if isinstance(found, Refused) else float(np.median(np.abs(found - self.scores))) / self.unit


def finite(part: RewardPart) -> Iterator[Seen]:
    """Every text has a finite score."""
    found = part.scorer.attempt(part.texts)
    if isinstance(found, Refused):
        yield Seen("error", found.reason)


def repeated(part: RewardPart) -> Iterator[Seen]:
    """The same texts, asked again, have the same scores."""
    change = part.changes.changes["asked again"]
    if change > TOLERANCE:
        yield Seen("error", f"a score moves by {change:.2g} standard deviations")


def batch(part: RewardPart) -> Iterator[Seen]:
    """A score does not depend on the size, the order or the padding of its batch."""
    changes = {name: change for name, change in part.changes.changes.items() if name != "asked again"}
    worst = max(changes, key=lambda name: changes[name])
    if changes[worst] > max(TOLERANCE, 2 * part.changes.changes["asked again"]):
        yield Seen("error", f"{worst}: a score moves by {changes[worst]:.2g} standard deviations")


def prompt(part: RewardPart) -> Iterator[Seen]:
    """The score of a response depends on its prompt."""
    first = {number: row for row, number in reversed(list(enumerate(part.prompt)))}
    if len(first) < 2:
        raise Skipped("there is one prompt only")
    others = [part.texts.prompts[first[(number + 1) % len(first)]] for number in part.prompt]
    found = part.scorer.attempt(part.texts._replace(prompts=others))
    if not isinstance(found, Refused) and float(np.abs(found - part.scores).max()) <= 1e-6 * part.unit:
        yield Seen("warning", f"no score of {len(found)} changes with the prompts of other responses")


def end_of_text(part: RewardPart) -> Iterator[Seen]:
    """A space, a line break or a written ending token after a response does not change its score."""
    ends = {"a space": " ", "a line break": "\n"}
    eos = getattr(part.scorer.tokenizer, "eos_token", None)
    ends |= {f"the text {eos}": eos} if eos else {}
    for name, end in ends.items():
        change = part.moved(part.texts._replace(responses=[text + end for text in part.texts.responses]))
        if change > MOVED:
            level = "warning" if change > FAR and end != eos else "note"
            yield Seen(level, f"{name} at the end moves a score by {change:.2g} standard deviations (median)")


def length(part: RewardPart) -> Iterator[Seen]:
    """Scores do not simply count letters."""
    lengths = np.array([len(response) for response in part.texts.responses], dtype=np.float64)
    found = mean_ci95(within_prompt_spearman(part.scores, lengths, part.prompt))
    if not np.isfinite(found.ci95):
        raise Skipped("too few prompts have responses of different lengths")
    surely = abs(found.mean) - found.ci95
    if surely > 0 and abs(found.mean) > LINKED:
        level = "warning" if surely > BOUND else "note"
        yield Seen(level, f"rank correlation of score and length within a prompt: {found.mean:.2f} ± {found.ci95:.2f}")


def context(part: RewardPart) -> Iterator[Seen]:
    """Prompt and response fit the reward model's context."""
    model: Any = part.scorer.model
    before = getattr(model, "truncated_prompts", 0)
    with truncations() as cut:
        found = part.scorer.attempt(part.texts)
    if isinstance(found, Refused):
        raise Skipped("the texts cannot be scored")
    limit, total = getattr(model, "max_tokens", None), len(part.texts.responses)
    if cut:
        yield Seen("error", f"{len(cut)} of {total} responses are longer than {limit} tokens: their end is not read")
    elif getattr(model, "truncated_prompts", 0) > before:
        yield Seen("warning", f"some of {total} prompts lose their beginning to fit {limit} tokens with the response")


REWARD_CHECKS = {
    "finite": Check(
        finite,
        "One NaN reward spoils advantages and weights of the whole batch.",
        "Fix the reward model for this text; textenv refuses such scores in training too.",
    ),
    "asked again": Check(
        repeated,
        "Noise in a reward hides what is to be learned, and dropout left on in a reward model is easily missed "
        "(LlamaFactory 761).",
        "Call model.eval(); fix the seed of what is random in it.",
    ),
    "batch": Check(
        batch,
        "A reward that depends on other episodes is no function of the response (reward-bench 137).",
        "Pad by length with a mask and positions; score in float32; centre no batch.",
    ),
    "prompt": Check(
        prompt,
        "A score of the response alone is satisfied by one good answer to every question (partial-input baselines, "
        "Gururangan et al. 2018).",
        "For a rule about form this is meant; a trained model needs prompts in its data and its template.",
    ),
    "end of the text": Check(
        end_of_text,
        "Generation ends with or without such characters by accident; a score that is read at the last token may react "
        "to them (trl 1674, 3595).",
        "Strip responses before scoring, as in the reward model's training data.",
    ),
    "length": Check(
        length,
        "The policy finds the length before the content (Stiennon et al. 2020; Singhal et al. 2023).",
        "Compare with gold or people (`textenv rm-bench`); subtract a length rule in a weighted reward model.",
    ),
    "context": Check(
        context,
        "The score is that of another text: what lies beyond the context is free to be anything.",
        "Lower max_new_tokens or use a reward model with a longer context.",
    ),
}
