"""An interrupt changes nothing in any way to train, and held-out figures are those of the model at that step."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats

from reward_models.preferences import Ranking
from reward_models.scorers.heads import score_head
from reward_models.scorers.transformer import TransformerRewardModel, load_reward_model
from reward_models.training.trainer import RewardConfig, train_reward_model
from tests.conftest import encoder_folder, tiny_model
from tests.reward_models.training.test_trainer import RANKINGS, config, weights
from textenv.training.trainable import load_trainable

HELD_OUT = [
    Ranking("what is the sky ?", ("grass", "blue", "the sky is blue")),
    Ranking("red", ("not", "green", "is blue", "the"), ranks=(0, 1, 1, 2)),
    Ranking("what is the sky ?", ("blue blue", "red")),
    Ranking("the", ("green", "sky"), ranks=(0, 0)),
]


def stop_at(step):
    """After a step of training; before that, a frozen trunk tells how it reads the 11 texts of either set."""

    def on_progress(done, total, numbers):
        if done == step and total != 11:
            raise KeyboardInterrupt

    return on_progress


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return TransformerRewardModel.from_encoder(encoder_folder("bert", tmp_path_factory.mktemp("bert")))


def assert_same_run(resumed, straight, folder):
    assert torch.equal(weights(resumed.model), weights(straight.model))
    assert torch.equal(weights(load_reward_model(folder)), weights(straight.model))
    assert resumed.history == straight.history
    timeless = [{key: value for key, value in run.metrics.items() if key != "seconds"} for run in (resumed, straight)]
    assert timeless[0] == timeless[1]
    assert not list(folder.glob("checkpoint-*"))


MODES = {
    "adapters": {"lora_rank": 2, "learning_rate": 1e-2},
    "frozen trunk": {"freeze_trunk": True},
    "frozen embeddings": {"freeze_embeddings": True},
    "evaluations": {"eval_steps": 3},
    "encoder": {},
    "adapters on an encoder": {"lora_rank": 2, "learning_rate": 1e-2},
    "frozen encoder": {"freeze_trunk": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_was_interrupted_ends_as_if_it_never_had_been(mode, tmp_path, bert):
    if "lora_rank" in MODES[mode]:
        pytest.importorskip("peft")
    start = bert if "encoder" in mode else tiny_model()
    settings = config(epochs=3, **MODES[mode])
    straight = train_reward_model(start, RANKINGS, settings, eval_rankings=HELD_OUT)
    with pytest.raises(KeyboardInterrupt):
        train_reward_model(start, RANKINGS, settings, tmp_path, eval_rankings=HELD_OUT, on_progress=stop_at(3))
    torch.manual_seed(99)
    resumed = train_reward_model(start, RANKINGS, settings, tmp_path, eval_rankings=HELD_OUT, resume=True)
    assert_same_run(resumed, straight, tmp_path)
    assert resumed.metrics["steps"] == 6


REVERSED = [ranking._replace(responses=ranking.responses[::-1]) for ranking in RANKINGS]
"""What is learned is wrong here, so that the NLL rises: the first evaluation is the best."""


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("at", ["before the stop", "at the stop"])
def test_early_stopping_is_the_same_across_an_interrupt(at, lora_rank, tmp_path):
    if lora_rank:
        pytest.importorskip("peft")
    options = {"eval_steps": 1, "early_stopping_patience": 3, "lora_rank": lora_rank, "learning_rate": 1e-2}
    settings = config(epochs=6, warmup_ratio=0.0, **options)
    straight = train_reward_model(tiny_model(), RANKINGS, settings, eval_rankings=REVERSED)
    stopped = int(straight.metrics["steps"])
    nlls = [entry["eval_nll_per_ranking"] for entry in straight.history if "eval_nll_per_ranking" in entry]
    assert stopped == len(nlls) < 12
    assert (
        straight.metrics["eval_nll_per_ranking"] == min(nlls) == nlls[-4]
    )  # the best, and then three that were no better
    step = stopped if at == "at the stop" else stopped - 1
    with pytest.raises(KeyboardInterrupt):
        train_reward_model(
            tiny_model(), RANKINGS, settings, tmp_path, eval_rankings=REVERSED, on_progress=stop_at(step)
        )
    seen = []
    resumed = train_reward_model(
        tiny_model(),
        RANKINGS,
        settings,
        tmp_path,
        eval_rankings=REVERSED,
        resume=True,
        on_progress=lambda done, total, numbers: seen.append(done),
    )
    assert seen == list(range(step + 1, stopped + 1))
    assert_same_run(resumed, straight, tmp_path)


def figures_by_hand(model, rankings):
    """Every held-out figure from one text's score at a time, in numpy."""
    per_ranking, prompts, gaps, ties = {"accuracy": [], "nll": []}, [], [], 0
    for ranking in rankings:
        scores = [model.score_unit * model([ranking.prompt], [text])[0] for text in ranking.responses]
        levels = ranking.ranks or range(len(scores))
        pairs = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if i < j]
        decided = [scores[i] - scores[j] for i, j in pairs if levels[i] != levels[j]]
        ties += len(pairs) - len(decided)
        if decided:
            prompts.append(ranking.prompt)
            gaps.append(decided)
            per_ranking["accuracy"].append(np.mean([gap > 0 for gap in decided]))
            per_ranking["nll"].append(np.mean([np.log1p(np.exp(-gap)) for gap in decided]))
    flat = np.concatenate(gaps)

    def ci95(values):
        sums = [sum(v - np.mean(values) for v, p in zip(values, prompts, strict=True) if p == q) for q in set(prompts)]
        error = np.sqrt(len(sums) / (len(sums) - 1) * np.sum(np.square(sums))) / len(values)
        return stats.t.ppf(0.975, len(sums) - 1) * error

    confidence = 1 / (1 + np.exp(-np.abs(flat)))
    parts = np.array_split(np.argsort(confidence), min(10, len(flat)))
    return {
        **{f"eval_{name}_per_ranking": np.mean(values) for name, values in per_ranking.items()},
        **{f"eval_{name}_per_ranking_ci95": ci95(values) for name, values in per_ranking.items()},
        "eval_accuracy_per_pair": np.mean(flat > 0),
        "eval_nll_per_pair": np.mean(np.log1p(np.exp(-flat))),
        "eval_ece_per_pair": sum(abs(np.sum((flat[part] > 0) - confidence[part])) for part in parts) / len(flat),
        "eval_pairs": len(flat),
        "eval_ties": ties,
        "eval_prompts": len({ranking.prompt for ranking in rankings}),
    }


@pytest.mark.parametrize("mode", [{}, {"freeze_trunk": True}, {"loss": "listwise"}], ids=str)
def test_held_out_figures_in_training_are_those_of_the_model_at_that_step(mode, tmp_path):
    start = train_reward_model(tiny_model(), RANKINGS, config()).model
    assert start.score_unit != 1.0  # log-odds are not scores here
    settings = config(epochs=3, eval_steps=3, **mode)
    result = train_reward_model(start, RANKINGS, settings, eval_rankings=HELD_OUT)
    entries = {entry["step"]: entry for entry in result.history if "eval_nll_per_ranking" in entry}
    # Two steps an epoch, and every third; no evaluation twice.
    assert [entry["step"] for entry in result.history if "eval_nll_per_ranking" in entry] == [2, 3, 4, 6]
    for step in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            train_reward_model(
                start, RANKINGS, settings, tmp_path, eval_rankings=HELD_OUT, resume=True, on_progress=stop_at(step)
            )
        at_step = TransformerRewardModel(copy.deepcopy(start.model), start.tokenizer)
        at_step.model.requires_grad_(False)
        (score_head(at_step.model) if mode.get("freeze_trunk") else at_step.model).requires_grad_(True)
        load_trainable(at_step.model, tmp_path / f"checkpoint-{step}" / "trainable.safetensors")
        by_hand = figures_by_hand(at_step, HELD_OUT)
        assert {key: entries[step][key] for key in by_hand} == pytest.approx(by_hand, rel=1e-3, abs=1e-5)
    assert {key: result.metrics[key] for key in by_hand} == {key: entries[6][key] for key in by_hand}
    by_hand = figures_by_hand(result.model, HELD_OUT)  # normalised since, which changes no figure
    assert {key: result.metrics[key] for key in by_hand} == pytest.approx(by_hand, rel=1e-3, abs=1e-5)


def test_settings_that_measure_need_something_to_measure_on():
    for options in ({"eval_steps": 2}, {"early_stopping_patience": 1}):
        with pytest.raises(ValueError, match="need held-out rankings"):
            train_reward_model(tiny_model(), RANKINGS, RewardConfig(**options))
