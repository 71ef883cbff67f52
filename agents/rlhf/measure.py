"""Measures the stages of a run: replies to held-out prompts, scored, judged, and prepared for the report."""

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import textenv
from agents.core.agent import LanguageModelAgent
from agents.experiments.bounds import bounds_of
from agents.rlhf.data import read_rankings
from reward_models.evaluation import measure_scores
from reward_models.scorers.transformer import load_reward_model
from textenv.data.records import write_json
from textenv.evaluation import Evaluation, evaluate
from textenv.stats import Mean, mean_ci95
from textenv.vector import TextVectorEnv

SHOWN = 6
"""Prompts whose replies the report shows."""
ALIKE = 2 / 3
"""PPO's distinct-2 as a share of SFT's below which the report warns."""


def evaluate_stages(folder: Path, env: TextVectorEnv, config: Any, advance: Any) -> dict[str, Any]:
    """Answer every prompt of ``env`` with every stage and measure the replies; write the report's data.

    Returns the summary (:mod:`agents.demo.report`), the judge's score in standard deviations of SFT's.
    """
    models = {"base": config.model, "sft": str(folder / "sft"), "ppo": str(folder / "ppo" / "policy")}
    stages: dict[str, list[Evaluation]] = {}
    for part, (name, model) in enumerate(models.items()):
        agent = LanguageModelAgent(textenv.language_model(model), env.task, seed=config.seed + 30 + part)
        stages[name] = []
        for k in range(config.eval_samples):
            stages[name].append(evaluate(agent, env))
            advance(part * config.eval_samples + k + 1, len(models) * config.eval_samples, {})
    unit = float(np.concatenate([judged(e) for e in stages["sft"]]).std(ddof=1)) or 1.0
    write_json(folder / "samples.json", side_by_side({name: e[0] for name, e in stages.items()}, env, unit))
    summary: dict[str, Any] = {name: stage_summary(e, unit) for name, e in stages.items()}
    trained, judge = "the reward model of the comparisons", config.judge
    maximised, judge = (judge, trained) if config.optimise == "judge" else (trained, judge)
    if config.optimum_samples:
        summary["bounds"] = bounds_of(env, config.optimum_samples)
    summary |= {
        "layout": "pretrained",
        "reward_model": measure_reward_model(folder),
        "gold_unit": unit,
        "seed": config.seed,
        "facts": [f"model: {config.model}", f"PPO maximises: {maximised}", f"judge: {judge}"],
        "gains": {key: gain(stages, key)._asdict() for key in ("rm_scores", "gold")},
        "versions": {name: version(name) for name in ("torch", "transformers", "gymnasium", "numpy")},
    }
    return summary | {"warnings": warnings(summary)}


def judged(evaluation: Evaluation) -> np.ndarray:
    assert evaluation.gold is not None
    return evaluation.gold


def stage_summary(repeats: Sequence[Evaluation], unit: float) -> dict[str, Any]:
    """Figures of one stage's replies; intervals are over prompts, whose replies are averaged first."""

    def mean(columns: Sequence[Any], scale: float = 1.0) -> dict[str, float]:
        return mean_ci95(np.mean(columns, axis=0) / scale)._asdict()

    texts = [text for e in repeats for text in e.responses]
    return {
        "reward": mean([e.rewards for e in repeats]),
        "rm_score": mean([e.rm_scores for e in repeats]),
        "gold_score": mean([judged(e) for e in repeats], unit),
        "kl": mean([e.kl for e in repeats]),
        "perplexity": perplexity(repeats),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "eos_rate": float(np.mean([reason != "length" for e in repeats for reason in e.finish_reasons])),
        "response_tokens": mean([e.lengths for e in repeats]),
    }


def perplexity(evaluations: Sequence[Evaluation]) -> float:
    """exp of the mean negative log-likelihood of a token of the replies under the reference, endings included."""
    total = count = 0.0
    for evaluation in evaluations:
        assert evaluation.logprobs is not None
        assert evaluation.kl_per_token is not None
        total -= (evaluation.logprobs - evaluation.kl_per_token).sum(dtype=np.float64)
        count += evaluation.lengths.sum()
    return math.exp(total / count)


def distinct(texts: Sequence[str], n: int) -> float:
    """distinct-n (Li et al. 2016): the share of the n-grams of words that differ, over all the texts."""
    grams = [tuple(words[i : i + n]) for text in texts for words in [text.split()] for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def gain(stages: Mapping[str, Sequence[Evaluation]], key: str) -> Mean:
    """What PPO changed in a column of the evaluations, prompt by prompt."""
    before, after = (np.mean([getattr(e, key) for e in stages[name]], axis=0) for name in ("sft", "ppo"))
    return mean_ci95(after - before)


def warnings(summary: Mapping[str, Any]) -> list[str]:
    """Whether the judge contradicts the score that PPO maximised, and whether PPO's replies have become alike."""
    score, judge = summary["gains"]["rm_scores"], summary["gains"]["gold"]
    before, after = (summary[stage]["distinct_2"] for stage in ("sft", "ppo"))
    found = []
    if score["mean"] > score["ci95"] and judge["mean"] < -judge["ci95"]:
        found.append(
            "Over-optimisation: the score that PPO maximises rose on held-out prompts, and the judge's fell. Raise "
            "kl_coef, train for fewer updates, or train the reward model on more comparisons."
        )
    if after < ALIKE * before:
        found.append(
            f"Little variety: distinct pairs of words (distinct-2) fell from {before:.0%} under SFT to {after:.0%}. "
            "Many prompts get the same reply. Read them, then raise kl_coef or train for fewer updates."
        )
    return found


def measure_reward_model(folder: Path) -> dict[str, float]:
    """Accuracy and NLL of the reward model on held-out comparisons; writes the calibration."""
    model = load_reward_model(folder / "reward_model")
    rankings = read_rankings(folder / "data", "held-out")
    scores = model.scores(model.encode_rankings(rankings)) * model.score_unit
    measured = measure_scores(scores, rankings)
    pairs = [(i, row[0] - row[1]) for i, row in enumerate(scores.split([len(r.responses) for r in rankings]))
             if len(row) == 2 and not rankings[i].has_ties]  # fmt: skip
    cluster = {prompt: n for n, prompt in enumerate(dict.fromkeys(ranking.group for ranking in rankings))}
    calibration = {"margin": [float(m) for _, m in pairs], "prompt": [cluster[rankings[i].group] for i, _ in pairs]}
    write_json(folder / "calibration.json", calibration)
    return {
        "accuracy": measured["accuracy_per_ranking"],
        "accuracy_ci95": measured["accuracy_per_ranking_ci95"],
        "nll": measured["nll_per_ranking"],
        "pairs": measured["pairs"],
    }


def side_by_side(stages: Mapping[str, Evaluation], env: TextVectorEnv, unit: float) -> list[dict[str, Any]]:
    """The first held-out prompts, answered by every stage: picked by place, not by looks."""
    samples = []
    for index in range(min(SHOWN, len(env.task.prompts.prompts))):
        answers = [
            {
                "stage": name,
                "text": evaluation.responses[index],
                "gold": float(judged(evaluation)[index]) / unit,
                "rm_score": float(evaluation.rm_scores[index]),
            }
            for name, evaluation in stages.items()
        ]
        samples.append({"title": f"Prompt {index + 1}", "prompt": shown(env, index), "answers": answers})
    return samples


def shown(env: TextVectorEnv, index: int) -> str:
    """A prompt as a reader sees it: a chat without the marks of its template."""
    prompt = env.task.prompts.prompts[index]
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
