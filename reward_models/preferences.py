"""Human (or simulated) preferences: one record, a prompt with its responses from best to worst."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from textenv.data import read_jsonl_lines


class Ranking(NamedTuple):
    """A prompt and two or more responses, the best one first. A pair is a ranking of two."""

    prompt: Any
    """A string, or a chat (list of ``{"role", "content"}``)."""
    responses: tuple[str, ...]
    """From best to worst."""
    margin: float = 0.0
    """By how much each response should outscore the ones after it (log-odds); 0 without such a judgement."""
    ranks: tuple[int, ...] = ()
    """Rank of each response, 0 the best, equal where two are tied; empty: no ties."""

    @property
    def levels(self) -> tuple[int, ...]:
        """``ranks``, written out."""
        return self.ranks or tuple(range(len(self.responses)))

    @property
    def has_ties(self) -> bool:
        return len(set(self.levels)) < len(self.responses)


def load_rankings(source: Sequence[Mapping[str, Any] | Ranking] | str | Path) -> list[Ranking]:
    """Read records, in memory or from JSONL: ``{"prompt", "responses", "ranking"}`` or ``{"prompt", "chosen",
    "rejected"}``, both optionally with a ``margin``.

    ``ranking`` holds indices into ``responses``, best first; a list among them is a tie, ``[[0, 2], [1]]``. A pair is a
    tie with ``"tie": true``. Responses are strings or single assistant messages. An empty one is refused in a pair,
    where it is most often a lost field; a ranking of samples may hold one.

    Raises:
        ValueError: a record is malformed; names file and line, or the record's number from 1.
    """
    if isinstance(source, str | Path):
        return [_ranking(record, where) for where, record in read_jsonl_lines(source).items()]
    if not source:
        raise ValueError("preferences must hold at least one record, with records (=[]). Give a list or a JSONL file.")
    return [
        record if isinstance(record, Ranking) else _ranking(record, f"record {number}")
        for number, record in enumerate(source, start=1)
    ]


def split_by_prompt(rankings: Sequence[Ranking], fraction: float, seed: int = 0) -> tuple[list[Ranking], list[Ranking]]:
    """``(rest, held out)``: a ``fraction`` of the *prompts*, with all their rankings, is held out.

    Splitting rankings instead would put responses of one prompt on both sides and flatter the model.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction (={fraction}) must be between 0 and 1, exclusive. It is the share held out.")
    prompts = list(dict.fromkeys(prompt_key(ranking.prompt) for ranking in rankings))
    count = round(fraction * len(prompts))
    if not 0 < count < len(prompts):
        raise ValueError(
            f"fraction (={fraction}) of prompts (={len(prompts)}) must leave some on either side. Add prompts."
        )
    order = np.random.default_rng(seed).permutation(len(prompts))
    held_out = {prompts[i] for i in order[:count]}
    sides: tuple[list[Ranking], list[Ranking]] = ([], [])
    for ranking in rankings:
        sides[prompt_key(ranking.prompt) in held_out].append(ranking)
    return sides


def prompt_key(prompt: Any) -> str:
    """What identifies a prompt, string or chat."""
    return prompt if isinstance(prompt, str) else repr(prompt)


def _ranking(record: Mapping[str, Any], where: str) -> Ranking:
    prompt = record.get("prompt")
    if not isinstance(prompt, str | list) or not prompt:
        raise ValueError(f"{where}: 'prompt' must be a non-empty string or list of chat messages, with {prompt!r}.")
    ranks: tuple[int, ...] = ()
    if "chosen" in record and "rejected" in record:
        responses = tuple(_text(record[side], where) for side in ("chosen", "rejected"))
        if responses[0] == responses[1]:
            raise ValueError(f"{where}: 'chosen' and 'rejected' must differ, with both {responses[0]!r}.")
        for side, text in zip(("chosen", "rejected"), responses, strict=True):
            if not text.strip():
                raise ValueError(
                    f"{where}: {side!r} must have text, with {text!r}. Drop the record; an answer that ended at once "
                    "goes in 'responses' with a 'ranking'."
                )
        if not isinstance(record.get("tie", False), bool):
            raise ValueError(f"{where}: 'tie' must be true or false, with {record['tie']!r}.")
        ranks = (0, 0) if record.get("tie") else ()
    elif "responses" in record and "ranking" in record:
        responses, ranks = _in_order(record["responses"], record["ranking"], where)
    else:
        raise ValueError(
            f"{where}: a preference must have 'responses' and 'ranking', or 'chosen' and 'rejected', "
            f"with keys {sorted(record)}."
        )
    margin = record.get("margin")
    if margin is not None and (not isinstance(margin, int | float) or not np.isfinite(margin)):
        raise ValueError(f"{where}: 'margin' must be a finite number, with {margin!r}.")
    return Ranking(prompt, responses, float(margin or 0.0), ranks)


def _in_order(given: Any, ranking: Any, where: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """``(responses from best to worst, their ranks if some are tied)``."""
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError(f"{where}: 'responses' must be a list of two or more, with {given!r}.")
    groups = [group if isinstance(group, list) else [group] for group in ranking] if isinstance(ranking, list) else []
    order = [index for group in groups for index in group]
    if sorted(map(repr, order)) != sorted(map(repr, range(len(given)))) or not all(groups):
        raise ValueError(
            f"{where}: 'ranking' must be a permutation of 0…{len(given) - 1}, best first, ties as lists in it, with "
            f"{ranking!r}."
        )
    ranks = tuple(rank for rank, group in enumerate(groups) for _ in group)
    return tuple(_text(given[index], where) for index in order), ranks if len(groups) < len(order) else ()


def _text(response: Any, where: str) -> str:
    if isinstance(response, list) and len(response) == 1 and isinstance(response[0], Mapping):
        response = response[0].get("content")
    if not isinstance(response, str):
        raise ValueError(f"{where}: a response must be a string or one assistant message, with {response!r}.")
    return response
