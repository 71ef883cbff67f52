"""Reading preferences: from files, data sets and memory, in any layout of the table, to rankings."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reward_models.preferences.layouts import OWN, Layout, layout_of, named_layout
from reward_models.preferences.ranking import Ranking, checked, prompt_key
from textenv.data.datasets import raw_records
from textenv.data.records import Placed, json_object, place_of, plain_values, structure

_log = logging.getLogger(__name__)


class MalformedRecord(ValueError):
    """A record breaks a rule; ``skip_malformed`` leaves such ones out."""


Records = Sequence[Mapping[str, Any] | Ranking] | str | Path


def load_rankings(
    source: Records, *, split: str | None = None, format: str | None = None, skip_malformed: bool = False
) -> list[Ranking]:
    """The rankings of :func:`read_rankings`; a warning says how many malformed records were left out."""
    rankings, malformed = read_rankings(source, split=split, format=format, skip_malformed=skip_malformed)
    if malformed:
        count = len(malformed)
        _log.warning("%d of %d preferences left out. The first: %s", count, count + len(rankings), malformed[0])
    return rankings


def read_rankings(
    source: Records,
    *,
    split: str | None = None,
    format: str | None = None,
    limit: int | None = None,
    skip_malformed: bool = False,
) -> tuple[list[Ranking], list[str]]:
    """Read and check preferences, the same for training and for the benchmark.

    Args:
        source: records in memory, a file (JSONL, a JSON array, CSV, Parquet), or the folder or hub id of a data set.
        split: which part of a data set.
        format: which layout (:data:`reward_models.preferences.LAYOUTS`), as ``name`` or ``name:option``; default: the
            one that the keys of a record show.
        limit: read at most so many good records.
        skip_malformed: leave malformed records out instead of failing.

    Returns:
        The rankings, and what is wrong with each record that was left out.

    Raises:
        ValueError: a record is malformed (names file and line, or the record's number from 1), or none is left.
    """
    if isinstance(source, Mapping | Ranking):
        raise ValueError(f"preferences must be a list of records, got one record: {source!r}. Put it in a list.")
    if format is not None:
        named_layout(format)
    if lines := isinstance(source, str | Path):
        records = raw_records(source, split=split)
    else:
        records = ((place_of(source, number), record) for number, record in enumerate(source))
    rankings: list[tuple[str, Ranking]] = []
    malformed = []
    rows: dict[tuple[str, str], tuple[str, Layout, str, list[Any]]] = {}  # of layouts with several rows a prompt

    def refuse(where: str, error: ValueError) -> None:
        if not skip_malformed:
            raise MalformedRecord(f"{where}: {error} Correct it, or leave it out.") from None
        malformed.append(f"{where}: {error}")

    for where, record in records:
        if len(rankings) == limit:
            break
        try:
            record = json_object(record) if lines and isinstance(record, str) else record
            if isinstance(record, Ranking):
                rankings.append((where, checked(record)))
                continue
            layout, option = _layout(record, format)
            if layout.grouped:
                key = layout.name, prompt_key(record["prompt"])
                rows.setdefault(key, (where, layout, option, []))[-1].append(record)
            else:
                rankings.append((where, _ranking(layout, option, record)))
        except ValueError as error:
            refuse(where, error)
    for where, layout, option, group in rows.values():
        if len(rankings) == limit:
            break
        try:
            rankings.append((where, _ranking(layout, option, group)))
        except ValueError as error:
            refuse(where, error)
    if not rankings:
        place = f" in {str(source)!r}" if lines else ""
        if malformed:
            found = f"{len(malformed)} malformed ones{place}. The first: {malformed[0]}"
            raise ValueError(f"preferences must hold a good record, got {found}")
        raise ValueError(f"preferences must hold a record, got none{place}. Give a list or a file of them.")
    return Placed([ranking for _, ranking in rankings], [where for where, _ in rankings]), malformed


def ranking_of(record: Any, format: str | None = None) -> Ranking:
    """One record as a ranking.

    Raises:
        ValueError: the rule that the record breaks.
    """
    if isinstance(record, Ranking):
        return checked(record)
    layout, option = _layout(record, format)
    return _ranking(layout, option, [record] if layout.grouped else record)


def _layout(record: Any, format: str | None) -> tuple[Layout, str]:
    if not isinstance(record, Mapping):
        raise ValueError(f"a preference must be a JSON object or a Ranking, got {record!r}. See read_rankings.")
    return layout_of(record, format)


def _ranking(layout: Layout, option: str, record: Any) -> Ranking:
    """A record, or the rows of a prompt, as its layout reads them."""
    whole = record[0] if layout.grouped else record
    columns = {
        key: value
        for key, value in whole.items()
        if key not in (*layout.keys, *layout.also) and not (value is None and key in OWN)
    }
    for name in ("prompts", "completions"):
        if name in columns:
            raise ValueError(f"a field must not have the name of a reward model's argument, got {name!r}. Rename it.")
    plain = plain_values(record)
    if not layout.grouped:
        plain = {
            key: structure(value) if key in layout.structures else value
            for key, value in plain.items()
            if value is not None
        }
    fields = layout.read(plain, option)
    order, ranks = _order(fields["responses"], fields["ranking"])

    def in_order(name: str) -> Any:
        values = fields.get(name, ())
        return tuple(values[i] for i in order) if isinstance(values, list) and len(values) == len(order) else values

    return checked(
        Ranking(
            fields.get("prompt"),
            in_order("responses"),
            ranks,
            margin=fields.get("margin", 0.0),
            category=str(fields.get("category", "")),
            gold=in_order("gold"),
            finish_reasons=in_order("finish_reasons"),
            columns={} if layout.grouped else columns,
        )
    )


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
