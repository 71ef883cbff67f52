"""Rule-based rewards: a pattern, a length, an exact answer, a sentiment lexicon. Each can be written as JSON:

    {"rule": "regex", "pattern": "[.!?]$", "score": 0.5}

A rule looks at the response alone. Its fields are the keys of its JSON form (:mod:`reward_models.scorers.spec`).
"""

import functools
import importlib.metadata
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from textenv import registry
from textenv.settings import Count, check_settings

LengthUnit = Literal["words", "characters", "tokens"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Scores one response at a time; a subclass says how in ``_score``."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_settings(self, f" of rule {self.name!r}")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        return [self._score(completion) for completion in completions]

    def _score(self, completion: str) -> float:
        raise NotImplementedError

    @property
    def identity(self) -> str:
        """The rule and its fields (:func:`reward_models.identity.identity_of`)."""
        return json.dumps({"rule": self.name, **asdict(self)}, sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Regex(Rule):
    """``score`` where a pattern is found, ``otherwise`` where it is not."""

    name: ClassVar[str] = "regex"
    pattern: str
    """Python's syntax; ``.`` also matches a line break."""
    score: float = 1.0
    otherwise: float = 0.0
    ignore_case: bool = False
    whole: bool = False
    """The pattern must match the whole response, not a part of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _compiled(self.pattern, self.ignore_case)

    def _score(self, completion: str) -> float:
        pattern = _compiled(self.pattern, self.ignore_case)
        found = pattern.fullmatch(completion) if self.whole else pattern.search(completion)
        return self.score if found else self.otherwise


@dataclass(frozen=True, kw_only=True)
class RegexCount(Rule):
    """``score`` for each match of a pattern that does not overlap the one before."""

    name: ClassVar[str] = "regex_count"
    pattern: str
    score: float = 1.0
    maximum: Count | None = None
    """Most matches that count; None counts all."""
    ignore_case: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _compiled(self.pattern, self.ignore_case)

    def _score(self, completion: str) -> float:
        count = sum(1 for _ in _compiled(self.pattern, self.ignore_case).finditer(completion))
        return self.score * (count if self.maximum is None else min(count, self.maximum))


@dataclass(frozen=True, kw_only=True)
class Length(Rule):
    """``score`` times the length of the response."""

    name: ClassVar[str] = "length"
    unit: LengthUnit = "words"
    """"words" (between white space), "characters", or "tokens" of ``language_model``."""
    score: float = 1.0
    """For each unit; below 0 it pays for being short."""
    language_model: str | None = None
    """With ``unit="tokens"``, the model whose tokens are counted: a registered name, a folder or a hub id."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.unit == "tokens") != (self.language_model is not None):
            raise ValueError(
                f"rule {self.name!r} needs a language_model to count tokens, and only then, got language_model "
                f"{self.language_model!r} with unit {self.unit!r}. Change one of them."
            )

    def length(self, completion: str) -> int:
        if self.unit == "characters":
            return len(completion)
        if self.language_model is None:
            return len(completion.split())
        return len(registry.language_model(self.language_model).encode_response(completion, eos=False))

    def _score(self, completion: str) -> float:
        return self.score * self.length(completion)


@dataclass(frozen=True, kw_only=True)
class LengthRange(Length):
    """``score`` for a length in ``[minimum, maximum]``, less ``slope`` for each unit outside."""

    name: ClassVar[str] = "length_range"
    minimum: Count = 0
    maximum: Count | None = None
    """None sets no upper limit."""
    slope: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.maximum is not None and self.maximum < self.minimum:
            rule = f"minimum of rule {self.name!r} must be maximum ({self.maximum}) or less"
            raise ValueError(f"{rule}, got {self.minimum}. Lower it.")

    def _score(self, completion: str) -> float:
        length = self.length(completion)
        over = 0 if self.maximum is None else max(length - self.maximum, 0)
        return self.score - self.slope * (over + max(self.minimum - length, 0))


@dataclass(frozen=True, kw_only=True)
class ExactMatch(Rule):
    """``score`` where the response is the prompt's answer, else ``otherwise``; surrounding whitespace is ignored."""

    name: ClassVar[str] = "exact_match"
    column: str
    """The field of the prompt's record that holds the answer."""
    score: float = 1.0
    otherwise: float = 0.0
    extract: str | None = None
    """A pattern; its last match in the response (the first group, if it has one) must equal the answer."""
    ignore_case: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extract is not None:
            _compiled(self.extract, self.ignore_case)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        answers = columns.get(self.column)
        if answers is None or any(answer is None for answer in answers):
            prompt = None if answers is None else prompts[[answer is None for answer in answers].index(True)]
            where = f"columns {sorted(columns)}" if prompt is None else f"none for prompt {prompt!r}"
            rule = f"rule 'exact_match' needs column {self.column!r} for every prompt"
            raise ValueError(f"{rule}, got {where}. Add that field to every prompt record.")
        right = [self._equal(completion, str(answer)) for completion, answer in zip(completions, answers, strict=True)]
        return [self.score if equal else self.otherwise for equal in right]

    def _equal(self, completion: str, answer: str) -> bool:
        if self.extract is not None:
            found = list(_compiled(self.extract, self.ignore_case).finditer(completion))
            if not found:
                return False
            completion = found[-1][1 if found[-1].re.groups else 0] or ""
        completion, answer = completion.strip(), answer.strip()
        return completion.casefold() == answer.casefold() if self.ignore_case else completion == answer


@dataclass(frozen=True, kw_only=True)
class Sentiment(Rule):
    """``score`` times VADER's compound sentiment in [−1, 1] (Hutto and Gilbert 2014): English, by lexicon."""

    name: ClassVar[str] = "sentiment"
    score: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _vader()

    @property
    def identity(self) -> str:
        return f"{super().identity} vaderSentiment {importlib.metadata.version('vaderSentiment')}"

    def _score(self, completion: str) -> float:
        return self.score * _vader()(completion)["compound"]


RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (Regex, RegexCount, Length, LengthRange, ExactMatch, Sentiment)
}
"""Rules by their name under ``"rule"`` in JSON."""


def _compiled(pattern: str, ignore_case: bool) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL | (re.IGNORECASE if ignore_case else re.NOFLAG))
    except re.error as error:
        raise ValueError(f"a pattern must be a regular expression, got {pattern!r}: {error}. Correct it.") from None


@functools.cache
def _vader() -> Callable[[str], dict[str, float]]:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ValueError(
            "rule 'sentiment' needs vaderSentiment. Install it: pip install 'textenv[sentiment]'."
        ) from error
    return SentimentIntensityAnalyzer().polarity_scores
