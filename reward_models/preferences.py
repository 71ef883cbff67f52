"""Preferences of people or simulated annotators: one record, :class:`Ranking`, and the reader of all their layouts."""

import itertools
import logging
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from textenv.data.datasets import raw_records
from textenv.data.records import check_text, json_object

ASSISTANT, HUMAN = "\n\nAssistant:", "\n\nHuman:"
FIELDS = ("prompt", "responses", "ranking", "chosen", "rejected", "tie", "margin", "category", "gold", "finish_reasons")
"""What a record may hold; None means absent. Any other field goes into ``Ranking.columns``."""

_log = logging.getLogger(__name__)


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


def load_rankings(
    source: Sequence[Mapping[str, Any] | Ranking] | str | Path,
    *,
    split: str | None = None,
    skip_malformed: bool = False,
) -> list[Ranking]:
    """The rankings of :func:`read_rankings`; a warning says how many malformed records were left out."""
    rankings, malformed = read_rankings(source, split=split, skip_malformed=skip_malformed)
    if malformed:
        count = len(malformed)
        _log.warning("%d of %d preferences left out. The first: %s", count, count + len(rankings), malformed[0])
    return rankings


def read_rankings(
    source: Sequence[Mapping[str, Any] | Ranking] | str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    skip_malformed: bool = False,
) -> tuple[list[Ranking], list[str]]:
    """Read and check preferences, the same for training and for the benchmark.

    A record has one of three layouts (:func:`common_layout`):

    * ``{"prompt", "responses", "ranking"}``: ``ranking`` holds indices into ``responses``, best first; a list among
      them is a tie, ``[[0, 2], 1]``;
    * ``{"prompt", "chosen", "rejected"}``;
    * ``{"chosen", "rejected"}``: two whole dialogues, as text (:func:`split_dialogue`) or as lists of messages.

    ``"tie": true`` makes a pair a tie. Optional fields are ``margin``, ``category``, ``gold`` and ``finish_reasons``
    (one value per response each). Responses are strings or single assistant messages. An empty one is refused in a
    pair, where it is most often a lost field; a ranking of samples may hold one.

    Args:
        source: records in memory, a JSONL file (``.gz`` too), or the folder or hub id of a data set.
        split: which part of a data set.
        limit: read at most so many good records.
        skip_malformed: leave malformed records out instead of failing.

    Returns:
        The rankings, and what is wrong with each record that was left out.

    Raises:
        ValueError: a record is malformed (names file and line, or the record's number from 1), or none is left.
    """
    if isinstance(source, Mapping | Ranking):
        raise ValueError(f"preferences must be a list of records, got one record: {source!r}. Put it in a list.")
    if lines := isinstance(source, str | Path):
        records = raw_records(source, split=split)
    else:
        records = ((f"record {number}", record) for number, record in enumerate(source, start=1))
    rankings, malformed = [], []
    for where, record in records:
        if len(rankings) == limit:
            break
        try:
            rankings.append(ranking_of(json_object(record) if lines and isinstance(record, str) else record))
        except ValueError as error:
            if not skip_malformed:
                raise ValueError(f"{where}: {error}") from None
            malformed.append(f"{where}: {error}")
    if not rankings:
        raise ValueError(
            f"preferences must hold at least one good record, got {len(malformed)} malformed ones. Give a list or a "
            "JSONL file."
        )
    return rankings, malformed


def ranking_of(record: Any) -> Ranking:
    """One record as a ranking.

    Raises:
        ValueError: the rule that the record breaks.
    """
    if isinstance(record, Ranking):
        return _checked(record)
    if not isinstance(record, Mapping):
        raise ValueError(f"a preference must be a JSON object or a Ranking, got {record!r}. See read_rankings.")
    for name in ("prompts", "completions"):
        if name in record:
            raise ValueError(f"a field must not have the name of a reward model's argument, got {name!r}. Rename it.")
    fields = common_layout({key: record[key] for key in FIELDS if record.get(key) is not None})
    order, ranks = _order(fields["responses"], fields["ranking"])

    def in_order(name: str) -> Any:
        values = fields.get(name, ())
        return tuple(values[i] for i in order) if isinstance(values, list) and len(values) == len(order) else values

    return _checked(
        Ranking(
            fields.get("prompt"),
            tuple(map(_text, in_order("responses"))),
            ranks,
            margin=fields.get("margin", 0.0),
            category=str(fields.get("category", "")),
            gold=in_order("gold"),
            finish_reasons=in_order("finish_reasons"),
            columns={key: value for key, value in record.items() if key not in FIELDS},
        )
    )


def common_layout(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record of any layout as ``{"prompt", "responses", "ranking"}`` and its optional fields.

    A ``prompt`` beside two lists of messages only repeats what they hold, and gives way to them. The last turns of
    dialogues may be empty, the texts of a pair may not.
    """
    tie, chosen, rejected = record.get("tie", False), record.get("chosen"), record.get("rejected")
    if not isinstance(tie, bool):
        raise ValueError(f"'tie' must be true or false, got {tie!r}.")
    if "responses" in record and "ranking" in record:
        if tie:
            raise ValueError("'tie' belongs to a pair, got it in a ranking. Put equals into a list: [[0, 2], 1].")
        return record
    if chosen is None or rejected is None:
        raise ValueError(
            f"a preference must have 'responses' and 'ranking', or 'chosen' and 'rejected', got {sorted(record)}."
        )
    if all(isinstance(side, list) and len(side) > 1 for side in (chosen, rejected)):
        prompt, *responses = split_messages(chosen, rejected)
    elif "prompt" not in record and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, *responses = split_dialogue(chosen, rejected)
    else:
        prompt, responses = record.get("prompt"), [_text(chosen), _text(rejected)]
        for side, text in zip(("chosen", "rejected"), responses, strict=True):
            if not text.strip():
                raise ValueError(
                    f"{side!r} must have text, got {text!r}. Drop the record, or put a response that ended at once "
                    "into 'responses' with a 'ranking'."
                )
    return {**record, "prompt": prompt, "responses": responses, "ranking": [[0, 1]] if tie else [0, 1]}


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


def split_messages(chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], str, str]:
    """``(prompt messages, chosen reply, rejected reply)`` of two chats that share all but their last messages.

    Raises:
        ValueError: a last message is not the assistant's, or the chats differ before it, or not at all.
    """
    for name, chat in (("chosen", chosen), ("rejected", rejected)):
        last = chat[-1]
        if not (isinstance(last, Mapping) and last.get("role") == "assistant" and isinstance(last.get("content"), str)):
            raise ValueError(f"a chat must end with an assistant's message, got {name!r} ending with {last!r}.")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("two chats must be the same up to the last message, got others.")
    if chosen[-1]["content"] == rejected[-1]["content"]:
        raise ValueError(f"two chats must differ in the last message, got {chosen[-1]['content'][:60]!r} twice.")
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
            raise ValueError(
                f"without a 'prompt', a dialogue must end with an assistant turn ({ASSISTANT!r}), got {name!r} ending "
                f"with {text[-60:]!r}. Add the prompt, or the whole dialogue."
            )
        parts.append((before + found, reply))
    (prompt, reply), (other, other_reply) = parts
    if prompt != other:
        place = next(
            (i for i, pair in enumerate(zip(prompt, other)) if pair[0] != pair[1]), min(len(prompt), len(other))
        )
        raise ValueError(
            "two dialogues must be the same up to the last assistant turn, got "
            f"{prompt[place : place + 40]!r} and {other[place : place + 40]!r} from character {place} on."
        )
    if reply == other_reply:
        raise ValueError(f"two dialogues must differ in the last turn, got {reply[:60]!r} twice.")
    return prompt, reply, other_reply


def prompt_key(prompt: Any) -> str:
    """What identifies a prompt, string or chat."""
    return prompt if isinstance(prompt, str) else repr(prompt)


def _checked(ranking: Ranking) -> Ranking:
    """What holds of every ranking, read or made by the caller."""
    _check_prompt(ranking.prompt)
    responses = ranking.responses
    if not isinstance(responses, tuple | list) or len(responses) < 2:
        raise ValueError(f"'responses' must hold two or more, got {responses!r}.")
    for response in responses:
        check_text(_text(response))
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


def _order(responses: Any, ranking: Any) -> tuple[list[int], tuple[int, ...]]:
    """Indices of the responses from best to worst, and their ranks if some are tied."""
    if not isinstance(responses, list) or len(responses) < 2:
        raise ValueError(f"'responses' must be a list of two or more, got {responses!r}.")
    groups = [group if isinstance(group, list) else [group] for group in ranking] if isinstance(ranking, list) else []
    order = [index for group in groups for index in group]
    if sorted(map(repr, order)) != sorted(map(repr, range(len(responses)))) or not all(groups):
        raise ValueError(
            f"'ranking' must be a permutation of 0…{len(responses) - 1}, best first, ties as lists in it, "
            f"got {ranking!r}."
        )
    ranks = tuple(rank for rank, group in enumerate(groups) for _ in group)
    return order, ranks if len(groups) < len(order) else ()


def _text(response: Any) -> str:
    if isinstance(response, list) and len(response) == 1 and isinstance(response[0], Mapping):
        response = response[0].get("content")
    if not isinstance(response, str):
        raise ValueError(f"a response must be a string or one assistant message, got {response!r}.")
    return response
