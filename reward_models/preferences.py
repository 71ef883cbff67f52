"""Human (or simulated) preferences: one record, a prompt with its responses from best to worst."""

import itertools
import logging
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from textenv.data.records import check_text, json_object, raw_records

ASSISTANT, HUMAN = "\n\nAssistant:", "\n\nHuman:"

_log = logging.getLogger(__name__)


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


def load_rankings(
    source: Sequence[Mapping[str, Any] | Ranking] | str | Path,
    *,
    split: str | None = None,
    skip_malformed: bool = False,
) -> list[Ranking]:
    """Read records, in memory, from JSONL (``.gz`` too), or from a data set (folder or hub id, of which ``split``):
    ``{"prompt", "responses", "ranking"}`` or ``{"prompt", "chosen", "rejected"}``, both optionally with a ``margin``,
    or whole dialogues ``{"chosen", "rejected"}``, as text (:func:`split_dialogue`) or as lists of messages.

    ``ranking`` holds indices into ``responses``, best first; a list among them is a tie, ``[[0, 2], [1]]``. A pair is a
    tie with ``"tie": true``. Responses are strings or single assistant messages. An empty one is refused in a pair,
    where it is most often a lost field; a ranking of samples may hold one. ``skip_malformed`` leaves malformed records
    out, and says how many.

    Raises:
        ValueError: a record is malformed (names file and line, or the record's number from 1), or none is left.
    """
    if isinstance(source, Mapping | Ranking):
        raise ValueError(f"preferences must be a list of records, with one record (={source!r}). Put it in a list.")
    if lines := isinstance(source, str | Path):
        records = raw_records(source, split=split)
    else:
        records = ((f"record {number}", record) for number, record in enumerate(source, start=1))
    rankings, skipped = [], []
    for where, record in records:
        try:
            if lines and isinstance(record, str):
                record = json_object(record)
            rankings.append(_checked(record if isinstance(record, Ranking) else _ranking(record)))
        except ValueError as error:
            if not skip_malformed:
                raise ValueError(f"{where}: {error}") from None
            skipped.append(f"{where}: {error}")
    if skipped:
        _log.warning(
            "%d of %d preferences left out. The first: %s", len(skipped), len(skipped) + len(rankings), skipped[0]
        )
    if not rankings:
        raise ValueError(
            f"preferences must hold at least one good record, with malformed (={len(skipped)}). Give a list or a JSONL "
            "file."
        )
    return rankings


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


def better_pairs(
    responses: Sequence[str], ranks: Sequence[int], wanted: Callable[[int, int], bool] = operator.lt
) -> Iterator[tuple[int, int]]:
    """Places ``(a, b)`` of two responses, a before b, whose ranks are as ``wanted``; by default a is better than b.

    Equal texts are no pair: samples coincide, and nothing that reads them could tell which was ranked higher.
    """
    for a, b in itertools.combinations(range(len(ranks)), 2):
        if wanted(ranks[a], ranks[b]) and responses[a] != responses[b]:
            yield a, b


def present(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what is None: in a table, every record has every column."""
    return {key: value for key, value in record.items() if value is not None}


def is_finite(value: Any) -> bool:
    """A number that is neither NaN nor infinite."""
    return isinstance(value, int | float | np.floating | np.integer) and bool(abs(value) <= sys.float_info.max)


def without_dialogues(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A pair of whole dialogues as a ranking of the two last turns (one of which may be empty); any other record as it
    is. A ``prompt`` beside lists of messages only repeats what they hold, and gives way to them."""
    chosen, rejected = record.get("chosen"), record.get("rejected")
    messages = all(isinstance(side, list) and len(side) > 1 for side in (chosen, rejected))
    texts = "prompt" not in record and isinstance(chosen, str) and isinstance(rejected, str)
    if not (messages or texts):
        return record
    try:
        prompt, *replies = (split_messages if messages else split_dialogue)(chosen, rejected)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"without a 'prompt', 'chosen' and 'rejected' are whole dialogues: {error}") from None
    rest = {key: value for key, value in record.items() if key not in ("chosen", "rejected", "tie")}
    return {**rest, "prompt": prompt, "responses": replies, "ranking": [[0, 1]] if record.get("tie") else [0, 1]}


def split_messages(chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], str, str]:
    """``(prompt messages, chosen reply, rejected reply)`` of two chats that share all but their last messages.

    Raises:
        ValueError: a last message is not the assistant's, or the chats differ before it, or not at all.
    """
    for name, chat in (("chosen", chosen), ("rejected", rejected)):
        last = chat[-1]
        if not (isinstance(last, Mapping) and last.get("role") == "assistant" and isinstance(last.get("content"), str)):
            raise ValueError(f"a chat must end with an assistant's message, with {name} ending so: {last!r}.")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("the two chats must be the same up to the last message.")
    if chosen[-1]["content"] == rejected[-1]["content"]:
        raise ValueError(f"the two chats must differ in the last message, with both {chosen[-1]['content'][:60]!r}.")
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def split_dialogue(chosen: str, rejected: str) -> tuple[str, str, str]:
    """``(prompt, chosen reply, rejected reply)`` of two dialogues that share all but the last assistant turn.

    The prompt ends with ``Assistant:`` and a reply starts with what follows, its space included, so that prompt + reply
    is the dialogue again.

    Raises:
        ValueError: a dialogue does not end with an assistant turn, or the two differ before it, or not at all.
    """
    parts = []
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        before, found, reply = text.rpartition(ASSISTANT)
        if not found or HUMAN in reply:
            raise ValueError(f"a dialogue must end with an assistant turn ({ASSISTANT!r}), with {name} ending so: "
                             f"{text[-60:]!r}.")  # fmt: skip
        parts.append((before + found, reply))
    (prompt, reply), (other, other_reply) = parts
    if prompt != other:
        place = next(
            (i for i, pair in enumerate(zip(prompt, other)) if pair[0] != pair[1]), min(len(prompt), len(other))
        )
        raise ValueError(
            f"the two dialogues must be the same up to the last assistant turn; they differ from character {place} on, "
            f"with chosen (={prompt[place : place + 40]!r}), rejected (={other[place : place + 40]!r})."
        )
    if reply == other_reply:
        raise ValueError(f"the two dialogues must differ in the last turn, with both {reply[:60]!r}.")
    return prompt, reply, other_reply


def prompt_key(prompt: Any) -> str:
    """What identifies a prompt, string or chat."""
    return prompt if isinstance(prompt, str) else repr(prompt)


def _ranking(record: Any) -> Ranking:
    if not isinstance(record, Mapping):
        raise ValueError(f"a preference must be a JSON object or a Ranking, with {record!r}. See load_rankings.")
    record = without_dialogues(present(record))
    prompt = record.get("prompt")
    _check_prompt(prompt)
    ranks: tuple[int, ...] = ()
    if "chosen" in record and "rejected" in record:
        responses = tuple(_text(record[side]) for side in ("chosen", "rejected"))
        if responses[0] == responses[1]:
            raise ValueError(f"'chosen' and 'rejected' must differ, with both {responses[0]!r}.")
        for side, text in zip(("chosen", "rejected"), responses, strict=True):
            if not text.strip():
                raise ValueError(
                    f"{side!r} must have text, with {text!r}. Drop the record; an answer that ended at once "
                    "goes in 'responses' with a 'ranking'."
                )
        if not isinstance(record.get("tie", False), bool):
            raise ValueError(f"'tie' must be true or false, with {record['tie']!r}.")
        ranks = (0, 0) if record.get("tie") else ()
    elif "responses" in record and "ranking" in record:
        responses, ranks = _in_order(record["responses"], record["ranking"])
    else:
        raise ValueError(
            f"a preference must have 'responses' and 'ranking', or 'chosen' and 'rejected', with keys {sorted(record)}."
        )
    margin = record.get("margin", 0.0)
    return Ranking(prompt, responses, float(margin) if is_finite(margin) else margin, ranks)


def _checked(ranking: Ranking) -> Ranking:
    """What holds of every ranking, read or made by the caller."""
    _check_prompt(ranking.prompt)
    responses, ranks = ranking.responses, list(ranking.ranks)
    if not isinstance(responses, tuple | list) or len(responses) < 2:
        raise ValueError(f"'responses' must hold two or more, with {responses!r}.")
    for response in responses:
        _text(response)
    if len(set(responses)) < 2:
        raise ValueError(f"'responses' must hold two that differ, with all {responses[0][:60]!r}. Drop the record.")
    if ranks and (len(ranks) != len(responses) or ranks != sorted(ranks)):
        raise ValueError(
            f"'ranks' must hold one rank a response, from best to worst, with responses (={len(responses)}): {ranks}."
        )
    if not is_finite(ranking.margin):
        raise ValueError(f"'margin' must be a finite number, with {ranking.margin!r}.")
    return ranking


def _check_prompt(prompt: Any) -> None:
    if not isinstance(prompt, str | list) or not prompt:
        raise ValueError(f"'prompt' must be a non-empty string or list of chat messages, with {prompt!r}.")
    for message in [] if isinstance(prompt, str) else prompt:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"a chat message must have the strings 'role' and 'content', with {message!r}.")
    for text in [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]:
        check_text(text)


def _in_order(given: Any, ranking: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """``(responses from best to worst, their ranks if some are tied)``."""
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError(f"'responses' must be a list of two or more, with {given!r}.")
    groups = [group if isinstance(group, list) else [group] for group in ranking] if isinstance(ranking, list) else []
    order = [index for group in groups for index in group]
    if sorted(map(repr, order)) != sorted(map(repr, range(len(given)))) or not all(groups):
        raise ValueError(
            f"'ranking' must be a permutation of 0…{len(given) - 1}, best first, ties as lists in it, with {ranking!r}."
        )
    ranks = tuple(rank for rank, group in enumerate(groups) for _ in group)
    return tuple(_text(given[index]) for index in order), ranks if len(groups) < len(order) else ()


def _text(response: Any) -> str:
    if isinstance(response, list) and len(response) == 1 and isinstance(response[0], Mapping):
        response = response[0].get("content")
    if not isinstance(response, str):
        raise ValueError(f"a response must be a string or one assistant message, with {response!r}.")
    check_text(response)
    return response
