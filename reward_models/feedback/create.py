"""Making a project: responses that models give to prompts, or those of existing preferences."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Annotated, Any, TypeVar

import torch
from annotated_types import Ge

from reward_models.feedback.project import NewItem, Project, Response
from reward_models.feedback.queue import EVERYONE
from reward_models.preferences import Ranking
from textenv.data.records import PromptSet
from textenv.lm import LanguageModel, TokenRule, pad_left, sample_responses
from textenv.lm.chat import placed_chats
from textenv.settings import Count, Fraction, Positive, PositiveInt, check_settings

ATTEMPTS = 8
"""Times that a response is drawn again because the prompt has its text already."""

Advance = Callable[[int, int], object]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How models answer."""

    max_new_tokens: PositiveInt = 128
    """Length budget of a response, tokens."""
    temperature: Positive = 1.0
    """Lower is more predictable, and gives fewer different responses."""
    seed: Count = 0
    """Seed of the sampling and of the order in which responses are shown."""
    batch_size: PositiveInt = 64
    """Responses drawn at once. More is faster and takes more memory; other responses come out."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who ranks what."""

    overlap: Fraction = 0.1
    """Share of the items that several annotators rank, so that their agreement can be measured."""
    annotators: Annotated[int, Ge(2), "One annotator cannot overlap with others."] = 2
    """Annotators of such an item."""
    check_every: PositiveInt = 10
    """One of so many items is a check item, as long as there are any."""

    def __post_init__(self) -> None:
        check_settings(self)

    def needed(self, source: str, seed: int) -> int:
        """Annotators of an item, drawn by its source."""
        return self.annotators if random.Random(f"{seed} {source}").random() < self.overlap else 1


def turn(place: int, group: str, seed: int) -> int:
    """Which of two responses is shown first: in each two items of a group once the one and once the other, at random
    (permuted blocks)."""
    return (place + random.Random(f"{seed} {group} {place // 2}").randrange(2)) % 2


def add_sampled(
    project: Project,
    prompts: PromptSet,
    models: Sequence[LanguageModel],
    k: int,
    sampling: Sampling,
    plan: Plan,
    advance: Advance,
) -> int:
    """Add an item per prompt, with K different responses of the models in turn. Items that are there stay.

    Each batch is kept as soon as it is drawn, so an interrupted call goes on where it stopped.

    Returns:
        Prompts of the set that did not give K different responses. With two or more they are items all the same.

    Raises:
        ValueError: a prompt and the length budget do not fit a model's context, or its chat template refuses a prompt.
            Nothing is drawn then.
    """
    check_prompts(prompts, models, sampling)
    categories = prompts.columns.get("category", ("",) * len(prompts.prompts))
    for chunk in _missing(project, prompts, max(1, sampling.batch_size // k), advance):
        slots = [[(place + slot) % len(models) for slot in range(k)] for place in chunk]
        answers = distinct_responses([prompts.prompts[place] for place in chunk], models, slots, sampling, chunk[0])
        items = []
        for place, responses in zip(chunk, answers, strict=True):
            source = f"prompt {place}"
            needed = plan.needed(source, sampling.seed) if len(responses) > 1 else 0  # nothing to rank, ever
            shift = turn(place, "", sampling.seed)
            category = str(categories[place] or "")
            items.append(NewItem(source, prompts.prompts[place], responses, category, needed, turn=shift))
        project.add_items(items)
    return sum(len(item.responses) < k for item in project.items() if item.known is None)


def add_battles(
    project: Project,
    prompts: PromptSet,
    models: Sequence[LanguageModel],
    sampling: Sampling,
    plan: Plan,
    advance: Advance,
) -> None:
    """Add an item per prompt and pair of models: two responses, shown side by side. Resumable as
    :func:`add_sampled`."""
    check_prompts(prompts, models, sampling)
    categories = prompts.columns.get("category", ("",) * len(prompts.prompts))
    pairs = list(combinations(range(len(models)), 2))
    for chunk in _missing(project, prompts, max(1, sampling.batch_size // len(models)), advance):
        slots = [list(range(len(models)))] * len(chunk)
        texts = [prompts.prompts[place] for place in chunk]
        answers = distinct_responses(texts, models, slots, sampling, chunk[0], distinct=False)
        project.add_items(
            [
                NewItem(
                    f"prompt {place}" if (a, b) == pairs[-1] else f"prompt {place}, models {a} and {b}",
                    prompts.prompts[place],
                    (responses[a], responses[b]),
                    str(categories[place] or ""),
                    # Equal texts are a tie that nobody needs to see.
                    plan.needed(f"{place} {a} {b}", sampling.seed) * (responses[a].text != responses[b].text),
                    turn=turn(place, f"{a} {b}", sampling.seed),
                )
                for place, responses in zip(chunk, answers, strict=True)
                for a, b in pairs
            ]
        )


def add_rankings(project: Project, rankings: Sequence[Ranking], plan: Plan, seed: int, *, checks: bool = False) -> None:
    """Add an item per ranking, to be ranked by people. As ``checks``, all annotators get them, and the rankings count
    as right."""
    items = []
    for place, ranking in enumerate(rankings):
        source = f"{'check' if checks else 'record'} {place}"
        levels = [[i for i, own in enumerate(ranking.levels) if own == level] for level in sorted(set(ranking.levels))]
        reasons = ranking.finish_reasons or ("",) * len(ranking.responses)
        responses = [Response(text, finish_reason=reason) for text, reason in zip(ranking.responses, reasons)]
        needed = EVERYONE if checks else plan.needed(source, seed)
        known = levels if checks else None
        shift = turn(place, "", seed)
        items.append(NewItem(source, ranking.prompt, responses, ranking.category, needed, known, shift))
    project.add_items(items)


def _missing(project: Project, prompts: PromptSet, size: int, advance: Advance) -> Iterator[Sequence[int]]:
    """Places of prompts that have no item, in fixed chunks: the draws of a chunk do not depend on what was there."""
    there = project.sources()
    done = 0
    for chunk in _parts(range(len(prompts.prompts)), size):
        if any(f"prompt {place}" not in there for place in chunk):
            yield chunk
        done += len(chunk)
        advance(done, len(prompts.prompts))


def check_prompts(prompts: PromptSet, models: Sequence[LanguageModel], sampling: Sampling) -> None:
    """Refuse a prompt that one of the models cannot answer; see :func:`add_sampled`."""
    for model in models:
        with placed_chats(model.tokenizer, prompts.prompts, prompts.place):
            lengths = [len(model.encode_prompt(prompt)) for prompt in prompts.prompts]
        for number, length in enumerate(lengths):
            needed = length + sampling.max_new_tokens
            if model.max_tokens is not None and needed > model.max_tokens:
                rule = f"a prompt and max_new_tokens must fit the context of {model.name!r} ({model.max_tokens})"
                remedy = "Lower max_new_tokens or drop the prompt"
                raise ValueError(f"{prompts.place(number)}: {rule}, got {needed} tokens. {remedy}.")


def distinct_responses(
    prompts: Sequence[Any],
    models: Sequence[LanguageModel],
    slots: Sequence[Sequence[int]],
    sampling: Sampling,
    chunk: int,
    *,
    distinct: bool = True,
) -> list[list[Response]]:
    """For each prompt a response of each model that ``slots`` lists, no text twice unless ``distinct`` is False.

    A response whose text the prompt has already is drawn again, up to ``ATTEMPTS`` times; then its slot is left out.
    """
    filled: list[list[Response | None]] = [[None] * len(own) for own in slots]
    texts: list[set[str]] = [set() for _ in prompts]
    settings = {key: value for key, value in asdict(sampling).items() if key != "batch_size"}
    generator = torch.Generator().manual_seed(random.Random(f"{sampling.seed} {chunk}").getrandbits(63))
    for _ in range(ATTEMPTS):
        for number, model in enumerate(models):
            empty = [
                (row, slot)
                for row, own in enumerate(slots)
                for slot, wanted in enumerate(own)
                if wanted == number and filled[row][slot] is None
            ]
            for part in _parts(empty, sampling.batch_size):
                drawn = _draw(model, [prompts[row] for row, _ in part], sampling, generator)
                for (row, slot), (text, reason) in zip(part, drawn, strict=True):
                    if not distinct or text.strip() not in texts[row]:
                        texts[row].add(text.strip())
                        filled[row][slot] = Response(text, model.name, settings, reason)
    return [[response for response in row if response is not None] for row in filled]


def _parts(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _draw(
    model: LanguageModel, prompts: Sequence[Any], sampling: Sampling, generator: torch.Generator
) -> list[tuple[str, str]]:
    """``(text, finish reason)`` of a response to each prompt."""
    ids, lengths = pad_left([model.encode_prompt(prompt) for prompt in prompts], model.pad_id)
    drawn = sample_responses(
        model.model,
        ids,
        lengths,
        max_new_tokens=sampling.max_new_tokens,
        rule=TokenRule(temperature=sampling.temperature, stop_ids=model.ending_ids),
        pad_id=model.pad_id,
        generator=generator,
    )
    rows = [row[:length].tolist() for row, length in zip(drawn.response_ids, drawn.response_lengths)]
    reasons = ["eos" if row and row[-1] in model.ending_ids else "length" for row in rows]
    return list(zip(model.response_texts(rows), reasons, strict=True))
