"""Measure one reward model on one suite: every measure, in order."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from reward_models.benchmark import measures
from reward_models.benchmark.layout import Inputs, lay_out
from reward_models.benchmark.measure import BenchmarkReport, Run, ScoredItem
from reward_models.benchmark.model import BenchmarkedModel
from reward_models.benchmark.report import find_flags
from reward_models.benchmark.suites import BenchmarkConfig, Suite, load_suite
from reward_models.preferences import Ranking
from reward_models.scorers.transformer import TransformerRewardModel
from textenv.protocols import RewardModel
from textenv.training.memory import peak_memory_mb


def run_benchmark(
    model: RewardModel | str,
    data: Suite | Sequence[Mapping[str, Any]] | str | Path = "embedded",
    config: BenchmarkConfig | None = None,
    *,
    name: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> BenchmarkReport:
    """Everything that the benchmark knows of a reward model.

    Args:
        model: a callable ``(prompts, completions, **columns) -> list[float]``, a registered name,
            ``module:callable``, or the folder or hub id of a sequence classifier.
        data: ``embedded``, ``embedded-validation``, ``micro``, a JSONL file, records, or a suite already loaded.
        config: what to measure, and how finely.
        name: what to call the model in the report.
        on_progress: told how many texts are scored, and of how many.

    Raises:
        ValueError: a name or a record is malformed, or a score is not finite.
    """
    config = config or BenchmarkConfig()
    suite = load_suite(data, config)
    layout = lay_out(suite.items)
    if not len(layout.pairs.item):
        raise ValueError(f"a benchmark needs a pair that is not a tie, got only ties in {suite.name!r}. Add pairs.")
    expected = len(layout.texts.responses) + sum(measure.texts(suite, layout) for measure in measures.MEASURES)
    scorer = BenchmarkedModel(model, name, expected, on_progress)
    memory = peak_memory_mb()
    truncated = _truncated_prompts(scorer.model, layout.texts)
    scores = scorer(layout.texts)
    grown = None if memory is None else (peak_memory_mb() or memory) - memory
    run = Run(config, suite, layout, scorer, scores, grown)
    report = BenchmarkReport(
        model=scorer.name,
        data=suite.name,
        seed=config.seed,
        items=len(suite.items),
        prompts=int(layout.prompt.max()) + 1,
        pairs=len(layout.pairs.item),
        ties=len(layout.ties.item),
        skipped=suite.skipped,
        truncated_prompts=truncated,
        figures={name: found for measure in measures.MEASURES for name, found in measure.compute(run).items()},
        flags=(),
        scored=[_scored(item, scores[rows]) for item, rows in zip(suite.items, layout.rows, strict=True)],
    )
    scorer.finish()
    return report._replace(flags=find_flags(report))


def _truncated_prompts(model: Any, texts: Inputs) -> int | None:
    """Distinct prompts that a transformer reads without their left part; None of any other model. All texts at once,
    since a prompt may stand in several calls."""
    if not isinstance(model, TransformerRewardModel):
        return None
    before = model.truncated_prompts
    model.encode(texts.prompts, texts.responses, texts.columns.get("chat"))
    return model.truncated_prompts - before


def _scored(item: Ranking, scores: Float[np.ndarray, " K"]) -> ScoredItem:
    return ScoredItem(item.prompt, item.responses, item.levels, item.category, item.group, tuple(scores.tolist()))
