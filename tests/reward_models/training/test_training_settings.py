"""Each setting of a training run does what it says: losses by hand, adapters by definition, refusals by name."""

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from reward_models.preferences import Ranking
from reward_models.scorers.heads import score_head
from reward_models.scorers.transformer import TransformerRewardModel
from reward_models.training import trainer
from reward_models.training.lora import LoRA
from reward_models.training.trainer import RewardConfig, train_reward_model
from tests.conftest import encoder_folder, tiny_model
from tests.reward_models.training.test_resume_modes import stop_at
from tests.reward_models.training.test_trainer import RANKINGS, config, weights

TIED = [
    Ranking("what is the sky ?", ("blue", "the sky is blue", "grass", ""), ranks=(0, 1, 1, 2)),
    Ranking("red", ("green", "blue blue blue"), ranks=(0, 0)),
    Ranking("the grass is", ("green", "red", "not red"), margin=0.5),
]


@pytest.fixture(scope="module")
def started():
    """A model whose scores differ, and are not log-odds."""
    model = train_reward_model(tiny_model(), RANKINGS, config(epochs=4)).model
    assert model.score_unit != 1.0
    return model


def log_odds(model, ranking):
    return [model.score_unit * model([ranking.prompt], [text])[0] for text in ranking.responses]


def pairwise(scores, ranking, *, smoothing=0.0, ties=0.0):
    """Mean over the pairs of a prompt of −log P, each written as a probability."""
    losses = []
    levels = ranking.ranks or range(len(scores))
    for i in range(len(scores)):
        for j in range(i + 1, len(scores)):
            tied = levels[i] == levels[j]
            gap = scores[i] - scores[j] - (0.0 if tied else ranking.margin)
            both = 1 + np.exp(-gap) + ties * np.exp(-gap / 2)
            if tied and ties:
                losses.append(-np.log(ties * np.exp(-gap / 2) / both))
            elif tied:
                losses.append(-0.5 * np.log(1 / both) - 0.5 * np.log(np.exp(-gap) / both))
            else:
                losses.append(-(1 - smoothing) * np.log(1 / both) - smoothing * np.log(np.exp(-gap) / both))
    return np.mean(losses)


def listwise(scores, ranking):
    """Mean over the choices, the best of those that are left, of minus the log of a softmax."""
    return np.mean([-np.log(np.exp(scores[i]) / np.sum(np.exp(scores[i:]))) for i in range(len(scores) - 1)])


LOSSES = {
    "plain": ({}, TIED, pairwise),
    "smoothed": ({"label_smoothing": 0.2}, TIED, lambda s, r: pairwise(s, r, smoothing=0.2)),
    "ties": ({"tie_strength": 0.7}, TIED, lambda s, r: pairwise(s, r, ties=0.7)),
    "centred": ({"center_coef": 0.3}, TIED, lambda s, r: pairwise(s, r) + 0.3 * np.mean(s) ** 2),
    "listwise": ({"loss": "listwise"}, RANKINGS, listwise),
    "listwise, centred": (
        {"loss": "listwise", "center_coef": 0.3},
        RANKINGS,
        lambda s, r: listwise(s, r) + 0.3 * np.mean(s) ** 2,
    ),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_the_first_loss_is_its_formula_on_the_scores_of_the_start(kind, started):
    options, rankings, by_hand = LOSSES[kind]
    result = train_reward_model(started, rankings, config(batch_size=len(rankings), epochs=1, **options))
    expected = np.mean([by_hand(log_odds(started, ranking), ranking) for ranking in rankings])
    assert result.history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def parts(model):
    """``(weights of the trunk, weights of the last layer)``."""
    head = {id(parameter) for parameter in score_head(model.model).parameters()}
    trunk = [p.detach().flatten() for p in model.model.parameters() if id(p) not in head]
    return torch.cat(trunk), score_head(model.model).weight.detach()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_merged_adapters_are_alpha_over_rank_times_b_times_a_on_every_linear_layer_but_the_last(kind, tmp_path):
    pytest.importorskip("peft")
    if kind == "bert":
        model = TransformerRewardModel.from_encoder(encoder_folder(kind, tmp_path)).model
    else:
        model = TransformerRewardModel.from_language_model(tiny_model(kind)).model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    lora = LoRA(model, rank=3, alpha=6.0, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    head = score_head(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    downs = {name: p.detach().clone() for name, p in trained.items() if "lora_A" in name}
    own = {name for name, p in trained.items() if any(p is one for one in head.parameters())}
    assert {name for name in trained if "lora" not in name} == own
    assert len(own) == len(list(head.parameters()))  # the last layer trains as it is
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in downs:
            trained[name.replace("lora_A", "lora_B")].normal_(generator=generator)
    ups = {name: trained[name.replace("lora_A", "lora_B")].detach().clone() for name in downs}
    lora.merge()
    changed = set()
    for name, down in downs.items():
        assert down.shape[0] == 3  # the rank
        layer = name.split(".lora_A")[0] + ".weight"
        delta = 6.0 / 3 * ups[name] @ down
        if kind == "gpt2":  # Conv1D keeps its weight transposed
            delta = delta.T
        torch.testing.assert_close(model.state_dict()[layer], before[layer] + delta, atol=1e-5, rtol=0)
        changed.add(layer)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == changed
    modules = dict(model.named_modules())
    linear = {n for n, m in modules.items() if isinstance(m, torch.nn.Linear | Conv1D) and m is not score_head(model)}
    assert {name.removesuffix(".weight") for name in changed} == linear
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_start_at_nothing_from_their_own_seed_and_alpha_says_how_far_they_reach():
    pytest.importorskip("peft")
    start = TransformerRewardModel.from_language_model(tiny_model())
    once = config(batch_size=4, epochs=3, lora_rank=2, normalize=False)

    def trunk(settings, global_seed):
        torch.manual_seed(global_seed)
        result = train_reward_model(start, RANKINGS, settings)
        assert result.history[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
        return parts(result.model)[0]

    with torch.random.fork_rng():
        first = trunk(once, 0)
        assert torch.equal(trunk(once, 1), first)
        assert not torch.equal(trunk(config(**{**vars(once), "seed": 1}), 0), first)
        still = trunk(config(**{**vars(once), "lora_alpha": 0.0}), 0)
        assert torch.equal(still, parts(start)[0])
        assert not torch.equal(first, still)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_frozen_trunk_trains_the_last_layer_and_nothing_else(kind, tmp_path):
    if kind == "gpt2":
        start = TransformerRewardModel.from_language_model(tiny_model())
    else:
        start = TransformerRewardModel.from_encoder(encoder_folder(kind, tmp_path))
    before = parts(start)[0].clone()
    result = train_reward_model(start, RANKINGS, config(freeze_trunk=True, normalize=False))
    trunk, head = parts(result.model)
    assert torch.equal(trunk, before)
    assert head.abs().max() > 0
    assert result.metrics["trained_parameters"] == sum(p.numel() for p in score_head(start.model).parameters())


def test_the_copy_keeps_name_and_batch_size_and_scores_that_are_not_normalised_keep_their_unit(started):
    start = TransformerRewardModel(started.model, started.tokenizer, name="mine", batch_size=3)
    result = train_reward_model(start, RANKINGS, config(normalize=False))
    assert (result.model.name, result.model.batch_size) == ("mine", 3)
    assert result.model.score_unit == started.score_unit
    again = train_reward_model(start, RANKINGS, config())
    assert again.model.score_unit != started.score_unit


@pytest.mark.parametrize(
    "changed",
    [
        RANKINGS[:3],
        [RANKINGS[0]._replace(prompt="what is the grass ?"), *RANKINGS[1:]],
        [RANKINGS[0]._replace(ranks=(0, 0, 1, 2)), *RANKINGS[1:]],
        [RANKINGS[0]._replace(margin=1.0), *RANKINGS[1:]],
    ],
    ids=["fewer", "another text", "a tie", "a margin"],
)
def test_a_run_is_not_resumed_on_other_data(changed, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_reward_model(tiny_model(), RANKINGS, config(), tmp_path, on_progress=stop_at(1))
    with pytest.raises(ValueError, match="a run must be resumed with the"):
        train_reward_model(tiny_model(), changed, config(), tmp_path, resume=True)


@pytest.mark.parametrize("options", [{}, {"freeze_trunk": True}, {"lora_rank": 2}])
def test_a_run_is_not_resumed_from_another_start_model_or_with_other_held_out_data(options, tmp_path):
    """A frozen trunk and adapters are not in the checkpoint: they would be another model's."""
    if "lora_rank" in options:
        pytest.importorskip("peft")
    settings = config(early_stopping_patience=9, **options)
    with pytest.raises(KeyboardInterrupt):
        train_reward_model(tiny_model(), RANKINGS, settings, tmp_path, eval_rankings=RANKINGS, on_progress=stop_at(1))
    other = tiny_model()
    with torch.no_grad():
        next(iter(other.model.parameters())).add_(0.01)
    with pytest.raises(ValueError, match="resumed with the start model it started with"):
        train_reward_model(other, RANKINGS, settings, tmp_path, eval_rankings=RANKINGS, resume=True)
    with pytest.raises(ValueError, match="resumed with the held-out data it started with"):
        train_reward_model(tiny_model(), RANKINGS, settings, tmp_path, eval_rankings=RANKINGS[:2], resume=True)


@pytest.mark.parametrize("stopped_in", ["normalize", "save_pretrained"])
def test_what_stops_a_run_after_its_last_step_loses_no_training(stopped_in, tmp_path, monkeypatch):
    straight = train_reward_model(tiny_model(), RANKINGS, config(), eval_rankings=RANKINGS)
    original = getattr(TransformerRewardModel, stopped_in)

    def stop(self, folder=None, *rest):
        if stopped_in == "save_pretrained" and "checkpoint" in str(folder):
            return original(self, folder, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TransformerRewardModel, stopped_in, stop)
        with pytest.raises(KeyboardInterrupt):
            train_reward_model(tiny_model(), RANKINGS, config(), tmp_path, eval_rankings=RANKINGS)
    steps = []
    resumed = train_reward_model(
        tiny_model(), RANKINGS, config(), tmp_path, eval_rankings=RANKINGS, resume=True,
        on_progress=lambda done, total, numbers: steps.append(done),
    )  # fmt: skip
    assert steps == []
    assert torch.equal(weights(resumed.model), weights(straight.model))
    assert resumed.history == straight.history
    assert not list(tmp_path.glob("checkpoint-*"))


def test_rankings_without_a_decided_pair_are_refused_before_any_training(tmp_path):
    ties = [Ranking("red", ("is", "not"), ranks=(0, 0))]
    with pytest.raises(ValueError, match="rankings must hold a pair that is not a tie, got 1 without one"):
        train_reward_model(tiny_model(), ties, config())
    with pytest.raises(ValueError, match="eval_rankings must hold a pair that is not a tie, got 1 without one"):
        train_reward_model(tiny_model(), RANKINGS, config(), tmp_path, eval_rankings=ties)
    assert not list(tmp_path.iterdir())


def test_a_run_that_diverged_is_not_called_one_that_learned_nothing():
    model = TransformerRewardModel.from_language_model(tiny_model())
    with torch.no_grad():
        model.model.score.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="The training diverged"):
        model.normalize(RANKINGS)


def test_a_run_is_not_resumed_with_other_settings_nor_begun_over_an_unfinished_one(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_reward_model(tiny_model(), RANKINGS, config(), tmp_path, on_progress=stop_at(1))
    with pytest.raises(ValueError, match="resumed with the config it started with"):
        train_reward_model(tiny_model(), RANKINGS, config(label_smoothing=0.1), tmp_path, resume=True)
    with pytest.raises(ValueError, match="must not hold the checkpoint of an unfinished run"):
        train_reward_model(tiny_model(), RANKINGS, config(), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, r"loss must be .*, got 'hinge'"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be .*, got 0\.5"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be .*, got -0\.1"),
        ({"tie_strength": -1.0}, r"tie_strength must be .*, got -1\.0"),
        ({"center_coef": float("nan")}, r"center_coef must be .*, got nan"),
        ({"lora_rank": -1}, r"lora_rank must be .*, got -1"),
        ({"eval_steps": 0}, r"eval_steps must be .*, got 0"),
        ({"early_stopping_patience": 0}, r"early_stopping_patience must be .*, got 0"),
        ({"loss": "listwise", "label_smoothing": 0.1}, "need loss='pairwise'"),
        ({"loss": "listwise", "tie_strength": 0.1}, "need loss='pairwise'"),
        ({"freeze_trunk": True, "lora_rank": 2}, "freeze_trunk must be off"),
    ],
    ids=str,
)
def test_settings_that_contradict_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**options)


@pytest.mark.parametrize(
    ("ranking", "message"),
    [(Ranking("p", ("a", "b"), margin=1.0), "margins need loss"), (Ranking("p", ("a", "b"), (0, 0)), "ties need loss")],
)
def test_a_listwise_loss_reads_neither_margins_nor_ties(ranking, message):
    with pytest.raises(ValueError, match=message):
        train_reward_model(tiny_model(), [*RANKINGS, ranking], config(loss="listwise"))


def test_the_weights_that_are_kept_are_those_of_the_lowest_nll_whatever_the_other_figures_say(monkeypatch):
    nlls = [0.7, 0.5, 0.6, 0.5, 0.9]  # the second is the best: an equal one is no better
    left = [{"nll_per_ranking": nll, "accuracy_per_ranking": 0.9 - 0.1 * i} for i, nll in enumerate(nlls)]
    at_evaluation = []

    def figures(scores, rankings):
        at_evaluation.append(scores.clone())
        return left[len(at_evaluation) - 1]

    monkeypatch.setattr(trainer, "measure_scores", figures)
    settings = config(epochs=6, early_stopping_patience=3, lr_schedule="constant", normalize=False)
    result = train_reward_model(tiny_model(), RANKINGS, settings, eval_rankings=RANKINGS)
    assert [entry["eval_nll_per_ranking"] for entry in result.history if "eval_nll_per_ranking" in entry] == nlls
    kept = result.model.scores(result.model.encode_rankings(RANKINGS))
    assert torch.equal(kept, at_evaluation[1])
    assert not torch.equal(kept, at_evaluation[4])
    assert result.metrics["eval_accuracy_per_ranking"] == pytest.approx(0.8)
    assert result.metrics["steps"] == 10
