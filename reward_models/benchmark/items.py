"""Preference data as the benchmark reads it: prompts, responses, and who was ranked above whom.

A record is ``{"prompt", "responses", "ranking"}`` or ``{"prompt", "chosen", "rejected"}``
(:mod:`reward_models.preferences`), or a pair of whole dialogues ``{"chosen", "rejected"}``, which
:func:`reward_models.preferences.split_dialogue` cuts. Beyond those, a record may have

* ties: ``"tie": true`` in a pair, or a list inside ``ranking``: ``[[0, 2], 1]`` says that 0 and 2 are equally good;
* ``category``, by which accuracy is split; ``margin``, how strong the preference is;
* ``gold``, the true score of each response; ``finish_reasons``, how each of them ended;
* any other field, which reaches a reward model that names it as a keyword.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reward_models.preferences import is_finite, load_rankings, present, prompt_key, without_dialogues
from textenv.data.records import json_object, looks_like_path, raw_records

_KNOWN = {"prompt", "responses", "ranking", "chosen", "rejected", "tie", "category", "margin", "gold", "finish_reasons"}
_ARGUMENTS = ("prompts", "completions")
_FILES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet", ".txt")
"""Endings that a hub id has not."""


class Item(NamedTuple):
    """A prompt with two or more responses, ranked once."""

    prompt: Any
    """A string, or a chat (list of ``{"role", "content"}``)."""
    responses: tuple[str, ...]
    """From best to worst."""
    ranks: tuple[int, ...]
    """0 for the best; equal for a tie."""
    category: str = ""
    margin: float = 0.0
    """How strong the preference is, in any unit; 0 where nobody said."""
    gold: tuple[float, ...] | None = None
    """True scores; None where they are not known."""
    finish_reasons: tuple[str, ...] | None = None
    columns: Mapping[str, Any] = {}
    """Further fields of the record, for reward models that name them."""
    cluster: str = ""
    """Items of one cluster are not independent of one another; the prompt, unless given."""

    @property
    def group(self) -> str:
        """What the item is resampled with."""
        return self.cluster or prompt_key(self.prompt)


def load_items(
    source: Sequence[Mapping[str, Any]] | str | Path, *, limit: int | None = None, skip_malformed: bool = False
) -> tuple[list[Item], int]:
    """Items, and how many malformed records were left out.

    Args:
        source: records, a JSONL file (``.gz`` too), or the folder or hub id of a data set.
        limit: read at most so many good records.
        skip_malformed: leave malformed records out instead of failing.

    Raises:
        ValueError: a record is malformed (names the file and the line), or none is left.
    """
    if isinstance(source, str | Path):
        records = _records(source)
    else:
        records = ((f"record {number}", record) for number, record in enumerate(source, start=1))
    items, skipped = [], 0
    for where, record in records:
        if limit is not None and len(items) == limit:
            break
        try:
            items.append(item_of(record))
        except ValueError as error:
            if not skip_malformed:
                raise ValueError(
                    f"{where}: {error} Mend the record, or leave such records out with skip_malformed."
                ) from None
            skipped += 1
    if not items:
        raise ValueError(f"a benchmark needs at least one good record, with source (={_named(source)}), bad {skipped}.")
    return items, skipped


def item_of(record: Any) -> Item:
    """One record as an item; ValueError with the rule that it breaks."""
    if isinstance(record, str):
        record = json_object(record)
    if not isinstance(record, Mapping):
        raise ValueError(f"must be a JSON object, not {type(record).__name__}.")
    columns = {key: value for key, value in record.items() if key not in _KNOWN}
    for name in _ARGUMENTS:
        if name in columns:
            raise ValueError(f"a field must not be called {name!r}, as an argument of reward models is. Rename it.")
    record = without_dialogues(present(record))
    order, ranks = _order(record)
    ranked = record if "ranking" not in record else {**record, "ranking": order}
    try:
        ranking = load_rankings([ranked])[0]
    except ValueError as error:
        raise ValueError(str(error).removeprefix("record 1: ")) from None
    gold = _per_response(record, "gold", order)
    if gold is not None and not all(map(is_finite, gold)):
        raise ValueError(f"'gold' must hold finite numbers, with {record['gold']!r}.")
    reasons = _per_response(record, "finish_reasons", order)
    return Item(
        prompt=ranking.prompt,
        responses=ranking.responses,
        ranks=tuple(ranks),
        category=str(record.get("category") or ""),
        margin=ranking.margin,
        gold=None if gold is None else tuple(float(value) for value in gold),
        finish_reasons=None if reasons is None else tuple(reasons),
        columns=columns,
    )


def _order(record: Mapping[str, Any]) -> tuple[list[Any], list[int]]:
    """Indices into the responses, best first, and the rank of each."""
    tie = record.get("tie", False)
    if not isinstance(tie, bool):
        raise ValueError(f"'tie' must be true or false, with {tie!r}.")
    ranking = record.get("ranking")
    if not isinstance(ranking, list):
        return [0, 1], [0, 0 if tie else 1]
    if tie:
        raise ValueError("'tie' belongs to a pair; in a ranking, put equals into a list of their own: [[0, 2], 1].")
    order, ranks = [], []
    for equals in ranking:
        equals = equals if isinstance(equals, list) else [equals]
        ranks += [len(order)] * len(equals)
        order += equals
    return order, ranks


def _per_response(record: Mapping[str, Any], name: str, order: list[int]) -> list[Any] | None:
    """A field with one value a response, from best to worst."""
    values = record.get(name)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != len(order):
        raise ValueError(f"{name!r} must hold one value a response, with responses (={len(order)}) and {values!r}.")
    return [values[index] for index in order]


def _records(source: str | Path) -> Iterator[tuple[str, Any]]:
    """Lines of a file that are not blank, or records of a data set, each with its place."""
    path, name = Path(source), str(source)
    hub_id = name.count("/") == 1 and not looks_like_path(name) and not name.endswith(_FILES)
    if path.exists() or hub_id:
        return raw_records(source)
    raise ValueError(
        "data must be a JSONL file, a data set's folder or hub id, 'embedded', 'embedded-validation' or 'micro', with "
        f"data (={str(path)!r})."
    )


def _named(source: Any) -> str:
    return repr(str(source)) if isinstance(source, str | Path) else "records in memory"
