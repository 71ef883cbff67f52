"""Battles between models: win rates and Bradley–Terry ratings, judged by people or by a reward model."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import choix
import numpy as np

from reward_models.feedback.order import item_scores
from reward_models.feedback.project import Annotation, Item
from textenv.pages.numbers import number, percent
from textenv.protocols import RewardModel
from textenv.stats import mcnemar, wilson

RESAMPLES = 500
SHRINKAGE = 0.01
"""Weight of a Gaussian prior on the strengths, which keeps them finite where a model wins every battle."""
ELO = 400 / math.log(10)
"""Points for a factor e in the odds of winning."""


class Battle(NamedTuple):
    """Two responses to a prompt, compared."""

    prompt: str
    first: str
    """The models."""
    second: str
    score: float
    """1: the first won; 0: the second; ½: equal, or people were divided."""


class Match(NamedTuple):
    """Two models against each other."""

    first: str
    second: str
    wins: int
    ties: int
    losses: int
    win_rate: float
    """Of the first; ties are half a win."""
    ci95: tuple[float, float]
    """Wilson's interval."""
    sign_test: float
    """Two-sided exact p-value of wins against losses; ties are left out."""


class Rating(NamedTuple):
    """Strength of a model on the Elo scale: 1,000 is the mean, 400 more are ten times the odds of winning."""

    model: str
    rating: float
    ci95: tuple[float, float]
    """Bootstrap over prompts; NaN for a single prompt."""
    battles: int


def battles_of(items: Sequence[Item], annotations: Sequence[Annotation]) -> list[Battle]:
    """A battle per item: what most of its annotators found. Equal texts are a tie that needs no annotator."""
    scores: dict[int, list[float]] = {}
    for annotation in annotations:
        if annotation.action == "rank":
            best = annotation.ranking[0]
            scores.setdefault(annotation.item, []).append(0.5 if len(best) == 2 else float(best[0] == 0))
    battles = []
    for item in items:
        first, second = item.responses
        found = scores.get(item.id, [0.5] if first.text == second.text else [])
        if found:
            score = 0.5 * (1 + np.sign(np.mean(found) - 0.5))
            battles.append(Battle(repr(item.prompt), first.model, second.model, float(score)))
    return battles


def judged(items: Sequence[Item], judge: RewardModel) -> list[Battle]:
    """The same with a reward model in the place of people: the higher score wins."""
    return [
        Battle(repr(item.prompt), item.responses[0].model, item.responses[1].model, float(0.5 * (1 + np.sign(a - b))))
        for item, (a, b) in zip(items, item_scores(items, judge), strict=True)
    ]


def matches(battles: Sequence[Battle]) -> list[Match]:
    """Each two models that met."""
    found = []
    for first, second in combinations(_models(battles), 2):
        scores = [
            b.score if b.first == first else 1 - b.score for b in battles if {b.first, b.second} == {first, second}
        ]
        if scores:
            wins, losses, total = scores.count(1.0), scores.count(0.0), sum(scores)
            interval = wilson(total, len(scores))
            ties = len(scores) - wins - losses
            rate = total / len(scores)
            found.append(Match(first, second, wins, ties, losses, rate, interval, mcnemar(wins, losses)))
    return found


def ratings(battles: Sequence[Battle], *, resamples: int = RESAMPLES, seed: int = 0) -> list[Rating]:
    """Bradley–Terry ratings, the strongest first. A tie is half a win for either side."""
    if not battles:
        return []
    models = _models(battles)
    value = _strengths(battles, models)
    by_prompt: dict[str, list[Battle]] = {}
    for battle in battles:
        by_prompt.setdefault(battle.prompt, []).append(battle)
    groups, rng = list(by_prompt.values()), np.random.default_rng(seed)
    low = high = np.full(len(models), math.nan)
    if len(groups) > 1:
        drawn = [
            _strengths([battle for i in rng.integers(len(groups), size=len(groups)) for battle in groups[i]], models)
            for _ in range(resamples)
        ]
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    counts = [sum(model in (battle.first, battle.second) for battle in battles) for model in models]
    rated = [Rating(*row) for row in zip(models, value, zip(low.tolist(), high.tolist()), counts, strict=True)]
    return sorted(rated, key=lambda rating: -rating.rating)


def match_row(match: Match) -> tuple[str, ...]:
    """A match as cells of a table: models, wins, ties, losses, win rate, its interval, p."""
    counts = map(str, (match.wins, match.ties, match.losses))
    interval = " … ".join(percent(end) for end in match.ci95)
    return (f"{match.first} : {match.second}", *counts, percent(match.win_rate), interval, f"{match.sign_test:.2g}")


def rating_row(rating: Rating) -> tuple[str, ...]:
    """A rating as cells of a table: model, rating, its interval, battles."""
    interval = " … ".join(number(end, 0) for end in rating.ci95)
    return rating.model, number(rating.rating, 0), interval, str(rating.battles)


def _models(battles: Sequence[Battle]) -> list[str]:
    return list(dict.fromkeys(model for battle in battles for model in (battle.first, battle.second)))


def _strengths(battles: Sequence[Battle], models: Sequence[str]) -> list[float]:
    outcomes = [(models.index(battle.first), models.index(battle.second), battle.score) for battle in battles]
    return [1000 + ELO * strength for strength in bradley_terry(len(models), outcomes)]


def bradley_terry(count: int, outcomes: Sequence[tuple[int, int, float]]) -> list[float]:
    """Strengths in log-odds, with mean 0, from ``(first, second, score of the first)``; see :data:`SHRINKAGE`."""
    wins = np.zeros((count, count))
    for first, second, score in outcomes:
        wins[first, second] += score
        wins[second, first] += 1 - score
    pairs = [(a, b) for a in range(count) for b in range(count) for _ in range(round(2 * wins[a, b]))]
    strengths = choix.opt_pairwise(count, pairs, alpha=SHRINKAGE)
    return (strengths - np.mean(strengths)).tolist()
