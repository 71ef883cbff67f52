"""The page of an evaluation: a table, and the same prompts answered by each model, token by token."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from agents.comparison.tokens import TokenFigures
from agents.experiments.page import COLOURS
from textenv.evaluation import Evaluation
from textenv.pages import write_page
from textenv.pages.numbers import Cell, number, percent
from textenv.stats import Mean

ROWS = {
    "reward": "Reward: score − β KL ↑",
    "gain": "Reward beyond the first model's ↑",
    "gold_score": "Gold score ↑",
    "rm_score": "Reward-model score ↑",
    "kl": "KL from the reference, nats",
    "response_tokens": "Tokens of an answer",
    "eos_rate": "Answers that end by themselves, %",
    "share_of_the_way": "Of the way to the optimum, %",
}
FIGURES = {"kl": ("KL", "nats"), "values": ("value", "reward"), "advantages": ("advantage", "reward")}
"""Figures of a token, as :class:`TokenFigures` names them: what they are called, and their unit."""
ORANGE, BLUE = "230, 159, 0", "0, 114, 178"


class Answers(NamedTuple):
    """One model on the page."""

    name: str
    figures: Mapping[str, Any]
    """Of its whole evaluation, by the keys of ``ROWS``."""
    evaluation: Evaluation
    tokens: list[TokenFigures]
    """Of the answers that are shown."""


def write_evaluation(path: Path, models: Sequence[Answers], shown: Sequence[int], facts: Sequence[str]) -> None:
    """Write the page of some models that answered the same prompts, whole or not at all.

    ``shown``: the rows of the evaluations whose answers appear, in the order of each model's ``tokens``.
    """
    scales = {name: scale(_all(models, name)) for name in FIGURES}
    write_page(
        path,
        Path(__file__).with_name("page.html.j2"),
        facts=facts,
        colours=list(np.resize(COLOURS, len(models))),
        heads=[Cell(model.name) for model in models],
        rows=[
            (Cell(title), [figure_cell(key, model.figures.get(key)) for model in models])
            for key, title in ROWS.items()
            if any(key in model.figures for model in models)
        ],
        missing=list(missing(models)),
        scales=[(*FIGURES[name], number(most)) for name, most in scales.items() if _all(models, name)],
        prompts=[
            (models[0].evaluation.prompts[row], [answer(model, row, place, scales) for model in models])
            for place, row in enumerate(shown)
        ],
    )


def missing(models: Sequence[Answers]) -> Iterable[str]:
    """What the page cannot show, and why."""
    for model in models:
        if model.evaluation.kl is None:
            yield f"{model.name}: its KL is unknown, so its answers have none, and the reward is without it"
        if model.tokens and model.tokens[0].values is None:
            yield f"{model.name}: no value and advantage, which only checkpoints of PPO and REINFORCE have"


def figure_cell(key: str, value: Any) -> Cell:
    """A mean with its interval, a share in percent, or a dash."""
    if isinstance(value, Mean):
        return Cell(number(value.mean, 3), "" if np.isnan(value.ci95) else f"±{number(value.ci95, 3)}")
    return Cell(percent(value))


def answer(model: Answers, row: int, place: int, scales: Mapping[str, float]) -> dict[str, Any]:
    """One answer: its text, what it earned, and its tokens with a shaded figure below each other."""
    found, tokens = model.evaluation, model.tokens[place]
    columns = {name: column for name in FIGURES if (column := getattr(tokens, name)) is not None}
    earned = {"score": found.rm_scores, "gold": found.gold, "KL": found.kl, "reward": found.rewards}
    return {
        "text": found.responses[row],
        "earned": [(name, number(values[row])) for name, values in earned.items() if values is not None],
        "ending": found.finish_reasons[row],
        "labels": [FIGURES[name][0] for name in columns],
        "tokens": [
            (piece, [(number(column[t]), shade(column[t], scales[name])) for name, column in columns.items()])
            for t, piece in enumerate(tokens.pieces)
        ],
    }


def scale(figures: Sequence[float]) -> float:
    """The size at which a shade is full: that of one figure in twenty of the page, so that outliers hide no others."""
    return float(np.quantile(np.abs(figures), 0.95)) if figures else 0.0


def shade(figure: float, most: float) -> str:
    """A CSS colour: orange above 0, blue below, the fuller the nearer to ``most``."""
    share = min(1.0, abs(figure) / most) if most > 0 else 0.0
    return f"rgba({ORANGE if figure > 0 else BLUE}, {0.55 * share:.2f})"


def _all(models: Sequence[Answers], name: str) -> list[float]:
    return [figure for model in models for tokens in model.tokens for figure in getattr(tokens, name) or ()]
