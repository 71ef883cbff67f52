"""Reward-model training: learns what can be learned, invents nothing, resumes exactly."""

import math
import random

import numpy as np
import pytest
import torch

import textenv
from reward_models.evaluation import measure_scores
from reward_models.preferences import Ranking
from reward_models.scorers.transformer import TransformerRewardModel, load_reward_model
from reward_models.training.examples import table
from reward_models.training.losses import ranking_nll
from reward_models.training.start import start_reward_model
from reward_models.training.trainer import RewardConfig, evaluate_reward_model, train_reward_model
from tests.conftest import tiny_model

WORDS = ["red", "green", "blue", "sky", "grass", "is"]


def toy_rankings(count, seed, *, noise=False):
    """More blue is better; K from 2 to 4. With ``noise`` the order is a coin's."""
    rng = np.random.default_rng(seed)
    rankings = []
    for _ in range(count):
        blues = rng.permutation(5)[: rng.integers(2, 5)]
        texts = [list(rng.choice(WORDS[:2] + WORDS[3:], size=4 - blue)) + ["blue"] * blue for blue in blues]
        texts = [" ".join(rng.permutation(text)) for text in texts]
        order = rng.permutation(len(blues)) if noise else np.argsort(-blues)
        rankings.append(Ranking(" ".join(rng.choice(WORDS, size=4)), tuple(texts[i] for i in order)))
    return rankings


RANKINGS = [
    Ranking("what is the sky ?", ("blue", "the sky is blue", "grass", "")),
    Ranking("red", ("green", "blue blue blue blue blue blue")),
    Ranking("the grass is", ("green", "red", "not red")),
    Ranking("red <eos>", ("is", "not")),
]


def config(**options):
    return RewardConfig(**{"learning_rate": 3e-3, "epochs": 2, "batch_size": 2, "logging_steps": 1, **options})


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.model.parameters()])


def test_the_first_loss_of_a_new_head_is_log_two():
    result = train_reward_model(tiny_model(), RANKINGS, config(batch_size=4))
    assert result.history[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_the_loss_in_training_is_the_ranking_loss_of_the_scores_the_model_gives():
    started = train_reward_model(tiny_model(), RANKINGS, config(epochs=5, normalize=False)).model
    result = train_reward_model(started, RANKINGS, config(batch_size=4))
    losses = []
    for ranking in RANKINGS:
        scores = torch.tensor([started([ranking.prompt] * len(ranking.responses), ranking.responses)])
        losses.append(ranking_nll(scores, torch.ones_like(scores, dtype=torch.bool)).mean().item())
    assert result.history[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert evaluate_reward_model(started, RANKINGS)["nll_per_ranking"] == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.parametrize(("size", "accumulation"), [(2, 2), (1, 4), (3, 2)])
def test_loss_and_gradient_do_not_depend_on_how_a_step_is_split(size, accumulation):
    start = train_reward_model(tiny_model(), RANKINGS, config(normalize=False)).model
    options = {"max_grad_norm": None, "warmup_ratio": 0.0, "lr_schedule": "constant"}
    whole = train_reward_model(start, RANKINGS, config(batch_size=size * accumulation, **options))
    split = train_reward_model(
        start, RANKINGS, config(batch_size=size, gradient_accumulation_steps=accumulation, **options)
    )
    for key in ("loss", "grad_norm"):
        assert [h[key] for h in split.history] == pytest.approx([h[key] for h in whole.history], rel=2e-4)


def test_a_margin_enters_the_loss_in_log_odds_also_after_normalisation():
    start = train_reward_model(tiny_model(), RANKINGS, config()).model
    assert start.score_unit != 1.0
    pair = Ranking("red", ("green", "blue"))
    gap = start.score_unit * np.subtract(*start(["red", "red"], ["green", "blue"]))
    for margin in (0.0, 1.5):
        result = train_reward_model(start, [pair._replace(margin=margin)], config())
        assert result.history[0]["loss"] == pytest.approx(np.log1p(np.exp(margin - gap)), rel=1e-4)


def test_the_given_model_and_the_global_random_states_stay_as_they_were():
    start = train_reward_model(tiny_model(), RANKINGS, config()).model
    # Away from the states that seeding would leave.
    random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    before = weights(start).clone(), start.model.config.to_dict(), random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    train_reward_model(start, RANKINGS, config())
    assert torch.equal(weights(start), before[0])
    assert start.model.config.to_dict() == before[1]
    assert random.getstate() == before[2]
    assert torch.equal(torch.get_rng_state(), before[3])
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


@pytest.mark.parametrize("at", [1, 2, 3])
def test_resuming_equals_never_having_stopped(tmp_path, at):
    def stop(step, total, numbers):
        if step == at:
            raise KeyboardInterrupt

    lm = tiny_model()
    straight = train_reward_model(lm, RANKINGS, config(), eval_rankings=RANKINGS)
    with pytest.raises(KeyboardInterrupt):
        train_reward_model(lm, RANKINGS, config(), tmp_path, on_progress=stop)
    torch.manual_seed(99)
    resumed = train_reward_model(lm, RANKINGS, config(), tmp_path, resume=True, eval_rankings=RANKINGS)
    assert torch.equal(weights(resumed.model), weights(straight.model))
    assert torch.equal(weights(load_reward_model(tmp_path)), weights(straight.model))
    assert resumed.metrics["eval_nll_per_ranking"] == straight.metrics["eval_nll_per_ranking"]
    assert resumed.model.score_unit == straight.model.score_unit


def test_a_trained_model_is_normalised_on_its_training_responses_and_reported_alike(tmp_path):
    result = train_reward_model(tiny_model(), RANKINGS, config(epochs=4), tmp_path, eval_rankings=RANKINGS[:2])
    parts = [torch.tensor(result.model([r.prompt] * len(r.responses), r.responses)) for r in RANKINGS]
    spread = sum((part - part.mean()).square().sum().item() for part in parts) / sum(len(part) - 1 for part in parts)
    assert spread == pytest.approx(1.0, rel=1e-3)
    assert sum(part.mean().item() for part in parts) == pytest.approx(0.0, abs=1e-3)
    measured = evaluate_reward_model(load_reward_model(tmp_path), RANKINGS[:2])
    assert {f"eval_{key}": value for key, value in measured.items()} == pytest.approx(
        {key: value for key, value in result.metrics.items() if key.startswith("eval_")}, rel=1e-4
    )


def test_evaluation_counts_pairs_and_clusters_by_prompt():
    model = train_reward_model(tiny_model(), RANKINGS, config()).model
    once, thrice = evaluate_reward_model(model, RANKINGS), evaluate_reward_model(model, RANKINGS * 3)
    assert (once["pairs"], once["prompts"]) == (6 + 1 + 3 + 1, 4)
    assert (thrice["pairs"], thrice["prompts"]) == (33, 4)
    # Repeating data teaches nothing: the error must not shrink by √3.
    for key in set(once) - {"pairs", "ties", "ece_per_pair"}:  # bins of ten pairs depend on how many there are
        assert thrice[key] == pytest.approx(once[key], rel=1e-6)


def test_the_figures_of_an_evaluation_are_those_done_by_hand():
    # Log-odds 2, 0, 3 with the last two tied: gaps 2 and −1; a pair of odds 77 to 23; a pair that is a tie; a pair of
    # equal responses, which is none.
    rankings = [Ranking("p", ("a", "b", "c"), ranks=(0, 1, 1)), Ranking("q", ("a", "b")),
                Ranking("q", ("a", "b"), ranks=(0, 0)), Ranking("r", ("a", "a"))]  # fmt: skip
    gap = np.log(77 / 23)
    found = measure_scores(torch.tensor([2.0, 0.0, 3.0, gap, 0.0, 9.0, 0.0, 1.0, 1.0], dtype=torch.float64), rankings)
    losses = [np.log1p(np.exp(-2)), np.log1p(np.exp(1)), -np.log(0.77)]
    first = (losses[0] + losses[1]) / 2
    assert (found["pairs"], found["ties"], found["prompts"]) == (3, 2, 3)
    # Rankings weigh alike: two clusters with x and y have the standard error |x − y|/2, times t(1) = 12.706.
    assert found["accuracy_per_ranking"] == pytest.approx(0.75)
    assert found["accuracy_per_ranking_ci95"] == pytest.approx(12.7062 * 0.25)
    assert found["nll_per_ranking"] == pytest.approx((first + losses[2]) / 2)
    assert found["nll_per_ranking_ci95"] == pytest.approx(12.7062 * (first - losses[2]) / 2, rel=1e-5)
    # Pairs weigh alike: right, wrong, right; the residuals of the first prompt add up to ½ − 1/6 − 2/3 = −1/3.
    assert (found["accuracy_per_pair"], found["nll_per_pair"]) == pytest.approx((2 / 3, np.mean(losses)))
    assert found["accuracy_per_pair_ci95"] == pytest.approx(12.7062 * np.sqrt(2 * 2 / 9) / 3)
    # Confidence σ(1) = 0.73 wrong, 0.77 and σ(2) = 0.88 right: each in a bin of its own.
    sure, wrong = 1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-1))
    assert found["ece_per_pair"] == pytest.approx((wrong + 0.23 + 1 - sure) / 3)
    b = found["calibration_slope_per_pair"]  # where the derivative of the likelihood is 0
    assert 2 / (1 + np.exp(2 * b)) + gap / (1 + np.exp(gap * b)) == pytest.approx(1 / (1 + np.exp(-b)))


def test_scores_are_laid_out_by_prompt():
    scores, mask = table(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([3, 2]))
    assert scores.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]]
    assert mask.tolist() == [[True, True, True], [True, True, False]]


def test_progress_is_reported_after_every_step():
    seen = []
    train_reward_model(tiny_model(), RANKINGS, config(), on_progress=lambda *report: seen.append(report))
    assert [(step, total) for step, total, _ in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert seen[-1][2]["loss"] > 0


@pytest.mark.slow
def test_a_learnable_preference_is_learned_and_a_coin_is_not():
    learned = config(epochs=6, batch_size=16)
    held_out = toy_rankings(150, seed=1)
    result = train_reward_model(tiny_model(), toy_rankings(300, seed=0), learned, eval_rankings=held_out)
    assert result.metrics["eval_accuracy_per_pair"] > 0.95
    noise = train_reward_model(
        tiny_model(),
        toy_rankings(300, seed=0, noise=True),
        learned,
        eval_rankings=toy_rankings(150, seed=1, noise=True),
    )
    error = 1.5 * noise.metrics["eval_accuracy_per_pair_ci95"]  # 3 standard errors
    assert noise.metrics["eval_accuracy_per_pair"] == pytest.approx(0.5, abs=error)
    assert isinstance(result.model, TransformerRewardModel)


def test_labels_upside_down_teach_the_same_scores_with_the_other_sign():
    """Why a coin's labels give an accuracy that is as often above a half as below: nothing prefers one side."""
    pairs = [Ranking(ranking.prompt, ranking.responses[:2]) for ranking in toy_rankings(40, seed=2)]
    mirrored = [pair._replace(responses=pair.responses[::-1]) for pair in pairs]
    options = config(batch_size=8, normalize=False)
    learned, opposite = (train_reward_model(tiny_model(), records, options).model for records in (pairs, mirrored))
    texts = learned.encode_rankings(pairs)
    scores = learned.scores(texts)
    assert scores.std() > 0.1
    torch.testing.assert_close(opposite.scores(texts), -scores, atol=1e-4, rtol=1e-3)


def test_frozen_embeddings_stay_and_the_rest_learns():
    start = TransformerRewardModel.from_language_model(tiny_model())
    trained = train_reward_model(start, RANKINGS, config(freeze_embeddings=True, normalize=False)).model
    after = dict(trained.model.named_parameters())
    for name, before in start.model.named_parameters():
        frozen = "wte" in name or "wpe" in name
        assert torch.equal(before, after[name]) == frozen, name


def test_training_goes_on_from_a_registered_reward_model():
    start = start_reward_model("assistant-rm")
    assert start is not textenv.reward_model("assistant-rm")
    texts = ["where is paris ?"], ["it is in france ."]
    assert start(*texts) == textenv.reward_model("assistant-rm")(*texts)


def test_equal_scores_are_half_right_and_have_no_calibration_slope():
    figures = evaluate_reward_model(TransformerRewardModel.from_language_model(tiny_model()), RANKINGS)
    assert figures["accuracy_per_pair"] == 0.5
    assert math.isnan(figures["calibration_slope_per_pair"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_grad_norm", -1.0),
        ("adam_beta2", 1.0),
        ("learning_rate", math.inf),
        ("lora_alpha", math.nan),
        ("epochs", 0),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        config(**{name: value})
