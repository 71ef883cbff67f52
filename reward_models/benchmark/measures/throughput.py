"""How fast a reward model scores."""

import statistics
import time
from typing import Any, NamedTuple

import numpy as np

from reward_models.benchmark.layout import Inputs
from reward_models.benchmark.measure import BenchmarkReport, Column, Measure
from reward_models.benchmark.model import BenchmarkedModel
from textenv.pages.numbers import Cell, number

TIMED = 512
"""Texts that are timed."""
REPEATS = 3


class Throughput(NamedTuple):
    """Measured on this machine, the model's own batching and tokenising included."""

    texts_per_second: float
    tokens_per_second: float
    """Real tokens: padding does not count."""
    token_unit: str
    """``tokens`` of the model's tokenizer, or ``words`` where it has none."""
    peak_memory_growth_mb: float | None
    """By how much scoring raised the highest resident memory that this process has had, in MB (10⁶ bytes): 0 if
    something earlier needed more. None where the system does not tell."""


def throughput(
    texts: Inputs,
    scorer: BenchmarkedModel,
    *,
    memory_growth: float | None,
    seed: int,
    limit: int = TIMED,
    repeats: int = REPEATS,
) -> Throughput:
    """Median of ``repeats`` passes over up to ``limit`` texts. ``memory_growth``: measured over the first scoring."""
    count = min(limit, len(texts.responses))
    texts = texts.select(np.sort(np.random.default_rng(seed).permutation(len(texts.responses))[:count]))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        scorer(texts, chunk=count)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    tokens, unit = count_tokens(texts, scorer.model)
    return Throughput(count / median, tokens / median, unit, memory_growth)


def count_tokens(texts: Inputs, model: Any) -> tuple[int, str]:
    """Tokens that the model reads of these texts; words without ``encode``."""
    encode = getattr(model, "encode", None)
    if callable(encode):
        encoded: Any = encode(texts.prompts, texts.responses)
        return int(encoded.lengths.sum()), "tokens"
    pairs = zip(texts.prompts, texts.responses, strict=True)
    return sum(len(f"{_plain(prompt)} {response}".split()) for prompt, response in pairs), "words"


def _plain(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else " ".join(str(message.get("content", "")) for message in prompt)


def cell(report: BenchmarkReport) -> str:
    speed = f"{report.throughput.tokens_per_second / 1000:,.0f}".replace(",", " ")
    return speed if report.throughput.token_unit == "tokens" else f"{speed} words"


MEASURE = Measure(
    lambda run: {
        "throughput": throughput(run.layout.texts, run.scorer, memory_growth=run.memory_growth, seed=run.config.seed)
    },
    texts=lambda suite, layout: REPEATS * min(len(layout.texts.responses), TIMED),
    columns=(
        Column("tokens/s", "1,000", "thousands of real tokens scored a second (words where there are no tokens)", cell),
    ),
    title="Speed and memory",
    text="On this machine, tokenising included, padding not counted. Memory: by how much the first scoring raised the "
    "highest resident memory of the process; 0 if loading needed more.",
    rows=lambda report: {
        "texts a second": f"{report.throughput.texts_per_second:,.0f}",
        "real tokens a second": Cell(f"{report.throughput.tokens_per_second:,.0f}", report.throughput.token_unit),
        "growth of peak memory, MB": number(report.throughput.peak_memory_growth_mb, 1),
    },
)
