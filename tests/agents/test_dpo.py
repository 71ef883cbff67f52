"""Offline DPO: losses by hand, log-ratios by plain forward passes, its optimum by enumeration; runs resume."""

import json
import math

import gymnasium
import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from agents.dpo import DPOConfig, encode, ipo_loss, train_dpo
from agents.dpo.trainer import _summed_loss
from reward_models.preferences import LAYOUTS, Ranking, Turns
from reward_models.training.losses import ranking_nll
from tests.conftest import tiny_model
from tests.textenv.lm.test_chat import chat_model
from textenv.cli import main
from textenv.data.records import write_jsonl
from textenv.lm import load_language_model
from textenv.tasks.exact import exact_world

RANKINGS = [
    Ranking("what is the sky ?", ("blue", "red green", "the grass")),
    Ranking("is <eos> the grass red ?", ("not red the grass is green", "red")),  # EOS inside the prompt
    Ranking("the", ("sky sky sky is blue", "", "red"), ranks=(0, 1, 1)),  # the empty one is EOS alone
    Ranking("grass", ("green", "the sky is"), finish_reasons=("eos", "length"), margin=0.5),
]


def config(**options):
    return DPOConfig(**{"learning_rate": 3e-3, "epochs": 2, "batch_size": 2, "logging_steps": 1, **options})


def weights(lm):
    return torch.cat([parameter.detach().flatten() for parameter in lm.model.parameters()])


def plain_logprob(lm, prompt, response, ended=True):
    """log π(y|x) of one response, one sequence at a time, through plain transformers, in float64."""
    head = lm.tokenizer(prompt).input_ids
    ids = head + lm.tokenizer(response).input_ids + [0] * ended
    with torch.no_grad():
        logprobs = lm.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logprobs[t - 1, ids[t]].item() for t in range(len(head), len(ids)))


def log_ratio(policy, reference, ranking, i):
    ended = not ranking.finish_reasons or ranking.finish_reasons[i] != "length"
    own, ref = (plain_logprob(lm, ranking.prompt, ranking.responses[i], ended) for lm in (policy, reference))
    return own - ref


def hand_loss(policy, reference, ranking, *, beta=0.1, loss="sigmoid", smoothing=0.0):
    """The mean over the pairs of one ranking."""
    losses = []
    for i in range(len(ranking.responses)):
        for j in range(i + 1, len(ranking.responses)):
            gap = log_ratio(policy, reference, ranking, i) - log_ratio(policy, reference, ranking, j)
            tied = ranking.levels[i] == ranking.levels[j]
            wrong = 0.5 if tied else smoothing
            for weight, sign in ((1 - wrong, 1), (wrong, -1)):
                if loss == "ipo":
                    term = (gap - (0 if tied else sign / (2 * beta))) ** 2
                else:
                    margin = 0 if tied else ranking.margin
                    term = math.log1p(math.exp(-sign * (beta * gap - margin)))
                losses.append((weight * term, i, j))
    return sum(term for term, *_ in losses) / len({(i, j) for _, i, j in losses})


def test_the_ipo_loss_is_the_squared_distance_of_each_gap_from_its_target():
    """β = ¼ aims at a gap of 2: gaps 3 and (1, 1, 0), the last pair tied; then a padded row of NaN."""
    ratios = torch.tensor([[2.0, -1.0, math.nan], [1.0, 0.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    ranks = torch.tensor([[0, 1, 0], [0, 1, 1]])
    plain = ipo_loss(ratios, mask, ranks=ranks, beta=0.25)
    assert plain.tolist() == [1, pytest.approx((1 + 1 + 0) / 3)]
    plain.sum().backward()
    assert ratios.grad[0].tolist() == [2, -2, 0]
    smoothed = ipo_loss(ratios, mask, ranks=ranks, beta=0.25, label_smoothing=0.1)
    assert smoothed.tolist() == pytest.approx([0.9 * 1 + 0.1 * 25, 2 * (0.9 * 1 + 0.1 * 9) / 3])


def test_label_smoothing_moves_the_best_gap_of_ipo():
    gap = torch.zeros(1, 2).double().requires_grad_()
    mask, ranks = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0, 1]])
    for _ in range(200):
        loss = ipo_loss(gap, mask, ranks=ranks, beta=0.25, label_smoothing=0.1)
        (slope,) = torch.autograd.grad(loss.sum(), gap)
        gap = (gap - 0.1 * slope).detach().requires_grad_()
    gap = gap.detach()
    assert float(gap[0, 0] - gap[0, 1]) == pytest.approx(0.8 * 2)


@pytest.mark.parametrize(("loss", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("ipo", 0.2)])
def test_the_logged_losses_are_those_done_by_hand_before_and_after_a_step(loss, smoothing):
    """The second loss on the same ranking is that of the policy which the first step left."""
    lm = tiny_model()
    kept = [ranking._replace(margin=0.0) if loss == "ipo" else ranking for ranking in RANKINGS]
    for ranking in kept:
        at_start = train_dpo(lm, [ranking], config(loss=loss, label_smoothing=smoothing, epochs=1))
        expected = hand_loss(lm, lm, ranking, loss=loss, smoothing=smoothing)
        assert at_start.history[0]["loss"] == pytest.approx(expected, rel=1e-4)
        options = {"loss": loss, "label_smoothing": smoothing, "warmup_ratio": 0.0, "lr_schedule": "constant"}
        once = train_dpo(lm, [ranking], config(epochs=1, **options)).model
        twice = train_dpo(lm, [ranking], config(epochs=2, **options))
        expected = hand_loss(once, lm, ranking, loss=loss, smoothing=smoothing)
        assert twice.history[1]["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_log_ratios_are_those_of_plain_forward_passes_and_zero_at_the_start(family_model):
    texts = encode(family_model, RANKINGS, config())
    flat = [(r, i) for r in RANKINGS for i in range(len(r.responses))]
    ended = [not r.finish_reasons or r.finish_reasons[i] != "length" for r, i in flat]
    expected = [plain_logprob(family_model, r.prompt, r.responses[i], e) for (r, i), e in zip(flat, ended, strict=True)]
    assert texts.ref_logprobs.tolist() == pytest.approx(expected, rel=1e-4)
    assert texts.log_ratios(family_model.model, 3).abs().max() < 1e-4


@pytest.mark.parametrize(("size", "accumulation"), [(2, 2), (1, 4)])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_loss_and_gradient_do_not_depend_on_how_a_step_is_split(loss, size, accumulation):
    lm = tiny_model()
    rankings = [ranking._replace(margin=0.0) for ranking in RANKINGS]
    options = {"max_grad_norm": None, "epochs": 3, "loss": loss}
    whole = train_dpo(lm, rankings, config(batch_size=4, **options))
    split = train_dpo(lm, rankings, config(batch_size=size, gradient_accumulation_steps=accumulation, **options))
    for key in ("loss", "grad_norm"):
        assert [h[key] for h in split.history] == pytest.approx([h[key] for h in whole.history], rel=1e-3)


def test_whatever_stands_on_padding_changes_nothing():
    """A response beside a long one has padding; the NaN that the model gives a poisoned token would show."""
    lm = tiny_model()
    texts = encode(lm, RANKINGS, config())
    batch = texts.responses_of(torch.arange(10))
    assert not batch.response_mask.all()
    poisoned = batch._replace(response_ids=batch.response_ids.masked_fill(~batch.response_mask, 7))
    real = torch.arange(batch.prompt_ids.shape[1]) >= batch.prompt_ids.shape[1] - batch.prompt_lengths[:, None]
    poisoned = poisoned._replace(prompt_ids=batch.prompt_ids.masked_fill(~real, 9))
    fields = {"counts": torch.tensor([3, 2, 3, 2]), "ranks": torch.tensor([0, 1, 2, 0, 1, 0, 1, 1, 0, 1])}
    fields |= {"margins": torch.zeros(4), "ref_logprobs": texts.ref_logprobs - torch.arange(10.0)}
    for loss in ("sigmoid", "ipo"):
        gradients = []
        for tokens in (batch, poisoned):
            lm.model.zero_grad()
            value = _summed_loss(config(loss=loss))(lm.model, **fields, **tokens._asdict())
            value.backward()
            gradients.append([value.detach(), *(p.grad.clone() for p in lm.model.parameters())])
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_ties_alone_are_refused_and_equal_responses_make_no_nan():
    lm = tiny_model()
    tie = Ranking("red", ("green", "blue"), ranks=(0, 0))
    with pytest.raises(ValueError, match="a ranking of single turns that is not a tie, got 1 without one"):
        train_dpo(lm, [tie], config())
    same = Ranking("red", ("green", "green", "blue"), ranks=(0, 1, 1))
    result = train_dpo(lm, [same, tie], config())
    assert torch.isfinite(weights(result.model)).all()
    assert math.isfinite(result.history[-1]["loss"])


def test_the_policy_moves_towards_what_is_preferred_and_held_out_pairs_tell():
    lm = tiny_model()
    result = train_dpo(lm, RANKINGS, config(epochs=20), eval_rankings=RANKINGS)
    at_start = train_dpo(lm, RANKINGS, config(learning_rate=1e-12, epochs=1), eval_rankings=RANKINGS)
    assert at_start.metrics["eval_nll_per_pair"] == pytest.approx(math.log(2), rel=1e-3)
    assert result.metrics["eval_accuracy_per_pair"] == 1.0
    gaps = []
    for r in RANKINGS:
        for i in range(len(r.responses)):
            for j in range(i + 1, len(r.responses)):
                if r.levels[i] < r.levels[j]:
                    gaps.append(0.1 * (log_ratio(result.model, lm, r, i) - log_ratio(result.model, lm, r, j)))
    assert result.metrics["eval_margin_per_pair"] == pytest.approx(np.mean(gaps), rel=1e-3)
    assert result.metrics["eval_nll_per_pair"] == pytest.approx(-logsigmoid(torch.tensor(gaps)).mean().item(), rel=1e-3)
    assert len([entry for entry in result.history if "eval_nll_per_pair" in entry]) == 20


def test_the_given_model_stays_as_it_was():
    lm = tiny_model()
    before = weights(lm).clone()
    result = train_dpo(lm, RANKINGS, config())
    assert torch.equal(weights(lm), before)
    assert not torch.equal(weights(result.model), before)
    assert not result.model.model.training


@pytest.mark.parametrize("at", [1, 2, 4])
def test_resuming_equals_never_having_stopped(tmp_path, at):
    def stop(step, total, numbers):
        if step == at:
            raise KeyboardInterrupt

    lm = tiny_model()
    straight = train_dpo(lm, RANKINGS, config(), eval_rankings=RANKINGS)
    with pytest.raises(KeyboardInterrupt):
        train_dpo(lm, RANKINGS, config(), tmp_path, on_progress=stop)
    for other, what in ((tiny_model(seed=1), "model"), (lm, "data")):
        with pytest.raises(ValueError, match=f"resumed with the {what} it started with"):
            train_dpo(other, RANKINGS if what == "model" else RANKINGS[::-1], config(), tmp_path, resume=True)
    resumed = train_dpo(lm, RANKINGS, config(), tmp_path, resume=True, eval_rankings=RANKINGS)
    assert torch.equal(weights(resumed.model), weights(straight.model))
    assert torch.equal(weights(load_language_model(tmp_path)), weights(straight.model))
    assert resumed.metrics["eval_nll_per_pair"] == straight.metrics["eval_nll_per_pair"]


def test_a_long_prompt_loses_its_left_for_all_responses_alike_and_a_long_response_its_end():
    lm = tiny_model()
    rankings = [
        Ranking("the sky is blue not red", ("green", "red blue")),  # 6 tokens; the longest response has 3 with EOS
        Ranking("grass", ("red green blue sky grass is the", "red")),  # 8 with EOS
    ]
    texts = encode(lm, rankings, config(max_length=6))
    words = lm.tokenizer("the sky is blue not red").input_ids
    batch = texts.responses_of(torch.arange(4))
    rows = [
        row[len(row) - n :] for row, n in zip(batch.prompt_ids.tolist(), batch.prompt_lengths.tolist(), strict=True)
    ]
    assert rows[:2] == [words[3:], words[3:]]
    assert batch.response_lengths.tolist() == [2, 3, 5, 2]
    assert batch.response_ids[2].tolist() == lm.tokenizer("red green blue sky grass").input_ids  # without EOS
    assert (texts.truncated_prompts, texts.truncated_responses) == (1, 1)


def test_a_chat_goes_through_the_template_and_ends_with_its_own_token():
    lm = chat_model()
    chat = [{"role": "user", "content": "what is the sky ?"}]
    texts = encode(lm, [Ranking(chat, ("blue", "red"))], config())
    batch = texts.responses_of(torch.arange(2))
    assert batch.prompt_ids[0].tolist() == lm.encode_prompt(chat)
    assert batch.response_ids[0].tolist() == [*lm.tokenizer("blue").input_ids, lm.turn_end_id]
    assert lm.turn_end_id != lm.eos_id


def test_responses_of_several_turns_are_left_out_and_counted(caplog):
    turns = [Turns([{"role": r, "content": c} for r, c in zip(("assistant", "user", "assistant"), text, strict=True)])
             for text in (("red", "not", "blue"), ("red", "is", "sky"))]  # fmt: skip
    start, more = "\n\nHuman: red\n\nAssistant:", "\n\nHuman: not\n\nAssistant: blue"
    as_text = {"chosen": f"{start} the sky", "rejected": f"{start} red{more}"}
    result = train_dpo(tiny_model(), [*RANKINGS, Ranking("the", tuple(turns)), as_text], config())
    assert result.metrics["left_out"] == 2
    assert "2 of 6 rankings left out" in caplog.text
    assert torch.equal(weights(result.model), weights(train_dpo(tiny_model(), RANKINGS, config()).model))


def test_what_the_model_cannot_read_is_named():
    lm = tiny_model()
    chats = [{"role": "system", "content": "sky"}, {"role": "user", "content": "red"}]
    lm.tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}red"
    with pytest.raises(ValueError, match=r"record 2: a chat must be one .* says: no system. Change the chat"):
        train_dpo(lm, [Ranking("red", ("the", "sky")), Ranking(chats, ("the", "sky"))], config())
    lm.tokenizer.add_tokens(["new"])
    with pytest.raises(ValueError, match=r"got 'new' \(id 12\): .* ids up to 12, the embedding 12 rows"):
        train_dpo(lm, [Ranking("red", ("the", "new"))], config())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPOConfig(beta=0.0), r"beta must be above 0, got 0\.0"),
        (
            lambda: DPOConfig(label_smoothing=0.5),
            "label_smoothing must be at least 0 and below 0.5, got 0.5. At a half",
        ),
        (lambda: DPOConfig(loss="hinge"), "loss must be one of 'sigmoid', 'ipo', got 'hinge'"),
        (lambda: DPOConfig(max_length=1), "max_length must be 2 or more, got 1"),
        (lambda: train_dpo(tiny_model(), RANKINGS, config(loss="ipo")), "margins need loss='sigmoid', got 'ipo'. Drop"),
        (lambda: train_dpo(tiny_model(), [{"prompt": "red"}], config()), "record 1: "),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


RECORDS = {
    "pair": {"prompt": "the sky is", "chosen": "blue", "rejected": "red"},
    "ranking": {"prompt": "the sky is", "responses": ["red", "blue"], "ranking": [1, 0]},
    "dialogues": {"chosen": "\n\nHuman: sky ?\n\nAssistant: blue", "rejected": "\n\nHuman: sky ?\n\nAssistant: red"},
    "shp": {"history": "the sky is", "human_ref_A": "blue", "human_ref_B": "red", "labels": 1},
}


@pytest.mark.parametrize("layout", RECORDS)
def test_the_command_trains_on_every_layout_resumes_and_writes_a_hugging_face_folder(
    tmp_path, capsys, monkeypatch, layout
):
    assert layout in [known.name for known in LAYOUTS]
    monkeypatch.chdir(tmp_path)
    lm = chat_model() if layout == "dialogues" else tiny_model()
    lm.save_pretrained("start")
    write_jsonl("pairs.jsonl", [RECORDS[layout]] * 4)
    arguments = ["dpo", "--model", "start", "--data", "pairs.jsonl", "--eval-data", "pairs.jsonl", "--output", "out"]
    arguments += ["--learning-rate", "1e-2", "--batch-size", "2", "--beta", "0.2", "--label-smoothing", "0.1"]
    assert main([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["eval_accuracy_per_pair"] == 1.0
    assert figures["eval_margin_per_pair"] > 0
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("start", "out"))
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert main(arguments) == 2
    assert "output must hold no finished model" in capsys.readouterr().err


def test_with_bradley_terry_labels_the_exact_optimum_is_where_the_expected_loss_has_no_slope():
    """Every pair of responses to a prompt in both orders, each as likely as the annotator's labels make it."""
    world = exact_world(gymnasium.make("textenv/Micro-v0", max_new_tokens=2))
    first, second = torch.triu_indices(len(world.lengths), len(world.lengths), offset=1)
    mask = torch.ones(len(first), 2, dtype=torch.bool)

    def slope(policy):
        h = (policy - world.ref_logprobs)[0].clone().requires_grad_()
        better = torch.sigmoid(world.rewards[0, first] - world.rewards[0, second])
        pairs = torch.stack([h[first], h[second]], 1)
        losses = (ranking_nll(world.kl_coef * order, mask) for order in (pairs, pairs.flip(1)))
        loss = sum((chance * nll).sum() for chance, nll in zip((better, 1 - better), losses, strict=True))
        return torch.autograd.grad(loss, h)[0].abs().max().item()

    assert slope(world.optimum().logprobs) < 1e-9
    assert slope(world.ref_logprobs) > 0.1
