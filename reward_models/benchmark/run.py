"""Measure one reward model on one suite: every part of the benchmark, in order."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from reward_models.benchmark.layout import FINISH, Inputs, Layout, lay_out
from reward_models.benchmark.measures.best_of_n import Point, exact_curve, sampled_curve
from reward_models.benchmark.measures.bias import length_bias, response_only, within_prompt_spearman
from reward_models.benchmark.measures.determinism import BATCHES, VARIED, determinism
from reward_models.benchmark.measures.probes import probes
from reward_models.benchmark.measures.robustness import EDITS, robustness
from reward_models.benchmark.measures.throughput import REPEATS, TIMED, peak_memory_mb, throughput
from reward_models.benchmark.model import BenchmarkedModel
from reward_models.benchmark.report import (
    BenchmarkReport,
    BestOfK,
    Calibration,
    Limits,
    Margins,
    ScoredItem,
    find_flags,
)
from reward_models.benchmark.suites import BenchmarkConfig, Suite, load_suite
from reward_models.preferences import Ranking, prompt_key
from reward_models.scorers.transformer import TransformerRewardModel
from textenv.protocols import RewardModel
from textenv.stats import (
    auc,
    bayes_limits,
    brier,
    calibration_slope,
    correct,
    ece,
    mean_ci95,
    nll,
    rate,
    reliability,
    spearman,
    standard_error,
    within_prompt_sd,
)

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


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
        raise ValueError(f"a benchmark needs at least one pair that is not a tie, got only ties in {suite.name!r}.")
    scorer = BenchmarkedModel(model, name, _texts_to_score(layout, suite), on_progress)
    memory = peak_memory_mb()
    truncated = _truncated_prompts(scorer.model, layout.texts)
    scores = scorer(layout.texts)
    grown = None if memory is None else (peak_memory_mb() or memory) - memory
    interval = {"resamples": config.resamples, "seed": config.seed}
    pairs, margins = layout.pairs, layout.pairs.margins(scores)
    right, sd = correct(margins), within_prompt_sd(scores, layout.prompt)
    accuracy = rate(right, pairs.cluster, **interval)
    assert accuracy is not None
    category = np.array([suite.items[i].category for i in pairs.item])
    by_category = {
        part: rate(right[category == part], pairs.cluster[category == part], **interval)
        for part in sorted(set(category.tolist()) - {""})
    }
    report = BenchmarkReport(
        model=scorer.name,
        data=suite.name,
        seed=config.seed,
        items=len(suite.items),
        prompts=int(layout.prompt.max()) + 1,
        pairs=len(pairs.item),
        ties=len(layout.ties.item),
        skipped=suite.skipped,
        truncated_prompts=truncated,
        accuracy_per_pair=accuracy,
        by_category={part: value for part, value in by_category.items() if value is not None},
        best_of_k=_best_of_k(suite.items, layout, scores, interval),
        tie_auc=_tie_auc(layout, scores),
        calibration=_calibration(margins, pairs.cluster, scorer.score_unit, config.bins),
        limits=_limits(layout, scores, suite.temperature),
        margins=_margins(suite.items, layout, margins, sd),
        length=length_bias(layout, scores, **interval),
        response_only=response_only(layout, scorer, **interval),
        robustness=robustness(layout, scores, scorer, seed=config.seed, paraphrase=suite.paraphrase),
        probes=probes(layout, scores, scorer, suite.praise),
        determinism=determinism(layout.texts, scorer, unit=sd, seed=config.seed),
        best_of_n=_curve(suite, scorer, config.pool),
        throughput=throughput(layout.texts, scorer, memory_growth=grown, seed=config.seed),
        flags=(),
        scored=[_scored(item, scores[rows]) for item, rows in zip(suite.items, layout.rows, strict=True)],
    )
    scorer.finish()
    return report._replace(flags=find_flags(report))


def _texts_to_score(layout: Layout, suite: Suite) -> int:
    """About how many texts the model will be asked for, if it refuses none."""
    texts, prompts = len(layout.texts.responses), int(layout.prompt.max()) + 1
    pool = 0 if suite.pool is None else suite.pool.gold.size
    strings = 0 if suite.world is None else suite.world.rewards.numel()
    altered = 2 + len(EDITS) + (suite.paraphrase is not None)
    again = (3 + len(BATCHES)) * min(texts, VARIED) + REPEATS * min(texts, TIMED)
    return texts * (1 + altered) + 5 * prompts + again + pool + strings


def _truncated_prompts(model: Any, texts: Inputs) -> int | None:
    """Distinct prompts that a transformer reads without their left part; None of any other model. All texts at once,
    since a prompt may stand in several calls."""
    if not isinstance(model, TransformerRewardModel):
        return None
    before = model.truncated_prompts
    model.encode(texts.prompts, texts.responses, texts.columns.get("chat"))
    return model.truncated_prompts - before


def _best_of_k(
    items: Sequence[Ranking], layout: Layout, scores: Float[np.ndarray, " N"], interval: dict[str, int]
) -> BestOfK:
    """Is the response of highest score one that was ranked best? Equal scores share the answer."""
    hits, chance, clusters = [], [], {}
    for item, rows in zip(items, layout.rows, strict=True):
        best = np.isin(rows, rows[np.array(item.levels) == 0])  # a copy of the best is as good, wherever it was ranked
        top = scores[rows] == scores[rows].max()
        hits.append(best[top].mean())
        chance.append(best.mean())
        clusters.setdefault(item.group, len(clusters))
    cluster = np.array([clusters[item.group] for item in items])
    accuracy = rate(np.array(hits), cluster, **interval)
    assert accuracy is not None
    return BestOfK(accuracy, float(np.mean(chance)), float(np.mean([len(item.responses) for item in items])))


def _tie_auc(layout: Layout, scores: Float[np.ndarray, " N"]) -> float | None:
    """P(|margin| of a pair that the labels call equal < |margin| of one that they do not); None without ties."""
    if not len(layout.ties.item):
        return None
    return auc(np.abs(layout.ties.margins(scores)), np.abs(layout.pairs.margins(scores)))


def _calibration(margins: np.ndarray, cluster: np.ndarray, declared: float | None, num_bins: int) -> Calibration:
    """Margins as log-odds: in the unit that the model declares, else in the one that fits best."""
    slope = calibration_slope(margins * (declared or 1.0), cluster)
    finite = math.isfinite(slope.value)
    fitted = max(slope.value, 0.0) if finite else 1.0
    unit = fitted if declared is None else declared
    odds = margins * unit
    bins = reliability(odds, cluster, num_bins)
    return Calibration(
        unit=unit,
        declared=declared is not None,
        nll_per_pair=(loss := mean_ci95(nll(odds), cluster)).mean,
        nll_per_pair_ci95=loss.ci95,
        nll_per_pair_rescaled=float(nll(odds if declared is None else fitted * odds).mean()) if finite else None,
        brier_per_pair=brier(odds),
        ece_per_pair=ece(bins),
        slope_per_pair=slope,
        bins=bins,
    )


def _limits(layout: Layout, scores: Float[np.ndarray, " N"], temperature: float | None) -> Limits | None:
    """How far from the best that any model could expect; None where the truth is not known."""
    if layout.gold is None or temperature is None:
        return None
    pairs = layout.pairs
    best, floor = bayes_limits(pairs.margins(layout.gold), temperature)
    gap = best - correct(pairs.margins(scores))
    return Limits(
        bayes_accuracy=float(best.mean()),
        nll_floor=float(floor.mean()),
        accuracy_gap=(distance := mean_ci95(gap, pairs.cluster)).mean,
        accuracy_gap_ci95=distance.ci95,
        accuracy_gap_se=standard_error(gap, pairs.cluster),
        gold_spearman=mean_ci95(within_prompt_spearman(scores, layout.gold, layout.prompt)).mean,
    )


def _margins(items: Sequence[Ranking], layout: Layout, margins: Float[np.ndarray, " M"], sd: float) -> Margins:
    """Signed margins, and whether they follow the strengths that the records declare."""
    unit = sd if sd > 0 else math.nan
    declared = np.array([items[i].margin for i in layout.pairs.item])
    quantiles = {f"{100 * q:.0f} %": float(np.quantile(margins / unit, q)) for q in QUANTILES}
    return Margins(
        within_prompt_sd=sd,
        quantiles=quantiles,
        score_ties=float(np.mean(margins == 0)),
        declared_spearman=spearman(margins, np.abs(declared)) if declared.any() else None,
    )


def _curve(suite: Suite, scorer: BenchmarkedModel, most: int) -> list[Point] | None:
    """Gold of best-of-n for n = 1, 2, 4, … (``most`` at most, or what was sampled); None where gold is not known."""
    most = most if suite.pool is None else suite.pool.gold.shape[1]
    sizes = [2**k for k in range(most.bit_length())]
    if suite.world is not None:
        world = suite.world
        strings = len(world.texts)
        asked = Inputs(
            [prompt for prompt in world.prompts for _ in range(strings)],
            world.texts * len(world.prompts),
            {FINISH: ["eos"] * (strings * len(world.prompts))},
        )
        return exact_curve(world, scorer(asked).reshape(len(world.prompts), strings), sizes)
    if suite.pool is None:
        return None
    asked, gold = suite.pool.texts, suite.pool.gold
    _, prompt = np.unique([prompt_key(asked.prompts[x * gold.shape[1]]) for x in range(len(gold))], return_inverse=True)
    return sampled_curve(scorer(asked).reshape(gold.shape), gold, sizes, prompt)


def _scored(item: Ranking, scores: Float[np.ndarray, " K"]) -> ScoredItem:
    return ScoredItem(item.prompt, item.responses, item.levels, item.category, item.group, tuple(scores.tolist()))
