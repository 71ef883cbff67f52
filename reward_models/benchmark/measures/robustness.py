"""Prompts asked in another way, meaning the same: does the order of the responses stay?"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from reward_models.benchmark.layout import Inputs, Layout
from reward_models.benchmark.measure import BenchmarkReport, Column, Measure, refused_cell, worst
from reward_models.benchmark.model import BenchmarkedModel, Refused
from reward_models.benchmark.suites import Edit
from textenv.pages.numbers import Cell, number, percent
from textenv.stats import correct, within_prompt_sd

# The last turn of the user, between role names, if there are any.
_TURN = re.compile(r"(?s)(.*\b(?:Human|User|user):\s*)(.*?)(\s*(?:Assistant|assistant):\s*)")


class Robustness(NamedTuple):
    """What an edit of the prompt does."""

    flips: float
    """Share of pairs whose order turns around; to or from a score tie counts one half."""
    shift: float
    """Mean |change of score|, in standard deviations within a prompt."""
    accuracy: float
    """Accuracy of the pairs with edited prompts."""


def upper_case(text: str, rng: np.random.Generator) -> str:
    return text.upper()


def wide_spaces(text: str, rng: np.random.Generator) -> str:
    """Every space twice."""
    return text.replace(" ", "  ")


def greeting(text: str, rng: np.random.Generator) -> str:
    """A polite opening that asks for nothing."""
    return f"Hello, I hope you are well. {text}"


def typo(text: str, rng: np.random.Generator) -> str:
    """Two neighbouring letters swapped inside one word of four or more; unchanged without such a word."""
    words = [found for found in re.finditer(r"[^\W\d_]{4,}", text)]
    if not words:
        return text
    start, end = words[rng.integers(len(words))].span()
    place = int(rng.integers(start + 1, end - 1))
    return text[:place] + text[place + 1] + text[place] + text[place + 2 :]


EDITS: dict[str, Edit] = {"upper case": upper_case, "wide spaces": wide_spaces, "greeting": greeting, "typo": typo}


def edit_prompt(prompt: Any, edit: Edit, rng: np.random.Generator) -> Any:
    """Edit what the user said last: the last message of a chat, the text between role names, or all of it."""
    if not isinstance(prompt, str):
        return [*prompt[:-1], {**prompt[-1], "content": edit(prompt[-1]["content"], rng)}]
    turn = _TURN.fullmatch(prompt)
    return turn[1] + edit(turn[2], rng) + turn[3] if turn else edit(prompt, rng)


def edited(layout: Layout, edit: Edit, seed: int, *, whole: bool = False) -> Inputs:
    """The texts with edited prompts, the same edit for all responses of a prompt. ``whole``: edit all of the text."""
    rng, done = np.random.default_rng(seed), {}
    for place, prompt in zip(layout.prompt, layout.texts.prompts, strict=True):
        if place not in done:
            done[place] = edit(prompt, rng) if whole else edit_prompt(prompt, edit, rng)
    return layout.texts._replace(prompts=[done[place] for place in layout.prompt])


def robustness(
    layout: Layout,
    scores: Float[np.ndarray, " N"],
    scorer: BenchmarkedModel,
    *,
    seed: int,
    paraphrase: Edit | None = None,
) -> Mapping[str, Robustness | Refused]:
    """Every edit, and ``paraphrase`` (of a whole prompt) where the world has one."""
    altered = {name: edited(layout, edit, seed) for name, edit in EDITS.items()}
    if paraphrase is not None:
        altered["paraphrase"] = edited(layout, paraphrase, seed, whole=True)
    out: dict[str, Robustness | Refused] = {}
    for name, texts in altered.items():
        changed = scorer.attempt(texts)
        out[name] = changed if isinstance(changed, Refused) else compare_scores(layout, scores, changed)
    return out


def compare_scores(layout: Layout, before: Float[np.ndarray, " N"], after: Float[np.ndarray, " N"]) -> Robustness:
    """Scores of the same responses under the prompts as given and as edited."""
    old, new = layout.pairs.margins(before), layout.pairs.margins(after)
    flips = 0.5 * np.abs(np.sign(old) - np.sign(new))
    unit = within_prompt_sd(before, layout.prompt) or float("nan")
    return Robustness(float(flips.mean()), float(np.abs(after - before).mean()) / unit, float(correct(new).mean()))


def cell(report: BenchmarkReport) -> str:
    return worst({name: edit.flips for name, edit in report.robustness.items() if isinstance(edit, Robustness)})


def edit_cell(value: Robustness | Refused) -> Cell:
    if isinstance(value, Refused):
        return refused_cell(value)
    return Cell(f"{percent(value.flips)} %", f"shift {number(value.shift)} sd, accuracy {percent(value.accuracy)} %")


MEASURE = Measure(
    lambda run: {
        "robustness": robustness(
            run.layout, run.scores, run.scorer, seed=run.config.seed, paraphrase=run.suite.paraphrase
        )
    },
    texts=lambda suite, layout: (len(EDITS) + (suite.paraphrase is not None)) * len(layout.texts.responses),
    columns=(Column("worst flips", "%", "pairs turned around by the worst harmless edit of the prompt", cell),),
    title="Harmless edits of the prompt",
    text="Share of pairs whose order is reversed, and how far scores move. A model whose vocabulary lacks the edited "
    "words cannot be robust, and a rule may refuse.",
    rows=lambda report: {name: edit_cell(value) for name, value in report.robustness.items()},
)
