"""How near to the Bayes limit does a reward model come, and how many comparisons does that take?

The embedded world knows the probability of every label: accuracy cannot pass ``mean max(p, 1 − p)`` nor NLL fall below
``mean H(p)``. A reward model on the trunk of ``assistant-sft`` is trained on pairs of answers to fresh training prompts
(200 … 20,000 comparisons, each one pair and one label), then on eight answers to 30,000 prompts, each set ranked by
five annotators (3.3 million comparisons), and measured on test prompts, whose verb-object pairs or phrasings were never
trained on. 24 more models see 6,000 comparisons with shuffled labels: they must be right half of the time. A model that
learned nothing still prefers some texts; so the standard error of their accuracy is taken over models, not prompts.

Training stops by the NLL of rankings on validation prompts; settings were chosen on validation prompts as well.

Command: ``python -m benchmarks.bayes_gap`` (about three hours on one core; finished cells are not run again;
``--only`` names trainings to run without writing the result).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from transformers.utils import logging as hf_logging

import textenv
from benchmarks.record import write_result
from reward_models.benchmark.layout import lay_out
from reward_models.benchmark.suites import BenchmarkConfig, load_suite, sample_pool
from reward_models.preferences import Ranking
from reward_models.scorers.transformer import TransformerRewardModel
from reward_models.training.start import start_reward_model
from reward_models.training.trainer import RewardConfig, train_reward_model
from textenv.data.records import write_json
from textenv.stats import bayes_limits, bootstrap_interval, calibration_slope, correct, mean_ci95, nll, standard_error
from textenv.tasks import assistant

PAIRS = (200, 600, 2_000, 6_000, 20_000)
AMPLE, RESPONSES, LABELS = 30_000, 8, 5
"""Prompts, answers to each, and annotators who rank them: one pass over five labels a set in place of five passes over
one, whose noise would be memorised."""
COIN, COIN_SEEDS = "shuffled-6000", range(1, 25)
ANNOTATORS = 16
VALIDATION = "eval_nll_per_ranking"
"""Labels of each test pair: the texts stay the same, the noise of labels averages out."""


def settings(responses: int, count: int, seed: int) -> RewardConfig:
    """As many passes as a small data set can use; the best one is kept."""
    common: dict[str, Any] = {"learning_rate": 1e-3, "adam_beta2": 0.99, "loss": "listwise"}
    common |= {"normalize": False, "seed": seed}
    if responses > 2:
        return RewardConfig(
            **common, epochs=1, batch_size=8, lr_schedule="cosine", eval_steps=2_500, early_stopping_patience=8
        )
    epochs = 6 if count > 2_000 else 20
    return RewardConfig(**common, epochs=epochs, batch_size=32, early_stopping_patience=3)


def rankings(split: str, count: int, responses: int, seed: int, labels: int = 1) -> list[Ranking]:
    """Answers of the SFT model to ``count`` prompts of a split, each set ranked by ``labels`` annotators; equal answers
    are merged, and prompts whose answers are all equal are replaced by others."""
    rng = np.random.default_rng([seed, count, responses])
    prompts = [prompt.text for prompt in assistant.sample_prompts(split, round(1.15 * count) + 20, rng)]  # type: ignore
    lm = textenv.language_model("assistant-sft")
    drawn = int(rng.integers(2**31))
    pool = sample_pool(
        lm, prompts, assistant.gold_scores, count=responses, max_new_tokens=assistant.MAX_NEW_TOKENS, seed=drawn
    )
    out = []
    for x, prompt in enumerate(prompts):
        gold = dict(zip(pool.texts.responses[x * responses : (x + 1) * responses], pool.gold[x], strict=True))
        if len(gold) > 1 and len(out) < count * labels:
            for _ in range(labels):
                order = assistant.rank(list(gold.values()), rng)
                out.append(Ranking(prompt, tuple(list(gold)[i] for i in order)))
    assert len(out) == count * labels
    return out


def shuffled(records: list[Ranking], seed: int) -> list[Ranking]:
    """Labels replaced by coin flips."""
    flips = np.random.default_rng(seed).random(len(records)) < 0.5
    return [
        record._replace(responses=record.responses[:: -1 if flip else 1])
        for record, flip in zip(records, flips, strict=True)
    ]


def measure(model: TransformerRewardModel, items: list[Ranking]) -> dict[str, Any]:
    """Accuracy, NLL and calibration beside the limits, with standard errors clustered by prompt."""
    layout = lay_out(items)
    scores = np.asarray(model(layout.texts.prompts, layout.texts.responses))
    pairs = layout.pairs
    margins = pairs.margins(scores) * model.score_unit
    assert layout.gold is not None
    best, floor = bayes_limits(pairs.margins(layout.gold), assistant.ANNOTATOR_TEMPERATURE)
    losses = nll(margins)
    slope = calibration_slope(margins, pairs.cluster).value
    gap = best - correct(margins)
    return {
        "accuracy": float(correct(margins).mean()),
        "accuracy_se": standard_error(correct(margins), pairs.cluster),
        "accuracy_ci95": bootstrap_interval(correct(margins), pairs.cluster, resamples=2_000, seed=0),
        "bayes_accuracy": float(best.mean()),
        "gap": float(gap.mean()),
        "gap_se": standard_error(gap, pairs.cluster),
        "nll": float(losses.mean()),
        "nll_floor": float(floor.mean()),
        "nll_ratio": float(losses.mean() / floor.mean()),
        "calibration_slope": slope if np.isfinite(slope) else None,
        "test_pairs": len(margins),
    }


def cell(name: str, seed: int) -> dict[str, Any]:
    """Train and measure one model: ``pairs-<n>``, ``rankings`` or ``shuffled``."""
    ample = AMPLE, RESPONSES, LABELS
    count, responses, labels = ample if name == "rankings" else (int(name.split("-")[1]), 2, 1)
    records = rankings("train", count, responses, seed, labels)
    validation = rankings("validation", 500, 4, 1_000 + seed)
    if name.startswith("shuffled"):  # early stopping too: choosing a step by true labels would learn from them
        records, validation = shuffled(records, seed), shuffled(validation, 1_000 + seed)
    start = start_reward_model("assistant-sft")
    result = train_reward_model(start, records, settings(responses, count, seed), eval_rankings=validation)
    suite = load_suite("embedded", BenchmarkConfig(annotators=ANNOTATORS, pool=8, seed=seed))
    compared = sum(len(record.responses) * (len(record.responses) - 1) // 2 for record in records)
    return {
        "training": name,
        "seed": seed,
        "prompts": len({record.prompt for record in records}),
        "comparisons": compared,
        "steps": result.metrics["steps"],
        "seconds": result.metrics["seconds"],
        "validation_nll": [entry[VALIDATION] for entry in result.history if VALIDATION in entry],
        **measure(result.model, list(suite.items)),
    }


def demands(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Requirements for a model with ample comparisons, and for one with shuffled labels."""
    ample = [row for row in rows if row["training"] == "rankings"]
    coin = np.array([row["accuracy"] for row in rows if row["training"] == COIN])
    return {
        "accuracy within 0.03 of the Bayes limit": all(row["gap"] <= 0.03 for row in ample),
        "no accuracy above the limit + 3 SE": all(row["gap"] >= -3 * row["gap_se"] for row in rows),
        "NLL within 8 % of its floor": all(row["nll_ratio"] <= 1.08 for row in ample),
        "calibration slope in 0.85 … 1.15": all(0.85 <= row["calibration_slope"] <= 1.15 for row in ample),
        "shuffled labels: accuracy 0.50 ± 3 SE": bool(abs(coin.mean() - 0.5) <= 3 * standard_error(coin)),
    }


def main(seeds: tuple[int, ...] = (1, 2, 3), output: Path = Path("runs/bayes-gap"), only: tuple[str, ...] = ()) -> None:
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    names = ["rankings", *(f"pairs-{count}" for count in PAIRS)]
    plan = [(name, seed) for seed in seeds for name in only or names]
    if not only:
        plan += [(COIN, seed) for seed in COIN_SEEDS]
    rows = []
    for name, seed in plan:
        path = output / f"{name}-{seed}.json"
        if not path.is_file():
            write_json(path, cell(name, seed))
        rows.append(json.loads(path.read_text("utf-8")))
        shown = ("gap", "gap_se", "nll_ratio", "calibration_slope", "accuracy", "seconds")
        print(name, seed, {key: round(rows[-1][key], 4) for key in shown if rows[-1][key] is not None}, flush=True)
    if only:
        return
    curve = []
    for name in [*names, COIN]:
        same = [row for row in rows if row["training"] == name]
        keys = ("comparisons", "accuracy", "bayes_accuracy", "gap", "nll", "nll_ratio", "calibration_slope")
        figures = {key: mean_ci95([row[key] for row in same])._asdict() for key in keys}
        curve.append({"training": name, "seeds": len(same), **figures})
    checks = demands(rows)
    print(write_result("bayes_gap", {"curve": curve, "demands": checks, "cells": rows}))
    print("failed:", [name for name, good in checks.items() if not good] or "nothing")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
