"""From rankings to arrays: every distinct text is scored once, and pairs point to the rows of their two texts."""

import json
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from reward_models.preferences import Ranking, better_pairs, prompt_key

FINISH = "finish_reason"


class Inputs(NamedTuple):
    """What a reward model is asked to score; N texts."""

    prompts: list[Any]
    responses: list[str]
    columns: dict[str, list[Any]]
    """Further facts, one value per text."""

    def select(self, rows: Any) -> "Inputs":
        """The texts of ``rows``, in that order."""
        columns = {key: [values[i] for i in rows] for key, values in self.columns.items()}
        return Inputs([self.prompts[i] for i in rows], [self.responses[i] for i in rows], columns)


class Pairs(NamedTuple):
    """M pairs of responses to one prompt, as rows of the texts."""

    first: Int[np.ndarray, " M"]
    """The better one; of a tie, any."""
    second: Int[np.ndarray, " M"]
    item: Int[np.ndarray, " M"]
    cluster: Int[np.ndarray, " M"]
    """Numbered from 0; pairs of different clusters are independent."""

    def margins(self, scores: Float[np.ndarray, " N"]) -> Float[np.ndarray, " M"]:
        """Score of the first minus score of the second."""
        return scores[self.first] - scores[self.second]

    def select(self, keep: Any) -> "Pairs":
        return Pairs(*(field[keep] for field in self))


class Layout(NamedTuple):
    """Where everything stands."""

    texts: Inputs
    rows: list[Int[np.ndarray, " K"]]
    """The texts of each item, from best to worst."""
    prompt: Int[np.ndarray, " N"]
    """The prompt of each text, numbered from 0."""
    pairs: Pairs
    """Every better response with every worse one, item by item; never two equal texts."""
    ties: Pairs
    """Pairs that the labels call equal, of different texts."""
    gold: Float[np.ndarray, " N"] | None
    """True score of each text."""


def lay_out(items: Sequence[Ranking]) -> Layout:
    """Texts, pairs and ties of the items."""
    number: dict[tuple[str, ...], int] = {}
    prompts: dict[str, int] = {}
    kept: list[tuple[Ranking, int]] = []
    rows = []
    for item in items:
        row = []
        for place in range(len(item.responses)):
            key = _key(item, place)
            if key not in number:
                number[key] = len(kept)
                kept.append((item, place))
                prompts.setdefault(prompt_key(item.prompt), len(prompts))
            row.append(number[key])
        rows.append(np.array(row))
    responses = [item.responses[place] for item, place in kept]
    texts = Inputs([item.prompt for item, _ in kept], responses, _columns(items, kept))
    prompt = np.array([prompts[prompt_key(prompt)] for prompt in texts.prompts])
    gold = np.array([item.gold[place] for item, place in kept]) if all(item.gold for item in items) else None
    return Layout(texts, rows, prompt, _pairs(items, rows, operator.lt), _pairs(items, rows, operator.eq), gold)


def _key(item: Ranking, place: int) -> tuple[str, ...]:
    """What makes two texts the same to a reward model."""
    reason = item.finish_reasons[place] if item.finish_reasons else ""
    return (prompt_key(item.prompt), item.responses[place], reason, json.dumps(item.columns, default=repr))


def _columns(items: Sequence[Ranking], kept: list[tuple[Ranking, int]]) -> dict[str, list[Any]]:
    """Fields of the records, and ``finish_reason`` as in an environment: a response ended by itself unless told."""
    names = dict.fromkeys(name for item in items for name in item.columns)
    columns = {name: [item.columns.get(name) for item, _ in kept] for name in names}
    return columns | {FINISH: [item.finish_reasons[place] if item.finish_reasons else "eos" for item, place in kept]}


def _pairs(items: Sequence[Ranking], rows: list[Any], wanted: Callable[[int, int], bool]) -> Pairs:
    clusters: dict[str, int] = {}
    found = [
        (rows[i][a], rows[i][b], i, clusters.setdefault(item.group, len(clusters)))
        for i, item in enumerate(items)
        for a, b in better_pairs(item.responses, item.levels, wanted)
    ]
    table = np.array(found, dtype=np.int64).reshape(-1, 4)
    return Pairs(*table.T)
