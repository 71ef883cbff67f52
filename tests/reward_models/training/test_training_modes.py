"""Ways to train a reward model: frozen trunk, LoRA, ties, label noise, early stopping, encoders."""

import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from reward_models.preferences import load_rankings
from reward_models.scorers.transformer import TransformerRewardModel, load_reward_model
from reward_models.training.losses import ranking_nll
from reward_models.training.trainer import RewardConfig, evaluate_reward_model, train_reward_model
from tests.conftest import FAMILIES, encoder_folder, tiny_model
from tests.reward_models.training.test_trainer import toy_rankings

PROMPTS = ["what is the sky ?", "red", "is the <eos> not green", "the grass"] * 3
TEXTS = ["blue", "green grass", "not red is the sky blue", "red"] * 3


def train(model=None, count=200, **options):
    settings = {"learning_rate": 3e-3, "batch_size": 16, "epochs": 2, **options}
    return train_reward_model(model or tiny_model(seed=1), toy_rankings(count, 0), RewardConfig(**settings))


@pytest.fixture(scope="module", params=["bert", "deberta-v2"])
def encoder(request, tmp_path_factory):
    return encoder_folder(request.param, tmp_path_factory.mktemp(request.param))


def test_an_encoder_learns_a_preference_and_scores_alike_in_every_batch_and_order(encoder, tmp_path):
    model = train(TransformerRewardModel.from_encoder(encoder), count=400, epochs=3).model
    assert evaluate_reward_model(model, toy_rankings(100, 1))["accuracy_per_pair"] > 0.8
    scores = torch.tensor(model(PROMPTS, TEXTS))
    for size in (1, 8, 64):
        model.batch_size = size
        torch.testing.assert_close(torch.tensor(model(PROMPTS, TEXTS)), scores, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(model(PROMPTS[::-1], TEXTS[::-1])).flip(0), scores, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(torch.tensor(load_reward_model(tmp_path)(PROMPTS, TEXTS)), scores, atol=1e-6, rtol=0)


def test_a_frozen_trunk_stays_as_it_was_and_its_cached_features_train_the_head_that_no_cache_would():
    start = tiny_model(seed=1)
    cached = train(start, freeze_trunk=True, normalize=False).model
    before, after = start.model.base_model.state_dict(), cached.model.base_model.state_dict()
    for name, weight in before.items():
        if "wte" not in name:  # a row for padding is added
            assert torch.equal(weight, after[name]), name
    # The same by gradients of the head alone, without features computed beforehand.
    slow = TransformerRewardModel.from_language_model(start)
    slow.model.base_model.requires_grad_(False)
    assert evaluate_reward_model(cached, toy_rankings(100, 1))["nll_per_ranking"] < math.log(2) - 0.01
    weight = cached.model.score.weight
    with torch.no_grad():
        slow.model.score.weight.copy_(weight)
    torch.testing.assert_close(
        torch.tensor(slow(PROMPTS, TEXTS)), torch.tensor(cached(PROMPTS, TEXTS)), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_adapters_learn_are_merged_and_leave_a_plain_model(family, tmp_path):
    pytest.importorskip("peft")
    model = train(tiny_model(family, seed=1), count=400, lora_rank=4, learning_rate=1e-2).model
    assert evaluate_reward_model(model, toy_rankings(100, 1))["accuracy_per_pair"] > 0.75
    model.save_pretrained(tmp_path)
    assert not any("lora" in name for name in model.model.state_dict())
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(plain) is type(model.model)
    expected = model(PROMPTS, TEXTS)
    assert load_reward_model(tmp_path)(PROMPTS, TEXTS) == pytest.approx(expected, abs=1e-5)


def test_smoothed_labels_have_their_optimum_at_the_noise():
    # d/ds of −(1 − ε) log σ(s) − ε log σ(−s) is 0 where σ(s) = 1 − ε
    gap = torch.tensor([[math.log(0.9 / 0.1), 0.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = ranking_nll(gap, mask, label_smoothing=0.1).sum()
    (gradient,) = torch.autograd.grad(loss, gap)
    assert gradient.abs().max() < 1e-12
    assert loss.item() == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))


def test_centring_draws_the_scores_of_a_prompt_to_zero():
    free = train(center_coef=0.0, normalize=False).model
    held = train(center_coef=1.0, normalize=False).model
    assert abs(sum(held(PROMPTS, TEXTS))) < abs(sum(free(PROMPTS, TEXTS)))


def test_training_stops_when_held_out_nll_rises_and_keeps_the_best_weights():
    held_out = toy_rankings(60, 1)
    settings = RewardConfig(learning_rate=2e-2, batch_size=8, epochs=12, early_stopping_patience=2, normalize=False)
    noise = toy_rankings(40, 0, noise=True)  # nothing to learn: every step away from the start is overfitting
    result = train_reward_model(tiny_model(seed=1), noise, settings, eval_rankings=held_out)
    nlls = [entry["eval_nll_per_ranking"] for entry in result.history if "eval_nll_per_ranking" in entry]
    assert len(nlls) < 12
    assert evaluate_reward_model(result.model, held_out)["nll_per_ranking"] == pytest.approx(min(nlls), abs=1e-6)


def test_ties_have_davidsons_probability(tmp_path):
    mask, ranks = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.int64)
    for strength in (0.5, 2.0):  # equal scores: P(tie) = ν / (2 + ν)
        nll = ranking_nll(torch.zeros(1, 2), mask, ranks=ranks, tie_strength=strength).item()
        assert nll == pytest.approx(-math.log(strength / (2 + strength)))
        # P(a) + P(b) + P(tie) = 1 at any gap
        gap, order = torch.tensor([[0.7, 0.0]]), torch.tensor([[0, 1]])
        parts = [
            ranking_nll(gap, mask, ranks=order, tie_strength=strength),
            ranking_nll(gap.flip(1), mask, ranks=order, tie_strength=strength),
            ranking_nll(gap, mask, ranks=ranks, tie_strength=strength),
        ]
        assert sum(math.exp(-part.item()) for part in parts) == pytest.approx(1.0, abs=1e-6)
    path = tmp_path / "ties.jsonl"
    path.write_text(
        '{"prompt": "is", "chosen": "red", "rejected": "blue", "tie": true}\n'
        '{"prompt": "is", "responses": ["red", "blue", "sky"], "ranking": [2, [0, 1]]}\n'
    )
    rankings = load_rankings(path)
    train_reward_model(tiny_model(seed=1), rankings, RewardConfig(batch_size=2, tie_strength=1.0))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p", "chosen": "a", "rejected": "a"}', "(line|record) 1"),
        ('{"prompt": "p", "responses": ["a", "b"], "ranking": [0, 0]}', "(line|record) 1.*ranking"),
        ('{"prompt": "p", "chosen": "a"', "(line|record) 1"),
    ],
)
def test_a_bad_record_is_named_by_file_line_and_reason(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=f"(?s)bad.jsonl.*{message}"):
        load_rankings(path)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_frozen_trunk_on_cached_features_trains_the_head_that_a_plain_loop_does(kind, tmp_path):
    """The loop runs the whole model on one text at a time in every step, and its trunk gets no gradient."""
    if kind == "gpt2":
        start = TransformerRewardModel.from_language_model(tiny_model(seed=1))
    else:
        start = TransformerRewardModel.from_encoder(encoder_folder("bert", tmp_path))
    rankings = toy_rankings(6, 0)
    settings = {"learning_rate": 1e-2, "lr_schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.05}
    result = train_reward_model(
        start, rankings, RewardConfig(batch_size=6, epochs=5, freeze_trunk=True, normalize=False, **settings)
    )
    model, tokenizer = start.model, start.tokenizer
    head = model.score if kind == "gpt2" else model.classifier
    model.requires_grad_(False)
    head.requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(5):
        losses = []
        for ranking in rankings:
            scores = []
            for text in ranking.responses:
                texts = [f"{ranking.prompt} {text} <eos>"] if kind == "gpt2" else [ranking.prompt, text]
                scores.append(model(**tokenizer(*texts, return_tensors="pt")).logits[0, 0])
            gaps = [better - worse for i, better in enumerate(scores) for worse in scores[i + 1 :]]
            losses.append(-torch.nn.functional.logsigmoid(torch.stack(gaps)).mean())
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 0.05)
        optimizer.step()
    trained = result.model.model.score if kind == "gpt2" else result.model.model.classifier
    assert head.weight.abs().max() > 0.01
    torch.testing.assert_close(trained.weight, head.weight, atol=1e-4, rtol=0)
    assert result.metrics["trained_parameters"] == sum(p.numel() for p in head.parameters())
    ours, plain = torch.tensor(result.model(PROMPTS, TEXTS)), torch.tensor(start(PROMPTS, TEXTS))
    # Up to a constant: comparisons give a bias no gradient but rounding, which Adam blows up.
    torch.testing.assert_close(ours - ours[0], plain - plain[0], atol=1e-4, rtol=0)
