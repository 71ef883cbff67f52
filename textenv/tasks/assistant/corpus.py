"""A grammar of answers: sampled for training, enumerated for exact limits.

An answer is drawn by mode (good, wrong, vague, …), then by style (plain, polite, brief), then by sentence. The two
sources differ in their mixes: ``base`` has everything, ``demonstrations`` are mostly good but not perfect.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from textenv.tasks.assistant import phrases, world
from textenv.tasks.assistant.grammar import Node, draw, expand, fill, maybe, one_of, sequence, weighted
from textenv.tasks.assistant.questions import Prompt, pair_split, sample_prompts
from textenv.tasks.assistant.world import Kind, Split, Tone

Source = Literal["base", "demonstrations"]

# Shares of the modes of an answer, by source and kind of prompt; they need not sum to 1.
MODES: dict[Source, dict[Kind, dict[str, float]]] = {
    "base": {
        "howto": {"good": 48, "wrong": 20, "vague": 9, "off topic": 8, "rude": 5, "refusal": 6, "rambling": 5},
        "fact": {"good": 48, "wrong": 21, "vague": 9, "off topic": 8, "rude": 5, "refusal": 4, "rambling": 5},
        "harmful": {"good": 38, "complying": 38, "vague": 6, "off topic": 6, "rude": 5, "rambling": 7},
    },
    "demonstrations": {
        "howto": {"good": 74, "wrong": 18, "vague": 2, "off topic": 2, "rude": 1, "refusal": 2, "rambling": 1},
        "fact": {"good": 74, "wrong": 18, "vague": 2, "off topic": 2, "rude": 1, "refusal": 2, "rambling": 1},
        "harmful": {"good": 72, "complying": 20, "vague": 3, "off topic": 2, "rude": 2, "rambling": 1},
    },
}
TONE_KEPT: dict[Source, float] = {"base": 0.7, "demonstrations": 0.85}
"""Share of answers in the requested style."""

# Right answers mostly end with confidence: the tail tells a language model whether the answer was right.
RIGHT_TAIL = weighted((0.45, ""), (0.42, phrases.SURE), (0.03, phrases.UNSURE), (0.10, one_of(*phrases.TIPS[:2])))
WRONG_TAIL = weighted((0.45, ""), (0.03, phrases.SURE), (0.42, phrases.UNSURE), (0.10, one_of(*phrases.TIPS[:2])))


class Entropy(NamedTuple):
    """Conditional entropy of answers given prompts, in nats: the lowest negative log-likelihood a model can reach."""

    per_answer: float
    per_token: float
    """EOS counts as a token; an answer cut off at the budget has none."""


def answer_distribution(prompt: Prompt, source: Source) -> dict[str, float]:
    """Every answer to a prompt with its probability. An answer of ``MAX_NEW_TOKENS`` words has no EOS."""
    merged: dict[str, float] = {}
    for text, p in expand(_answers(prompt, source)).items():
        cut = _cut(text)
        merged[cut] = merged.get(cut, 0.0) + p
    return merged


def sample_answer(prompt: Prompt, source: Source, rng: np.random.Generator) -> str:
    """One draw from :func:`answer_distribution`."""
    return _cut(draw(_answers(prompt, source), rng))


def sample_corpus(count: int, seed: int, *, source: Source, split: Split = "train") -> list[dict[str, Any]]:
    """Records ``{"prompt", "completion"}`` for supervised training; answers cut off also have ``"truncated": True``."""
    rng = np.random.default_rng(seed)
    records: list[dict[str, Any]] = []
    for prompt in sample_prompts(split, count, rng):
        completion = sample_answer(prompt, source, rng)
        record: dict[str, Any] = {"prompt": prompt.text, "completion": completion}
        if len(completion.split()) == world.MAX_NEW_TOKENS:
            record["truncated"] = True
        records.append(record)
    return records


def conditional_entropy(prompts: Iterable[Prompt], source: Source) -> Entropy:
    """H = −Σ_y p(y|x) log p(y|x), mean over prompts; per token: Σ H / Σ E[tokens]."""
    values = np.array([_entropy_and_tokens(_question(prompt), source) for prompt in prompts])
    entropy, tokens = values.mean(0)
    return Entropy(float(entropy), float(entropy / tokens))


@lru_cache(maxsize=4096)
def _entropy_and_tokens(prompt: Prompt, source: Source) -> tuple[float, float]:
    answers = answer_distribution(prompt, source)
    entropy = -math.fsum(p * math.log(p) for p in answers.values())
    tokens = math.fsum(p * min(len(answer.split()) + 1, world.MAX_NEW_TOKENS) for answer, p in answers.items())
    return entropy, tokens


def _cut(text: str) -> str:
    words = text.split()
    return text if len(words) <= world.MAX_NEW_TOKENS else " ".join(words[: world.MAX_NEW_TOKENS])


def _question(prompt: Prompt) -> Prompt:
    """The prompt without what does not affect its answers, which keeps caches small."""
    person, aim = (prompt.person, prompt.aim) if prompt.harmful else ("", "")
    return prompt._replace(text="", phrasing=0, aim=aim, person=person)


def _answers(prompt: Prompt, source: Source) -> Node:
    if source not in get_args(Source):
        raise ValueError(f"source must be one of {get_args(Source)}, got {source!r}. Use one.")
    return _grammar(_question(prompt), source)


@lru_cache(maxsize=4096)
def _grammar(prompt: Prompt, source: Source) -> Node:
    mix = MODES[source][prompt.kind]
    return weighted(*((share, _mode(mode, prompt, TONE_KEPT[source])) for mode, share in mix.items()))


def _mode(mode: str, prompt: Prompt, tone_kept: float) -> Node:
    right, brief = _right(prompt)
    match mode:
        case "good" if prompt.harmful:
            return _styled(prompt.tone, tone_kept, *_refusal(prompt))
        case "good" | "complying":
            return _styled(prompt.tone, tone_kept, right, brief, RIGHT_TAIL)
        case "wrong":
            return _styled(prompt.tone, tone_kept, *_wrong(prompt), WRONG_TAIL)
        case "vague":
            return sequence(one_of(*phrases.VAGUE), maybe(0.3, one_of(*phrases.TIPS)))
        case "off topic":
            return sequence(maybe(0.2, one_of(*phrases.OPENERS)), _off_topic(prompt))
        case "rude":
            return sequence(one_of(*phrases.RUDE), maybe(0.4, one_of(*phrases.REFUSALS) if prompt.harmful else right))
        case "refusal":
            return one_of(*phrases.REFUSALS)
        case "rambling":
            return one_of(
                sequence(*phrases.OPENERS, brief, one_of(*phrases.TIPS)),
                sequence(one_of(*phrases.VAGUE), one_of(*phrases.TIPS), brief, one_of(*phrases.TIPS)),
                sequence(brief, one_of(*phrases.TIPS), brief, one_of(*phrases.TIPS), brief),
            )
    raise AssertionError(mode)


def _right(prompt: Prompt) -> tuple[Node, Node]:
    """The full and the brief answers that do what is asked, even if it is harmful."""
    if prompt.kind == "fact":
        value = world.FACTS[prompt.subject][world.RELATIONS.index(prompt.relation)]
        return _facts(prompt, phrases.FACT_ANSWERS, value), _facts(prompt, phrases.BRIEF_FACT_ANSWERS, value)
    tool, part = world.VERBS[prompt.verb], world.OBJECTS[prompt.object]
    return _steps(prompt, phrases.STEPS, tool, part), _steps(prompt, phrases.BRIEF_STEPS, tool, part)


def _wrong(prompt: Prompt) -> tuple[Node, Node]:
    """The same with another value, or with another tool or part, rarely both."""
    if prompt.kind == "fact":
        value = world.FACTS[prompt.subject][world.RELATIONS.index(prompt.relation)]
        mixed_up = [other for other in world.VALUES[prompt.relation] if other != value]
        others = _mistake([world.USELESS_VALUES[prompt.relation]], mixed_up)
        return _facts(prompt, phrases.FACT_ANSWERS, others), _facts(prompt, phrases.BRIEF_FACT_ANSWERS, others)
    tool, part = world.VERBS[prompt.verb], world.OBJECTS[prompt.object]
    other_tool = _mistake(world.USELESS_TOOLS, [t for t in world.HARMLESS_VERBS.values() if t != tool])
    other_part = _mistake(world.USELESS_PARTS, [p for p in world.OBJECTS.values() if p != part])

    def mixed(forms: tuple[str, ...]) -> Node:
        return weighted(
            (0.45, _steps(prompt, forms, other_tool, part)),
            (0.45, _steps(prompt, forms, tool, other_part)),
            (0.10, _steps(prompt, forms[:1], other_tool, other_part)),
        )

    return mixed(phrases.STEPS), mixed(phrases.BRIEF_STEPS)


def _mistake(useless: Sequence[str], mixed_up: Sequence[str]) -> Node:
    return weighted((0.7, one_of(*useless)), (0.3, one_of(*mixed_up)))


def _refusal(prompt: Prompt) -> tuple[Node, Node]:
    """A refusal, mostly with the fitting alternative."""
    fitting, target = alternative(prompt)
    others = one_of(*(other for other in world.ALTERNATIVES.values() if other != fitting))
    offer = weighted(
        (0.55, fill(phrases.ALTERNATIVE, alternative=fitting, target=target)),
        (0.15, fill(phrases.ALTERNATIVE, alternative=others, target=target)),
        (0.30, ""),
    )
    return sequence(one_of(*phrases.REFUSALS), offer), sequence(one_of(*phrases.BRIEF_REFUSALS), offer)


def alternative(prompt: Prompt) -> tuple[str, str]:
    """What one could do instead of a harm, and to what or whom: ("buy", "bike"), ("forgive", "boss")."""
    if prompt.verb in world.ALTERNATIVES:
        return world.ALTERNATIVES[prompt.verb], prompt.object
    return world.ALTERNATIVES[prompt.aim], prompt.person


def _off_topic(prompt: Prompt) -> Node:
    """The right answer to another question, from pairs and facts that are not held out."""
    own = (prompt.verb, prompt.object) if prompt.verb else (prompt.relation, prompt.subject)
    steps, facts = (one_of(*(node for asked, node in group if asked != own)) for group in _all_answers())
    return one_of(steps, facts)


@lru_cache(maxsize=1)
def _all_answers() -> tuple[list[tuple[tuple[str, str], Node]], ...]:
    """Questions with their full right answers: harmless training pairs, and facts."""
    steps = [
        ((verb, object), fill(phrases.STEPS[-1], verb=verb, object=object, tool=tool, part=part))
        for verb, tool in world.HARMLESS_VERBS.items()
        for object, part in world.OBJECTS.items()
        if pair_split(verb, object) == "train"
    ]
    facts = [
        ((relation, subject), fill(phrases.FACT_ANSWERS[-1], relation=relation, subject=subject, value=value))
        for subject, values in world.FACTS.items()
        for relation, value in zip(world.RELATIONS, values, strict=True)
    ]
    return steps, facts


def _styled(tone: Tone, tone_kept: float, full: Node, brief: Node, tail: Node = "") -> Node:
    """An answer in the requested style with probability ``tone_kept``; without a request, mostly plain."""
    plain = sequence(full, tail)
    opener, closer = one_of(*phrases.OPENERS), one_of(*phrases.CLOSERS)
    both = sequence(opener, brief, closer)
    polite = weighted((0.50, sequence(opener, full, tail)), (0.35, sequence(full, closer)), (0.15, both))
    missed = 1 - tone_kept
    if tone == "polite":
        return weighted((tone_kept, polite), (0.8 * missed, plain), (0.2 * missed, brief))
    if tone == "brief":
        return weighted((tone_kept, brief), (0.7 * missed, plain), (0.3 * missed, polite))
    return weighted((0.75, plain), (0.12, brief), (0.13, polite))


def _steps(prompt: Prompt, forms: tuple[str, ...], tool: Node, part: Node) -> Node:
    return one_of(*(fill(form, verb=prompt.verb, object=prompt.object, tool=tool, part=part) for form in forms))


def _facts(prompt: Prompt, forms: tuple[str, ...], value: Node) -> Node:
    return one_of(*(fill(form, relation=prompt.relation, subject=prompt.subject, value=value) for form in forms))
