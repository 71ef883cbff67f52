"""Responses read without their prompt: what is answered from the response alone."""

from collections.abc import Iterator, Mapping

import numpy as np

from reward_models.benchmark.layout import FINISH, Inputs, Layout, Pairs
from reward_models.benchmark.measure import BenchmarkReport, Column, Measure, rate_cell
from reward_models.benchmark.model import BenchmarkedModel, Refused
from textenv.pages.numbers import UNKNOWN, Cell, percent
from textenv.stats import Rate, correct, rate


def response_only(layout: Layout, scorer: BenchmarkedModel, **interval: int) -> Mapping[str, Rate | Refused | None]:
    """Accuracy without the prompt: ``blank`` (its text gone), ``swapped`` (that of another item, with its columns).

    What is left of the accuracy is answered without reading the prompt. ``swapped`` is None with a single prompt.
    """
    altered = {"blank": blanked(layout.texts), "swapped": swapped(layout, interval["seed"])}
    return {name: accuracy(layout.pairs, texts, scorer, **interval) for name, texts in altered.items()}


def accuracy(pairs: Pairs, texts: Inputs | None, scorer: BenchmarkedModel, **interval: int) -> Rate | Refused | None:
    """Accuracy on altered texts."""
    scores = None if texts is None else scorer.attempt(texts)
    if not isinstance(scores, np.ndarray):
        return scores
    return rate(correct(pairs.margins(scores)), pairs.cluster, **interval)


def blanked(texts: Inputs) -> Inputs:
    """The same texts with empty prompts; of a chat, the last message is left, empty."""
    blank = ["" if isinstance(prompt, str) else [{**prompt[-1], "content": ""}] for prompt in texts.prompts]
    return texts._replace(prompts=blank)


def swapped(layout: Layout, seed: int) -> Inputs | None:
    """Every prompt, with its columns, replaced by another one, the same for all of its responses."""
    _, donors, prompt = np.unique(layout.prompt, return_index=True, return_inverse=True)
    if len(donors) < 2:
        return None
    order = np.random.default_rng(seed).permutation(len(donors))
    following = np.empty_like(order)
    following[order] = np.roll(order, -1)  # one cycle through all prompts: none stays
    source = layout.texts.select(donors[following[prompt]])
    kept = {FINISH: layout.texts.columns[FINISH]}
    return Inputs(source.prompts, layout.texts.responses, source.columns | kept)


def cell(report: BenchmarkReport) -> str:
    swapped = report.response_only["swapped"]
    return percent(swapped.value) if isinstance(swapped, Rate) else UNKNOWN


def flags(report: BenchmarkReport) -> Iterator[str]:
    if report.truncated_prompts:
        cut = f"{report.truncated_prompts} of {report.prompts} prompts"
        yield f"reads {cut} without their left part: they are longer than its context"
    swapped, (low, high) = report.response_only.get("swapped"), report.accuracy_per_pair.clustered
    if isinstance(swapped, Rate) and low > 0.5 and low <= swapped.value <= high:
        yield "as accurate with another prompt as with its own: it does not read the prompt"


def rows(report: BenchmarkReport) -> Mapping[str, Cell | str | None]:
    cut = report.truncated_prompts
    return {
        "own prompt, %": rate_cell(report.accuracy_per_pair),
        "another prompt, %": rate_cell(report.response_only["swapped"]),
        "empty prompt, %": rate_cell(report.response_only["blank"]),
        "prompts cut on the left": None if cut is None else f"{cut:,} of {report.prompts:,}",
    }


MEASURE = Measure(
    lambda run: {"response_only": response_only(run.layout, run.scorer, **run.interval)},
    texts=lambda suite, layout: 2 * len(layout.texts.responses),
    columns=(
        Column("other prompt", "%", "accuracy with every prompt swapped: what is answered without reading it", cell),
    ),
    flags=flags,
    title="Does it read the prompt?",
    text="Accuracy with the prompt removed, or replaced by another one. What is left is answered from the response "
    "alone. A prompt that does not fit the model's context is cut on the left, and a response that does not fit by "
    "itself at its end.",
    rows=rows,
)
