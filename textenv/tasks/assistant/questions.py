"""The prompts of the embedded world, and which of them are held out.

A prompt is ``user: [tone sentence] question assistant:``. Questions are of three kinds: ``howto`` (a harmless verb and
an object, perhaps with a harmless aim), ``fact`` (a relation of an animal) and ``harmful`` (a harmful verb, or a
harmless one with a harmful aim). Plain Python and numpy; no model is loaded.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from itertools import product
from typing import NamedTuple, TypeVar, cast, get_args

import numpy as np

from textenv.tasks.assistant import world
from textenv.tasks.assistant.world import Kind, Split, Tone

T = TypeVar("T")


class Prompt(NamedTuple):
    """A prompt and what it asks for; fields that do not apply are empty strings."""

    text: str
    kind: Kind
    tone: Tone
    harmful: bool
    verb: str
    object: str
    relation: str
    subject: str
    aim: str
    """Verb of "to … my …"."""
    person: str
    """Whom the aim concerns."""
    phrasing: int
    """Index into the phrasings of the kind; the last is held out."""


class Pair(NamedTuple):
    """A verb–object pair (``kind`` by the verb) or, for facts, a relation and a subject."""

    head: str
    target: str


def pair_split(verb: str, object: str) -> Split:
    """The split to which a verb–object pair belongs: 20 % are held out, half for validation and half for test."""
    place = (3 * list(world.VERBS).index(verb) + list(world.OBJECTS).index(object)) % 10
    return "validation" if place == 0 else "test" if place == 5 else "train"


def prompt_split(prompt: Prompt) -> Split:
    """The one split that a prompt belongs to.

    ``train`` has neither a held-out pair nor a held-out phrasing. A held-out phrasing goes to
    ``validation`` or ``test`` by the object of its pair or the subject of its fact.
    """
    if prompt.kind == "fact":
        own, targets, target = "train", list(world.FACTS), prompt.subject
    else:
        own, targets, target = pair_split(prompt.verb, prompt.object), list(world.OBJECTS), prompt.object
    if own != "train" or prompt.phrasing != world.HELD_OUT_PHRASING:
        return cast(Split, own)
    return "validation" if targets.index(target) % 2 == 0 else "test"


@lru_cache(maxsize=1 << 16)
def parse_prompt(text: str) -> Prompt:
    """What a prompt asks for.

    Raises:
        ValueError: the text is not a prompt of this world.
    """
    for (tone, sentence), (is_fact, index, pattern) in product(_tone_openings(), _question_patterns()):
        opening = f"user: {sentence} " if sentence else "user: "
        if text.startswith(opening) and (found := pattern.fullmatch(text, len(opening))):
            slots = found.groupdict(default="")
            if is_fact:
                return _prompt(tone, index, relation=slots["relation"], subject=slots["subject"], sentence=sentence)
            return _prompt(tone, index, sentence=sentence, **slots)
    rule = "a prompt must read 'user: [please be polite . | be brief .] <question> assistant:'"
    raise ValueError(f"{rule}, got {text!r}. Take one from textenv.tasks.assistant.prompts.")


@lru_cache(maxsize=3)
def prompts(split: Split) -> tuple[Prompt, ...]:
    """The fixed prompt set of a split: 2,000 for train, 512 each for validation and test. Prompts may repeat."""
    return tuple(sample_prompts(split, world.SPLIT_SIZES[_checked(split)], seed=sorted(world.SPLIT_SIZES).index(split)))


def sample_prompts(split: Split, count: int, seed: int | np.random.Generator) -> list[Prompt]:
    """Draw prompts of a split, independently, with the mix of kinds and tones above."""
    rng = np.random.default_rng(seed)
    questions = _questions(_checked(split))
    return [_sample_prompt(questions, rng) for _ in range(count)]


def prompt_records(split: Split) -> list[dict[str, str | bool]]:
    """The prompt set as records for an environment: ``prompt`` and the columns ``kind``, ``tone``, ``harmful``."""
    return [{"prompt": p.text, "kind": p.kind, "tone": p.tone, "harmful": p.harmful} for p in prompts(split)]


train_prompts = partial(prompt_records, "train")
validation_prompts = partial(prompt_records, "validation")
"""Prompts for choosing settings."""
test_prompts = partial(prompt_records, "test")
"""Prompts for reporting."""


def _checked(split: Split) -> Split:
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}. Use one.")
    return split


def _sample_prompt(questions: dict[str, list[tuple[Pair, int]]], rng: np.random.Generator) -> Prompt:
    kind, tone = _weighted(rng, world.KIND_MIX), _weighted(rng, world.TONE_MIX)
    sentence = _one_of(rng, world.TONE_SENTENCES[tone])
    harmful_verb = kind == "harmful" and rng.random() < world.HARMFUL_VERB_RATE
    group = "fact" if kind == "fact" else "harmful verb" if harmful_verb else "harmless verb"
    (head, target), phrasing = _one_of(rng, questions[group])
    if kind == "fact":
        return _prompt(tone, phrasing, sentence=sentence, relation=head, subject=target)
    aim = person = ""
    if (kind == "harmful" and not harmful_verb) or (kind == "howto" and rng.random() < world.HARMLESS_AIM_RATE):
        aim = _one_of(rng, world.HARMFUL_AIMS if kind == "harmful" else world.HARMLESS_AIMS)
        person = _one_of(rng, world.PERSONS)
    return _prompt(tone, phrasing, sentence=sentence, verb=head, object=target, aim=aim, person=person)


def _one_of(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def _weighted(rng: np.random.Generator, mix: dict[T, float]) -> T:
    """A key, drawn with the probability that is its value."""
    left = rng.random()
    for key, probability in mix.items():
        left -= probability
        if left < 0:
            return key
    return next(reversed(mix))


@lru_cache(maxsize=3)
def _questions(split: Split) -> dict[str, list[tuple[Pair, int]]]:
    """Every (pair, phrasing) of a split, by group."""
    groups = {
        "harmless verb": [Pair(verb, object) for verb, object in product(world.HARMLESS_VERBS, world.OBJECTS)],
        "harmful verb": [Pair(verb, object) for verb, object in product(world.HARMFUL_VERBS, world.OBJECTS)],
        "fact": [Pair(relation, subject) for relation, subject in product(world.RELATIONS, world.FACTS)],
    }
    chosen: dict[str, list[tuple[Pair, int]]] = {}
    for group, pairs in groups.items():
        names = ("relation", "subject") if group == "fact" else ("verb", "object")
        chosen[group] = [
            (pair, phrasing)
            for pair, phrasing in product(pairs, range(world.HELD_OUT_PHRASING + 1))
            if prompt_split(_prompt("none", phrasing, **dict(zip(names, pair, strict=True)))) == split
        ]
    return chosen


def _prompt(
    tone: Tone,
    phrasing: int,
    *,
    sentence: str = "",
    verb: str = "",
    object: str = "",
    relation: str = "",
    subject: str = "",
    aim: str = "",
    person: str = "",
) -> Prompt:
    harmful = verb in world.HARMFUL_VERBS or aim in world.HARMFUL_AIMS
    kind: Kind = "fact" if subject else "harmful" if harmful else "howto"
    clause = f" to {aim} my {person}" if aim else ""
    question = world.PHRASINGS[kind][phrasing].format(
        verb=verb, object=object, relation=relation, subject=subject, aim=clause
    )
    text = " ".join(f"user: {sentence} {question} assistant:".split())
    return Prompt(text, kind, tone, harmful, verb, object, relation, subject, aim, person, phrasing)


def _tone_openings() -> list[tuple[Tone, str]]:
    return [(tone, sentence) for tone, sentences in world.TONE_SENTENCES.items() for sentence in sentences]


@lru_cache(maxsize=1)
def _question_patterns() -> list[tuple[bool, int, re.Pattern[str]]]:
    aims = _either("aim", (*world.HARMLESS_AIMS, *world.HARMFUL_AIMS))
    slots = {
        "verb": _either("verb", world.VERBS),
        "object": _either("object", world.OBJECTS),
        "relation": _either("relation", world.RELATIONS),
        "subject": _either("subject", world.FACTS),
        "aim": f"(?: to {aims} my {_either('person', world.PERSONS)})?",
    }

    def pattern(phrasing: str) -> re.Pattern[str]:
        template = re.escape(phrasing).replace(r"\{", "{").replace(r"\}", "}")
        return re.compile(template.format(**slots) + " assistant:")

    pairs = [(False, index, pattern(phrasing)) for index, phrasing in enumerate(world.PAIR_PHRASINGS)]
    return pairs + [(True, index, pattern(phrasing)) for index, phrasing in enumerate(world.FACT_PHRASINGS)]


def _either(name: str, words: Iterable[str]) -> str:
    return f"(?P<{name}>{'|'.join(words)})"
