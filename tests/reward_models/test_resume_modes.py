"""Every way of training resumes as if it had never stopped, trains what an independent loop would, and is measured as
numpy measures it."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from reward_models.heads import features_of_rows, score_head
from reward_models.trainer import RewardConfig, train_reward_model
from reward_models.transformer import TransformerRewardModel
from tests.conftest import tiny_model
from tests.reward_models.test_trainer import toy_rankings
from tests.reward_models.test_training_modes import PROMPTS, TEXTS, encoder  # noqa: F401 (a fixture)

TRAIN, HELD_OUT = toy_rankings(48, 0), toy_rankings(30, 1)
MODES = {
    "lora": {"lora_rank": 2},
    "frozen trunk": {"freeze_trunk": True},
    "frozen embeddings": {"freeze_embeddings": True},
    "early stopping": {"early_stopping_patience": 3, "eval_steps": 2},
    "lora and early stopping": {"lora_rank": 2, "early_stopping_patience": 1, "eval_steps": 1},
    "listwise": {"loss": "listwise"},
    "accumulation": {"batch_size": 4, "gradient_accumulation_steps": 2},
}


def config(**options):
    return RewardConfig(**{"learning_rate": 3e-3, "batch_size": 8, "epochs": 2, "logging_steps": 1, **options})


def all_weights(model: TransformerRewardModel) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in model.model.state_dict().values()])


def stop_at(step):
    def report(done, total, numbers):
        if done == step and total == 12:  # 48 rankings in steps of 8, twice; not the texts of a frozen trunk
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("at", [1, 5, 6])
@pytest.mark.parametrize("mode", sorted(MODES))
def test_a_resumed_run_ends_with_the_same_weights_and_figures(mode, at, tmp_path):
    if "lora" in mode:
        pytest.importorskip("peft")
    settings, lm = config(**MODES[mode]), tiny_model(seed=1)
    straight = train_reward_model(lm, TRAIN, settings, eval_rankings=HELD_OUT)
    if straight.metrics["steps"] <= at:
        pytest.skip("stopped early before that")
    with pytest.raises(KeyboardInterrupt):
        train_reward_model(lm, TRAIN, settings, tmp_path, eval_rankings=HELD_OUT, on_progress=stop_at(at))
    torch.manual_seed(99)
    resumed = train_reward_model(lm, TRAIN, settings, tmp_path, eval_rankings=HELD_OUT, resume=True)
    assert torch.equal(all_weights(resumed.model), all_weights(straight.model))
    assert resumed.metrics["eval_nll"] == straight.metrics["eval_nll"]
    assert resumed.metrics["steps"] == straight.metrics["steps"]
    evaluations = [
        [entry["eval_nll"] for entry in result.history if "eval_nll" in entry] for result in (straight, resumed)
    ]
    assert evaluations[0] == evaluations[1]


def test_a_run_that_had_stopped_early_ends_at_once_with_its_best_weights(tmp_path):
    """Interrupted at the very step at which patience ran out: the checkpoint is written, nothing is left to do."""
    noise = toy_rankings(48, 0, noise=True)
    settings = config(learning_rate=3e-2, early_stopping_patience=1, eval_steps=1, normalize=False)
    lm = tiny_model(seed=1)
    straight = train_reward_model(lm, noise, settings, eval_rankings=HELD_OUT)
    last = int(straight.metrics["steps"])
    assert last < 12
    with pytest.raises(KeyboardInterrupt):
        train_reward_model(lm, noise, settings, tmp_path, eval_rankings=HELD_OUT, on_progress=stop_at(last))
    resumed = train_reward_model(lm, noise, settings, tmp_path, eval_rankings=HELD_OUT, resume=True)
    assert torch.equal(all_weights(resumed.model), all_weights(straight.model))
    assert resumed.metrics["steps"] == last


def test_an_encoder_resumes_too(encoder, tmp_path):  # noqa: F811
    settings = config()
    straight = train_reward_model(TransformerRewardModel.from_encoder(encoder), TRAIN, settings)
    start = TransformerRewardModel.from_encoder(encoder)
    with pytest.raises(KeyboardInterrupt):
        train_reward_model(start, TRAIN, settings, tmp_path, on_progress=stop_at(5))
    resumed = train_reward_model(TransformerRewardModel.from_encoder(encoder), TRAIN, settings, tmp_path, resume=True)
    assert torch.equal(all_weights(resumed.model), all_weights(straight.model))


def test_features_computed_once_train_the_head_that_a_plain_loop_trains():
    """Full-batch AdamW by hand, the trunk run anew in every step: the same weights to float precision."""
    settings = config(freeze_trunk=True, batch_size=48, epochs=8, lr_schedule="constant", warmup_ratio=0.0,
                      max_grad_norm=0.0, normalize=False, learning_rate=1e-2)  # fmt: skip
    ours = score_head(train_reward_model(tiny_model(seed=1), TRAIN, settings).model.model).weight[0]
    model = TransformerRewardModel.from_language_model(tiny_model(seed=1))
    texts = model.encode_rankings(TRAIN)
    weight = torch.zeros(ours.shape, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for _ in range(8):
        features = features_of_rows(model.model, **texts.batch(torch.arange(len(texts.lengths))))
        scores, loss, start = features @ weight, torch.zeros(()), 0
        for ranking in TRAIN:
            own = scores[start : start + len(ranking.responses)]
            start += len(ranking.responses)
            losses = [-torch.nn.functional.logsigmoid(own[i] - own[j]) for j in range(len(own)) for i in range(j)]
            loss = loss + torch.stack(losses).mean() / len(TRAIN)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(ours, weight.detach(), rtol=1e-4, atol=1e-5)


def test_figures_while_training_are_those_that_numpy_finds_at_the_same_step(monkeypatch):
    """At every evaluation: accuracy, NLL and slope of the held-out scores, computed without the package."""
    import reward_models.trainer as trainer

    expected = []
    original = trainer.measure_scores

    def spy(scores, rankings):
        gaps, start = [], 0
        weights = []
        for ranking in rankings:
            own = scores[start : start + len(ranking.responses)].double().numpy()
            start += len(own)
            pairs = [own[i] - own[j] for j in range(len(own)) for i in range(j)]
            gaps += pairs
            weights += [1 / len(pairs)] * len(pairs)
        gap, weight = np.array(gaps), np.array(weights) / len(rankings)
        grid = np.linspace(-100, 100, 400_001)
        fits = [float(np.sum(weight * np.logaddexp(0, -b * gap))) for b in (grid[::2_000])]
        expected.append(
            {
                "eval_accuracy": float(np.sum(weight * ((gap > 0) + 0.5 * (gap == 0)))),
                "eval_nll": float(np.sum(weight * np.logaddexp(0, -gap))),
                "best_slope_nll": min(fits),
            }
        )
        expected[-1]["gap"], expected[-1]["weight"] = gap, weight
        return original(scores, rankings)

    monkeypatch.setattr(trainer, "measure_scores", spy)
    result = train_reward_model(tiny_model(seed=1), TRAIN, config(eval_steps=2), eval_rankings=HELD_OUT)
    told = [entry for entry in result.history if "eval_nll" in entry]
    assert [entry["step"] for entry in told] == [2, 4, 6, 8, 10, 12]
    assert len(told) == len(expected)
    for entry, own in zip(told, expected, strict=True):
        assert entry["eval_accuracy"] == pytest.approx(own["eval_accuracy"], abs=1e-6)
        assert entry["eval_nll"] == pytest.approx(own["eval_nll"], abs=1e-6)
        at_slope = np.sum(own["weight"] * np.logaddexp(0, -entry["eval_calibration_slope"] * own["gap"]))
        assert at_slope <= own["best_slope_nll"] + 1e-9


def test_an_encoder_scores_alike_through_plain_transformers_on_padded_pairs(encoder, tmp_path):  # noqa: F811
    settings = config(epochs=4)
    model = train_reward_model(TransformerRewardModel.from_encoder(encoder), TRAIN, settings, tmp_path).model
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(PROMPTS, TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = plain(**{k: v for k, v in batch.items() if k != "token_type_ids" or plain.config.model_type == "bert"})
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 1, "rows of different length"
    assert logits.logits[:, 0].tolist() == pytest.approx(model(PROMPTS, TEXTS), abs=1e-5)


def test_a_reward_model_reads_chats_by_its_own_template_and_ending(text_options, tmp_path):
    """The policy's template has no names of speakers, the reward model's has, and an end of turn after each."""
    import gymnasium

    lm = tiny_model(seed=3)
    lm.tokenizer.chat_template = "{% for m in messages %}the {{ m['content'] }} {% endfor %}"
    lm.save_pretrained(tmp_path / "policy")
    judge = tiny_model(seed=4)
    judge.tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}what {% else %}is {% endif %}"
        "{{ m['content'] }} ? {% endfor %}"
        "{% if add_generation_prompt %}is {% endif %}"
    )
    model = TransformerRewardModel.from_language_model(judge)
    with torch.no_grad():
        score_head(model.model).weight.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "judge")
    chat = [{"role": "user", "content": "sky"}]
    env = gymnasium.make(
        "textenv/Text-v0",
        **{
            **text_options,
            "prompts": [chat],
            "reference": str(tmp_path / "policy"),
            "reward_model": str(tmp_path / "judge"),
        },
    )
    env.reset(seed=0)
    for action in (3, 4, 0):
        *_, info = env.step(action)
    assert (info["prompt"].split(), info["response"]) == (["the", "sky"], "blue sky")
    ids = judge.tokenizer("what sky ? is blue sky ?", add_special_tokens=False).input_ids
    with torch.no_grad():
        hidden = model.model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
        by_hand = float(hidden @ score_head(model.model).weight[0])
    assert info["rm_score"] == pytest.approx(by_hand, abs=1e-5)
    assert not math.isclose(by_hand, model(["the sky"], ["blue sky"])[0], abs_tol=1e-3)


def test_truncated_prompts_are_counted_in_the_metrics_of_a_training(tmp_path):
    long = [{"prompt": "red " * 80 + "what is", "chosen": "blue", "rejected": "red green"} for _ in range(3)]
    for options in ({}, {"freeze_trunk": True}):
        result = train_reward_model(tiny_model(), [*long, *TRAIN], config(epochs=1, normalize=False, **options))
        assert result.metrics["truncated_prompts"] == 6, "three prompts with two responses each"
