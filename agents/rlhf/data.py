"""The data of a run: comparisons of replies, split by prompt, as demonstrations, rankings and prompts."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reward_models.preferences import (
    HUMAN,
    Ranking,
    as_messages,
    load_rankings,
    of_several_turns,
    split_by_prompt,
)
from textenv.data.records import place_of, write_jsonl
from textenv.lm import LanguageModel

_log = logging.getLogger(__name__)

VALIDATION = 0.1
"""Share of the training prompts whose comparisons tell the reward model when to stop."""


class Parts(NamedTuple):
    """Comparisons that share no prompt."""

    train: list[Ranking]
    validation: list[Ranking]
    held_out: list[Ranking]


def prepare(
    rankings: Sequence[Ranking],
    model: LanguageModel,
    *,
    max_prompt_tokens: int,
    max_pairs: int | None,
    held_out: float,
    seed: int,
) -> Parts:
    """The comparisons that a model can read, in its chat template if it has one, split by prompt.

    Comparisons are left out whose prompt has more than ``max_prompt_tokens``, or which go on for several turns.

    Raises:
        ValueError: fewer than 20 are left.
    """
    convert = as_chat if model.tokenizer.chat_template else as_text
    fitting: dict[int, Ranking] = {}
    refused: dict[int, str] = {}
    for number in np.random.default_rng(seed).permutation(len(rankings)):
        ranking = convert(rankings[number])
        try:
            if ranking is not None and len(model.encode_prompt(ranking.prompt)) <= max_prompt_tokens:
                fitting[number] = ranking
        except ValueError as error:
            refused[number] = f"{place_of(rankings, number)}: {error}"
        if len(fitting) == max_pairs:
            break
    if refused:
        first = refused[min(refused)]
        _log.warning("%d comparisons left out, whose prompt the model refuses. The first: %s", len(refused), first)
    if len(fitting) < 20:
        raise ValueError(
            f"preferences must have at least 20 comparisons with a prompt of at most max_prompt_tokens "
            f"({max_prompt_tokens}), got {len(fitting)} of {len(rankings)}. Raise max_prompt_tokens, or add data."
        )
    chosen = [fitting[number] for number in sorted(fitting)]
    seen, unseen = split_by_prompt(chosen, held_out, seed)
    return Parts(*split_by_prompt(seen, VALIDATION, seed), unseen)


def as_chat(ranking: Ranking) -> Ranking | None:
    """A comparison whose prompt is a dialogue as text, with the messages of a chat; a plain text is a person's message.
    None where a response goes on for several turns, a turn is empty, or the last one is not a person's."""
    prompt = ranking.prompt
    if isinstance(prompt, str):
        try:
            prompt = as_messages(prompt) if HUMAN in prompt else [{"role": "user", "content": prompt}]
        except ValueError:
            return None
    if _several_turns(ranking) or prompt[-1]["role"] != "user":
        return None
    return ranking._replace(prompt=prompt, responses=tuple(response.strip() for response in ranking.responses))


def as_text(ranking: Ranking) -> Ranking | None:
    """A comparison as it is; None where a response goes on for several turns."""
    return None if _several_turns(ranking) else ranking


def _several_turns(ranking: Ranking) -> bool:
    return any(map(of_several_turns, ranking.responses))


def write_parts(parts: Parts, folder: Path, demonstrations: int) -> None:
    """``rankings-….jsonl``, ``prompts-….jsonl``, and the best replies to the first training prompts as
    ``demonstrations.jsonl``."""
    for name, rankings in parts._asdict().items():
        name = name.replace("_", "-")
        write_jsonl(folder / f"rankings-{name}.jsonl", map(_record, rankings))
        write_jsonl(folder / f"prompts-{name}.jsonl", ({"prompt": prompt} for prompt in distinct_prompts(rankings)))
    best = [{"prompt": r.prompt, "completion": r.responses[0]} for r in parts.train if r.responses[0]]
    write_jsonl(folder / "demonstrations.jsonl", best[:demonstrations])


def read_rankings(folder: Path, name: str) -> list[Ranking]:
    return load_rankings(folder / f"rankings-{name}.jsonl")


def distinct_prompts(rankings: Sequence[Ranking]) -> list[Any]:
    return list({repr(ranking.prompt): ranking.prompt for ranking in rankings}.values())


def _record(ranking: Ranking) -> dict[str, Any]:
    levels = ranking.levels
    order = [[i for i, level in enumerate(levels) if level == own] for own in sorted(set(levels))]
    return {"prompt": ranking.prompt, "responses": list(ranking.responses), "ranking": order}
