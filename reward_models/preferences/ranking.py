"""The one record of preferences, what holds of it, and its pairs."""

import itertools
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from textenv.data.records import check_text


class Ranking(NamedTuple):
    """A prompt with two or more responses, the best one first. A pair is a ranking of two."""

    prompt: Any
    """A string, or a chat (list of ``{"role", "content"}``)."""
    responses: tuple[str, ...]
    """From best to worst."""
    ranks: tuple[int, ...] = ()
    """Rank of each response, 0 for the best, equal where two are tied; empty: no ties."""
    margin: float = 0.0
    """How strong the preference is; 0 where nobody said. Training reads it as the log-odds by which each response
    should outscore the ones after it."""
    category: str = ""
    """The benchmark also reports the accuracy in each category."""
    gold: tuple[float, ...] = ()
    """True score of each response; empty where it is not known."""
    finish_reasons: tuple[str, ...] = ()
    """How each response ended; empty where it is not known."""
    columns: Mapping[str, Any] = {}
    """Other fields of the record, for reward models that name them."""
    cluster: str = ""
    """Rankings of one cluster are not independent of one another; empty: those of one prompt are a cluster."""

    @property
    def levels(self) -> tuple[int, ...]:
        """``ranks``, written out."""
        return self.ranks or tuple(range(len(self.responses)))

    @property
    def has_ties(self) -> bool:
        return len(set(self.levels)) < len(self.responses)

    @property
    def group(self) -> str:
        """The name of its cluster."""
        return self.cluster or prompt_key(self.prompt)


def split_by_prompt(rankings: Sequence[Ranking], fraction: float, seed: int = 0) -> tuple[list[Ranking], list[Ranking]]:
    """``(rest, held out)``: a ``fraction`` of the *prompts*, with all their rankings, is held out.

    Splitting rankings instead would put responses of one prompt on both sides and flatter the model.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, exclusive, got {fraction}. It is the share held out.")
    prompts = list(dict.fromkeys(prompt_key(ranking.prompt) for ranking in rankings))
    count = round(fraction * len(prompts))
    if not 0 < count < len(prompts):
        raise ValueError(f"fraction must leave prompts on both sides, got {fraction} of {len(prompts)}. Add prompts.")
    order = np.random.default_rng(seed).permutation(len(prompts))
    held_out = {prompts[i] for i in order[:count]}
    sides: tuple[list[Ranking], list[Ranking]] = ([], [])
    for ranking in rankings:
        sides[prompt_key(ranking.prompt) in held_out].append(ranking)
    return sides


def better_pairs(
    responses: Sequence[str], ranks: Sequence[int], wanted: Callable[[int, int], bool] = operator.lt
) -> Iterator[tuple[int, int]]:
    """Places ``(a, b)`` of two responses, a before b, whose ranks are as ``wanted``; by default a is better than b.

    Equal texts are no pair: samples coincide, and nothing that reads them could tell which was ranked higher.
    """
    for a, b in itertools.combinations(range(len(ranks)), 2):
        if wanted(ranks[a], ranks[b]) and responses[a] != responses[b]:
            yield a, b


def prompt_key(prompt: Any) -> str:
    """What identifies a prompt, string or chat."""
    return prompt if isinstance(prompt, str) else repr(prompt)


def checked(ranking: Ranking) -> Ranking:
    """What holds of every ranking, read or made by the caller."""
    _check_prompt(ranking.prompt)
    responses = ranking.responses
    if not isinstance(responses, tuple | list) or len(responses) < 2:
        raise ValueError(f"'responses' must hold two or more, got {responses!r}.")
    for response in responses:
        if not isinstance(response, str):
            raise ValueError(f"a response must be a string or one assistant message, got {response!r}.")
        check_text(response)
    if len(set(responses)) < 2:
        raise ValueError(f"'responses' must hold two that differ, got only {responses[0][:60]!r}. Drop the record.")
    for name in ("ranks", "gold", "finish_reasons"):
        values = getattr(ranking, name)
        if not isinstance(values, tuple | list) or len(values) not in (0, len(responses)):
            raise ValueError(f"{name!r} must hold one value per response, got {values!r} for {len(responses)}.")
    if list(ranking.ranks) != sorted(ranking.ranks):
        raise ValueError(f"'ranks' must go from best to worst, got {ranking.ranks}. Sort the responses.")
    for name, values in (("margin", (ranking.margin,)), ("gold", ranking.gold)):
        if not all(map(_is_finite, values)):
            raise ValueError(f"{name!r} must be finite, got {getattr(ranking, name)!r}.")
    return ranking


def _check_prompt(prompt: Any) -> None:
    if not isinstance(prompt, str | list) or not prompt:
        raise ValueError(f"'prompt' must be a non-empty string or list of chat messages, got {prompt!r}.")
    for message in [] if isinstance(prompt, str) else prompt:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"a chat message must have the strings 'role' and 'content', got {message!r}.")
    for text in [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]:
        check_text(text)


def _is_finite(value: Any) -> bool:
    """A number that is neither NaN nor infinite."""
    return isinstance(value, int | float | np.floating | np.integer) and bool(abs(value) <= sys.float_info.max)
