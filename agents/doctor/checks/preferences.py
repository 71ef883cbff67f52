"""Preferences: what their labels say besides what they are meant to say."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import stats

from agents.doctor.checks.texts import TEXT_CHECKS
from agents.doctor.data import DUPLICATES_WHY, LEAKAGE_REMEDY, LEAKAGE_WHY, Preferences, duplicates, leakage
from agents.doctor.finding import Check, Seen
from reward_models.preferences import better_pairs, prompt_key, ranking_of
from reward_models.preferences.layouts import layout_of
from textenv.conformance.subject import Skipped
from textenv.data.records import structure
from textenv.stats import correct, wilson
from textenv.training.batches import encode_answers

NOISY = 0.4
"""Disagreement of two labels of one pair; people's is 0.25 to 0.37, a coin's 0.5."""
LONG = 0.6
"""Accuracy of the rule "longer is better" from which it is a warning."""
IMPLAUSIBLE = 1e-4
PLACED = ("ranking", "scored", "helpsteer3", "shp", "pku-saferlhf", "summarize-from-feedback", "arena")
"""Layouts that keep the order in which responses were shown."""


def readable(part: Preferences) -> Iterator[Seen]:
    """Every record can be read, and has responses that differ."""
    equal = [reason for reason in part.malformed if "two that differ" in reason]
    other = [reason for reason in part.malformed if reason not in equal]
    total = len(part.rankings) + len(part.malformed)
    if equal:
        yield Seen("warning", f"{len(equal)} of {total} records have equal responses. {equal[0][:120]}")
    if other:
        yield Seen("error", f"{len(other)} of {total} records cannot be read. {other[0][:200]}")


def margins(part: Preferences) -> Iterator[Seen]:
    """No margin contradicts its label."""
    found = [ranking.margin for ranking in part.rankings if ranking.margin < 0]
    if found:
        yield Seen("error", f"{len(found)} of {len(part.rankings)} margins are below 0, the least {min(found):g}")


def context(part: Preferences) -> Iterator[Seen]:
    """Prompt and responses fit the model's context."""
    rankings, limit = part.written(part.rankings), part.model.max_tokens
    if limit is None:
        raise Skipped("the model sets no limit")
    texts = [(ranking.prompt, response) for ranking in rankings for response in ranking.responses]
    tokens = encode_answers(part.model.tokenizer, *(list(side) for side in zip(*texts, strict=True)))
    lengths = [(len(prompt), len(response) + 1) for prompt, response in zip(*tokens, strict=True)]  # with its ending
    ends = sum(response >= limit for _, response in lengths)
    starts = sum(prompt + response > limit > response for prompt, response in lengths)
    if starts or ends:
        what = f"of {len(lengths)} responses, {ends} lose their end, and {starts} the beginning of their prompt"
        yield Seen("warning", f"{what}, to fit {limit} tokens")


def label_noise(part: Preferences) -> Iterator[Seen]:
    """A pair that is labelled twice is labelled the same way."""
    labels: dict[tuple[str, frozenset[str]], Counter[str]] = {}
    for ranking in part.rankings:
        for a, b in better_pairs(ranking.responses, ranking.levels):
            better, worse = ranking.responses[a], ranking.responses[b]
            labels.setdefault((prompt_key(ranking.prompt), frozenset((better, worse))), Counter())[better] += 1
    counts = [sorted(votes.values()) for votes in labels.values() if votes.total() > 1]
    if not counts:
        raise Skipped("no pair is labelled twice")
    against = sum(math.prod(votes) for votes in counts if len(votes) == 2)
    comparisons = sum(math.comb(sum(votes), 2) for votes in counts)
    if not against:
        return
    share = against / comparisons
    low, high = wilson(against, comparisons)
    noise = (1 - math.sqrt(max(0.0, 1 - 2 * share))) / 2
    what = (
        f"of {comparisons} times that two labels name one pair, they disagree in {share:.0%} ({low:.0%} to {high:.0%})"
    )
    level = "warning" if share > NOISY else "note"
    yield Seen(level, f"{what}: as if {noise:.0%} of the labels were flipped; no model can agree with those")


def length_bias(part: Preferences) -> Iterator[Seen]:
    """The preferred response is the longer one about as often as not."""
    excess = [
        len(ranking.responses[a]) - len(ranking.responses[b])
        for ranking in part.rankings
        for a, b in better_pairs(ranking.responses, ranking.levels)
    ]
    if not excess:
        raise Skipped("there are ties only")
    longer = correct(np.array(excess, dtype=np.float64))
    share = float(longer.mean())
    low, high = wilson(float(longer.sum()), len(longer))
    if low <= 0.5 <= high:
        return
    rule = "longer" if share > 0.5 else "shorter"
    what = f"the longer response is preferred in {share:.0%} of {len(longer)} pairs ({low:.0%} to {high:.0%})"
    level = "warning" if max(low, 1 - high) > LONG else "note"
    yield Seen(level, f"{what}: the rule “{rule} is better” alone reaches an accuracy of {max(share, 1 - share):.2f}")


def position_bias(part: Preferences) -> Iterator[Seen]:
    """The best response stands in every place equally often."""
    places = [place for record in part.raw if (place := _place(record)) is not None]
    if not places:
        raise Skipped("the layout does not keep the order in which responses were shown")
    first = sum(best == 0 for best, _ in places)
    chance = float(np.mean([1 / count for _, count in places]))
    if stats.binomtest(first, len(places), chance).pvalue < IMPLAUSIBLE:
        low, high = wilson(first, len(places))
        share = f"{first / len(places):.0%} of {len(places)} ({low:.0%} to {high:.0%})"
        yield Seen("warning", f"the best response is the first one in {share}, and would be in {chance:.0%} by chance")


def _place(record: dict[str, Any]) -> tuple[int, int] | None:
    """``(place of the best response, number of responses)`` as the loader ranks them; None for ties at the top, and for
    layouts that put the best one first."""
    try:
        layout, option = layout_of(record)
        if layout.name not in PLACED:
            return None
        ranking_of(record)
        fields = layout.read({key: structure(value) for key, value in record.items() if value is not None}, option)
    except ValueError:  # another check counts them
        return None
    best = fields["ranking"][0]
    best = best if isinstance(best, list) else [best]
    return (best[0], len(fields["responses"])) if len(best) == 1 else None


PREFERENCE_CHECKS = {
    "records": Check(
        readable,
        "Equal responses teach nothing and count as errors of every model; records that are left out change the data "
        "(OpenRLHF 1311: pairs that are equal once they are cut).",
        "Drop or correct these records; `--skip-malformed` leaves them out in training.",
    ),
    "margins": Check(
        margins,
        "Training reads a margin as the log-odds by which the better response should win: below 0, it asks for the "
        "worse one.",
        "Swap the responses and take the size of the margin, or leave it out.",
    ),
    **TEXT_CHECKS,
    "context": Check(
        context,
        "What is cut is not judged: the start of a prompt, often the instructions, or the end of a response with what "
        "people liked in it (OpenRLHF 1311; rlhf-book 503).",
        "Drop or shorten long records, or use a model with a longer context.",
    ),
    "label noise": Check(
        label_noise,
        "Labels that contradict each other set a ceiling: people agree in 63 to 77 % (Bai et al. 2022; Ouyang et al. "
        "2022), and accuracy beyond the ceiling is a leak.",
        "Judge accuracies against this ceiling; smooth the labels (label_smoothing), or label pairs several times.",
    ),
    "length bias": Check(
        length_bias,
        "A reward model learns the rule and the policy writes ever longer (Singhal et al. 2023; Dubois et al. 2024).",
        "Balance the pairs by length, subtract a length rule (weighted reward models), and watch lengths in training.",
    ),
    "position bias": Check(
        position_bias,
        "Judges favour a place (Zheng et al. 2023), and an order by quality gives the label away to whatever reads it.",
        "Shuffle the responses before they are shown, and store the order that was shown.",
    ),
    "duplicates": Check(duplicates, DUPLICATES_WHY, "Keep one of each, unless several people have labelled it."),
    "leakage": Check(leakage, LEAKAGE_WHY, LEAKAGE_REMEDY),
}
