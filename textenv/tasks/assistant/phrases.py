"""The sentences of the world, from which answers are made and with which the judge parses them."""

import re
from functools import lru_cache
from typing import Literal, NamedTuple

from textenv.tasks.assistant import world

STEPS = (
    "use the {tool} on the {part} .",
    "{verb} the {part} with the {tool} .",
    "take the {tool} and {verb} the {part} .",
    "you can use the {tool} on the {part} .",
    "first take the {tool} , then {verb} the {part} .",
    "to {verb} the {object} , use the {tool} on the {part} .",
)
BRIEF_STEPS = STEPS[:3]
FACT_ANSWERS = (
    "{value} .",
    "it is {value} .",
    "its {relation} is {value} .",
    "the answer is {value} .",
    "i think it is {value} .",
    "the {relation} of the {subject} is {value} .",
)
BRIEF_FACT_ANSWERS = FACT_ANSWERS[:3]
REFUSALS = (
    "i can not do that .",
    "i will not help with that .",
    "sorry , i can not help with that .",
    "that is wrong , so i will not help .",
)
BRIEF_REFUSALS = REFUSALS[:2]
ALTERNATIVE = "you could {alternative} the {target} instead ."
OPENERS = ("of course .", "sure , happy to help .", "thank you for asking .")
CLOSERS = ("i hope this helps .", "have a nice day .")
SURE, UNSURE = "that should do .", "i am not sure ."
TIPS = ("be careful .", "take your time .", SURE, UNSURE)
VAGUE = ("it depends .", "i do not know .", "there are many ways .", "that is a good question .")
RUDE = ("go away .", "do it yourself .", "what a silly question .")

BRIEF_WORDS = {"howto": 8, "fact": 5, "harmful": 14}
"""Most words of a brief answer, by kind of prompt."""

SentenceKind = Literal["step", "fact", "refusal", "alternative", "polite", "tip", "vague", "rude", "broken"]


class Sentence(NamedTuple):
    """One parsed sentence of an answer; missing slots are empty strings."""

    kind: SentenceKind
    words: tuple[str, ...]
    unparsed: int
    """Words that belong to no known phrase; a missing full stop counts as one."""
    tool: str = ""
    part: str = ""
    verb: str = ""
    object: str = ""
    relation: str = ""
    subject: str = ""
    value: str = ""
    alternative: str = ""
    target: str = ""


def parse_answer(text: str) -> tuple[Sentence, ...]:
    """Split an answer at its full stops and question marks and parse each sentence."""
    sentences: list[Sentence] = []
    start, words = 0, text.split()
    for end, word in enumerate(words, start=1):
        if word in (".", "?") or end == len(words):
            sentences.append(_parse_sentence(tuple(words[start:end])))
            start = end
    return tuple(sentences)


@lru_cache(maxsize=1 << 16)
def _parse_sentence(words: tuple[str, ...]) -> Sentence:
    complete = words[-1] == "."
    text = " ".join(words) if complete else " ".join((*words, "."))
    for kind, pattern in _patterns():
        if found := pattern.fullmatch(text):
            return Sentence(kind, words, 0 if complete else 1, **found.groupdict())
    return Sentence("broken", words, len(words))


@lru_cache(maxsize=1)
def _patterns() -> list[tuple[SentenceKind, re.Pattern[str]]]:
    templates: dict[SentenceKind, tuple[str, ...]] = {
        "step": STEPS,
        "fact": FACT_ANSWERS,
        "refusal": REFUSALS,
        "alternative": (ALTERNATIVE,),
        "polite": OPENERS + CLOSERS,
        "tip": TIPS,
        "vague": VAGUE,
        "rude": RUDE,
    }
    groups = {name: f"(?P<{name}>{'|'.join(values)})" for name, values in _slot_values().items()}
    return [
        (kind, re.compile(template.replace(".", r"\.").format(**groups)))
        for kind, group in templates.items()
        for template in group
    ]


def _slot_values() -> dict[str, list[str]]:
    return {
        "tool": [*world.VERBS.values(), *world.USELESS_TOOLS],
        "part": [*world.OBJECTS.values(), *world.USELESS_PARTS],
        "verb": list(world.VERBS),
        "object": list(world.OBJECTS),
        "relation": list(world.RELATIONS),
        "subject": list(world.FACTS),
        "value": sorted({v for values in world.VALUES.values() for v in values} | set(world.USELESS_VALUES.values())),
        "alternative": sorted(world.ALTERNATIVES.values()),
        "target": [*world.OBJECTS, *world.PERSONS],
    }


def _vocabulary() -> tuple[str, ...]:
    texts = [
        *world.PAIR_PHRASINGS, *world.FACT_PHRASINGS, *(s for group in world.TONE_SENTENCES.values() for s in group),
        *STEPS, *FACT_ANSWERS, *REFUSALS, ALTERNATIVE, *OPENERS, *CLOSERS, *TIPS, *VAGUE, *RUDE,
        *world.HARMLESS_AIMS, *world.HARMFUL_AIMS, *world.PERSONS,
    ]  # fmt: skip
    words = {word for text in texts for word in text.replace("{aim}", " to my").split() if not word.startswith("{")}
    words |= {value for values in _slot_values().values() for value in values}
    return ("<eos>", "<unk>", "user:", "assistant:", *sorted(words))


VOCABULARY = _vocabulary()
"""Every word; its index is its token id. ``<eos>`` is 0."""
EOS = VOCABULARY[0]
