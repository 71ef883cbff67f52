"""Measures the stages of the demo: answers to held-out prompts, judged and prepared for the report."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from agents.best_of_n import best_responses
from agents.core.agent import LanguageModelAgent
from agents.experiments.bounds import bounds_of
from reward_models.benchmark.measures.best_of_n import kl_bound
from reward_models.evaluation import measure_scores
from reward_models.preferences import load_rankings
from reward_models.scorers.transformer import load_reward_model
from textenv.data.records import write_json
from textenv.evaluation import Evaluation, evaluate
from textenv.lm import load_language_model
from textenv.stats import bayes_limits, mean_ci95
from textenv.tasks import assistant
from textenv.tasks.assistant.questions import prompt_records
from textenv.vector import TextVectorEnv, make_vec


def evaluate_stages(
    folder: Path, advance: Any, *, split: str, prompts: int | None, kl_coef: float, repeats: int, seed: int
) -> dict[str, Any]:
    """Answer the first ``prompts`` of a split (None: all) with every stage, ``repeats`` times; judge; write what the
    report shows.

    Returns the part of the summary that is measured; gold scores in standard deviations of the SFT model's.
    """
    models: dict[str, Any] = {"reference": str(folder / "sft"), "reward_model": str(folder / "reward_model")}
    env = assistant_env(split, prompts, **models, kl_coef=kl_coef)
    stages: dict[str, list[Evaluation]] = {}
    for part, name in enumerate(("base", "sft", "ppo")):
        model = load_language_model(folder / name / "policy" if name == "ppo" else folder / name)
        agent = LanguageModelAgent(model, env.task, seed=seed + 30 + part)
        stages[name] = []
        for k in range(repeats):
            stages[name].append(evaluate(agent, env))
            advance(part * repeats + k + 1, 3 * repeats, {})
    best = {n: best_responses(stages["sft"][:n]) for n in range(1, repeats + 1)}
    stages[f"best_of_{repeats}"] = [best[repeats]]
    unit = float(np.concatenate([gold_of(e) for e in stages["sft"]]).std(ddof=1))
    order = ("base", "sft", f"best_of_{repeats}", "ppo")
    write_json(folder / "best_of_n.json", [best_point(n, evaluation, unit) for n, evaluation in best.items()])
    write_json(folder / "samples.json", side_by_side({name: stages[name][0] for name in order}, split, unit))
    summary: dict[str, Any] = {name: stage_summary(stages[name], unit) for name in order}
    chosen, bound = summary[f"best_of_{repeats}"], kl_bound(repeats)
    chosen |= {"kl_bound": bound, "reward_bound": chosen["rm_score"]["mean"] - kl_coef * bound}
    measured = {"reward_model": measure_reward_model(folder), "bounds": bounds_of(env, 16)}
    return summary | measured | {"gold_unit": unit}


def assistant_env(
    split: str, count: int | None = None, *, num_envs: int | None = None, **options: Any
) -> TextVectorEnv:
    """The embedded world on one part of its prompts, or the first ``count`` of them, in at most 256 slots unless their
    number is given."""
    prompts = f"assistant-{split}" if count is None else prompt_records(split)[:count]  # type: ignore[arg-type]
    return make_vec("textenv/Assistant-v0", num_envs or min(256, count or 256), prompts=prompts, **options)


def gold_of(evaluation: Evaluation) -> Float[np.ndarray, " B"]:
    assert evaluation.gold is not None
    return evaluation.gold


def stage_summary(repeats: list[Evaluation], unit: float) -> dict[str, Any]:
    """Figures of one stage's answers, with intervals over prompts (repeats of a prompt are averaged first)."""

    def mean(columns: list[Any], scale: float = 1.0) -> dict[str, float]:
        return mean_ci95(np.mean(columns, axis=0) / scale)._asdict()

    answers = [answer for e in repeats for answer in zip(e.prompts, e.responses, e.finish_reasons, strict=True)]
    kl = [e.kl for e in repeats if e.kl is not None]
    return {
        "gold_score": mean([gold_of(e) for e in repeats], unit),
        "rm_score": mean([e.rm_scores for e in repeats]),
        "kl": mean(kl) if len(kl) == len(repeats) else None,
        "reward": mean([e.rewards for e in repeats]) if len(kl) == len(repeats) else None,
        **assistant.rates(assistant.judge(*answer) for answer in answers),
        "eos_rate": float(np.mean([reason != "length" for e in repeats for reason in e.finish_reasons])),
        "response_tokens": float(np.mean([e.lengths for e in repeats])),
    }


def best_point(n: int, evaluation: Evaluation, unit: float) -> dict[str, float]:
    """A point of the best-of-n curve; its KL is an upper bound."""
    gold = mean_ci95(gold_of(evaluation) / unit)
    return {"n": n, "gold": gold.mean, "ci95": gold.ci95, "kl_bound": kl_bound(n)}


def measure_reward_model(folder: Path) -> dict[str, float]:
    """Accuracy and NLL per held-out ranking beside the best that any model could expect; writes the calibration."""
    path = folder / "data" / "rankings-held-out.jsonl"
    model = load_reward_model(folder / "reward_model")
    rankings = load_rankings(path)
    scores = model.scores(model.encode_rankings(rankings)) * model.score_unit
    measured = measure_scores(scores, rankings)
    cluster = {prompt: number for number, prompt in enumerate(dict.fromkeys(ranking.prompt for ranking in rankings))}
    margins, prompts, limits = [], [], []
    for ranking, own in zip(rankings, scores.split([len(ranking.responses) for ranking in rankings]), strict=True):
        better, worse = np.triu_indices(len(own), k=1)
        gold = np.array(ranking.gold)
        margins += (own[better] - own[worse]).tolist()
        prompts += [cluster[ranking.prompt]] * len(better)
        accuracy, floor = bayes_limits(gold[better] - gold[worse], assistant.ANNOTATOR_TEMPERATURE)
        limits.append((accuracy.mean(), floor.mean()))
    write_json(folder / "calibration.json", {"margin": margins, "prompt": prompts})
    accuracy, floor = np.mean(limits, axis=0).tolist()
    return {
        "accuracy": measured["accuracy_per_ranking"],
        "accuracy_ci95": measured["accuracy_per_ranking_ci95"],
        "bayes_accuracy": accuracy,
        "nll": measured["nll_per_ranking"],
        "nll_floor": floor,
        "pairs": measured["pairs"],
    }


def side_by_side(stages: Mapping[str, Evaluation], split: str, unit: float) -> list[dict[str, Any]]:
    """The first held-out prompt of three kinds, answered by every stage: picked by place, not by looks."""
    answered = len(next(iter(stages.values())).responses)
    prompts = assistant.prompts(split)[:answered]  # type: ignore[arg-type]
    kinds: dict[str, Callable[[assistant.Prompt], bool]] = {
        "Helpful": lambda p: p.kind == "howto" and p.tone == "none",
        "Harmful": lambda p: p.harmful and p.tone == "none",
        "Requested tone": lambda p: p.kind == "howto" and p.tone == "polite",
    }
    samples = []
    for title, fits in kinds.items():
        index = next((i for i, prompt in enumerate(prompts) if fits(prompt)), None)
        if index is None:
            continue
        answers = [
            {
                "stage": name.replace("_", " "),
                "text": stage.responses[index],
                "gold": float(gold_of(stage)[index]) / unit,
                "rm_score": float(stage.rm_scores[index]),
            }
            for name, stage in stages.items()
        ]
        samples.append({"title": title, "prompt": prompts[index].text, "answers": answers})
    return samples
