"""Supervised fine-tuning: the loss is a hand-computed NLL; a seed decides the weights and nothing else changes."""

import json
import logging
import math
import random

import numpy as np
import pytest
import torch

from agents.sft import SFTConfig, load_demonstrations, mean_nll, summed_nll, tokenise, train_sft
from tests.conftest import tiny_model
from textenv.data.records import write_jsonl
from textenv.lm import Responses
from textenv.training.batches import Ragged, encode_texts, epoch_windows

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}is {% endif %}"

RECORDS = [
    {"prompt": "what is the sky ?", "completion": "blue"},
    {"prompt": "is <eos> the grass red ?", "completion": "not red the grass is green"},  # EOS inside the prompt
    {"prompt": "the", "completion": "sky sky sky sky sky sky sky is blue"},
    {"prompt": "red green", "completion": ""},  # EOS alone
    {"prompt": "what is red ?", "completion": "the sky is", "truncated": True},
    {"prompt": "grass", "completion": "green"},
]


def negative_logprobs(model, ids):
    """−log p of every token but the first, one sequence at a time, through plain transformers, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return [-(logits[t - 1] - logits[t - 1].logsumexp(0))[ids[t]].item() for t in range(1, len(ids))]


def hand_nll(lm, records, completion_only=True):
    terms = []
    for record in records:
        prompt = lm.tokenizer(record["prompt"]).input_ids
        completion = lm.tokenizer(record["completion"]).input_ids + ([] if record.get("truncated") else [0])
        every = negative_logprobs(lm.model, prompt + completion)
        terms += every[len(prompt) - 1 :] if completion_only else every
    return sum(terms) / len(terms)


def completion_nll(lm, records, *, completion_only=True, batch_size=64):
    examples = tokenise(lm, load_demonstrations(records), SFTConfig(completion_only=completion_only))
    return mean_nll(lm.model, examples, batch_size)


def weights(lm):
    return torch.cat([parameter.detach().flatten() for parameter in lm.model.parameters()])


def config(**options):
    return SFTConfig(**{"learning_rate": 3e-3, "epochs": 2, "batch_size": 2, "logging_steps": 1, **options})


def test_the_nll_of_completions_is_the_hand_computed_one_with_eos_in_it_and_prompts_out(family_model):
    assert completion_nll(family_model, RECORDS) == pytest.approx(hand_nll(family_model, RECORDS), rel=1e-5)


def test_without_completion_only_every_token_but_the_first_counts(family_model):
    nll = completion_nll(family_model, RECORDS, completion_only=False)
    assert nll == pytest.approx(hand_nll(family_model, RECORDS, completion_only=False), rel=1e-5)


def test_the_nll_does_not_depend_on_the_batches():
    lm = tiny_model()
    every = [completion_nll(lm, RECORDS, batch_size=size) for size in (1, 4, 64)]
    assert every == pytest.approx([every[0]] * 3, rel=1e-5)


def test_a_truncated_completion_has_no_eos():
    lm = tiny_model()
    record = {"prompt": "the sky", "completion": "is blue"}
    whole, cut = completion_nll(lm, [record]), completion_nll(lm, [record | {"truncated": True}])
    eos_term = negative_logprobs(lm.model, [*lm.tokenizer("the sky is blue").input_ids, 0])[-1]
    assert 3 * whole - 2 * cut == pytest.approx(eos_term, rel=1e-5)


def test_a_table_says_as_text_whether_a_completion_was_cut_off(tmp_path):
    path = tmp_path / "demos.csv"
    path.write_text("prompt,completion,truncated\np,a,False\np,b,TRUE\np,c,\n")
    assert [demo.truncated for demo in load_demonstrations(path)] == [False, True, False]
    chat = '"[{""role"": ""user"", ""content"": ""p""}, {""role"": ""assistant"", ""content"": ""a""}]"'
    path.write_text(f"messages,truncated\n{chat},false\n{chat},true\n")
    assert [demo.truncated for demo in load_demonstrations(path)] == [False, True]


def test_the_loss_ignores_whatever_stands_in_padding():
    lm = tiny_model()
    batch = Responses(
        torch.tensor([[0, 8, 6], [1, 2, 3]]),
        torch.tensor([2, 3]),
        torch.tensor([[3, 0, 0], [4, 5, 0]]),
        torch.tensor([2, 3]),
    )
    loss = summed_nll(lm.model, batch)
    poisoned = batch._replace(
        prompt_ids=torch.tensor([[9, 8, 6], [1, 2, 3]]), response_ids=torch.tensor([[3, 0, 7], [4, 5, 0]])
    )
    assert torch.equal(loss, summed_nll(lm.model, poisoned))
    terms = negative_logprobs(lm.model, [8, 6, 3, 0])[1:] + negative_logprobs(lm.model, [1, 2, 3, 4, 5, 0])[2:]
    assert loss.item() == pytest.approx(sum(terms), rel=1e-5)


def test_the_first_logged_loss_is_the_nll_before_training_and_held_out_nll_is_logged_every_epoch():
    lm = tiny_model()
    result = train_sft(lm, RECORDS, config(batch_size=6), eval_records=RECORDS[:3])
    assert result.history[0]["loss"] == pytest.approx(hand_nll(lm, RECORDS), rel=1e-4)
    evaluations = [entry["eval_nll"] for entry in result.history if "eval_nll" in entry]
    assert len(evaluations) == 2
    assert result.metrics["eval_nll"] == evaluations[-1] == pytest.approx(hand_nll(result.model, RECORDS[:3]), rel=1e-4)


@pytest.mark.parametrize(("size", "accumulation"), [(3, 2), (2, 3), (1, 6)])
def test_loss_and_gradient_do_not_depend_on_how_a_step_is_split(size, accumulation):
    """Examples of 1 to 10 tokens: averaging micro-batch means, instead of tokens, would show at once."""
    lm = tiny_model()
    options = {"max_grad_norm": None, "epochs": 3, "warmup_ratio": 0.0, "lr_schedule": "constant"}
    whole = train_sft(lm, RECORDS, config(batch_size=6, **options))
    split = train_sft(lm, RECORDS, config(batch_size=size, gradient_accumulation_steps=accumulation, **options))
    for key in ("loss", "grad_norm"):
        assert [h[key] for h in split.history] == pytest.approx([h[key] for h in whole.history], rel=2e-4)


def test_the_given_model_and_the_global_random_states_stay_as_they_were():
    lm = tiny_model()
    # Away from the states that seeding would leave.
    random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    before = weights(lm).clone(), random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    result = train_sft(lm, RECORDS, config())
    after = weights(lm), random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert before[2][0] == after[2][0]
    assert np.array_equal(before[2][1], after[2][1])
    assert before[2][2:] == after[2][2:]
    assert torch.equal(before[3], after[3])
    assert not torch.equal(weights(result.model), before[0])
    assert not result.model.model.training


def test_a_seed_decides_the_weights_bit_for_bit_whatever_the_global_random_state():
    lm = tiny_model()
    first = train_sft(lm, RECORDS, config())
    torch.manual_seed(1234)
    assert torch.equal(weights(first.model), weights(train_sft(lm, RECORDS, config()).model))
    assert not torch.equal(weights(first.model), weights(train_sft(lm, RECORDS, config(seed=1)).model))


def test_a_messages_record_equals_its_prompt_and_completion_twin():
    lm = tiny_model()
    lm.tokenizer.chat_template = TEMPLATE
    chat = [{"role": "user", "content": "what is the sky ?"}]
    answer = {"role": "assistant", "content": "blue"}
    twins = [
        {"messages": [*chat, answer]},
        {"prompt": chat, "completion": "blue"},
        {"prompt": chat, "completion": [answer]},
        {"prompt": "what is the sky ? is ", "completion": "blue"},  # the template written out
    ]
    assert len({completion_nll(lm, [twin]) for twin in twins}) == 1


def test_a_prompt_beside_messages_repeats_them_or_adds_a_system_turn():
    system = {"role": "system", "content": "be brief"}
    chat = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    alone = load_demonstrations([{"messages": chat}])
    assert load_demonstrations([{"prompt": "red", "messages": chat}]) == alone
    (told,) = load_demonstrations([{"prompt": [system, chat[0]], "messages": chat}])
    assert told == alone[0]._replace(prompt=[system, chat[0]])
    with pytest.raises(ValueError, match=r"record 1: a prompt beside whole .* got 'green' beside .*red"):
        load_demonstrations([{"prompt": "green", "messages": chat}])


def test_a_chat_that_the_template_refuses_is_named_with_the_remedy(tmp_path):
    lm, path = tiny_model(), tmp_path / "demos.jsonl"
    chat = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    write_jsonl(path, [{"messages": chat}, {"messages": [{"role": "system", "content": "sky"}, *chat]}])
    with pytest.raises(ValueError, match=r"demos\.jsonl, line 1: a chat prompt needs a chat template"):
        train_sft(lm, path, config())
    lm.tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}red"
    with pytest.raises(ValueError, match=r"demos\.jsonl, line 2: .*\['system', 'user'\].* says: no system. Change the"):
        train_sft(lm, path, config())


def test_a_token_without_a_row_in_the_embedding_is_named():
    lm = tiny_model()  # twelve words
    lm.tokenizer.add_tokens(["new"])
    with pytest.raises(ValueError, match=r"got 'new' \(id 12\): .* ids up to 12, the embedding 12 rows. Use the tok"):
        train_sft(lm, [{"prompt": "red", "completion": "new"}], config())
    with pytest.raises(ValueError, match=r"got 'new' \(id 12\)"):
        lm.encode_prompt("new")


def test_only_the_last_assistant_turn_is_learned():
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (read,) = load_demonstrations([{"messages": [*chat, {"role": "assistant", "content": "d"}]}])
    assert read == (chat, "d", False)


@pytest.mark.parametrize(("words", "cut"), [(2, 0), (3, 1)])
def test_a_completion_that_leaves_no_room_for_a_token_of_its_prompt_is_cut(words, cut):
    """Four tokens, one of them the prompt's: two words and EOS fit, three words lose EOS."""
    records = load_demonstrations([{"prompt": "the", "completion": " ".join(["sky"] * words)}])
    found = tokenise(tiny_model(), records, SFTConfig(max_length=4))
    assert (found.truncated_prompts, found.truncated_completions) == (0, cut)
    assert (found.prompts.lengths.tolist(), found.responses.lengths.tolist()) == ([1], [3])


def test_long_examples_lose_the_left_of_the_prompt_and_long_completions_their_end(caplog):
    lm = tiny_model()
    records = [
        {"prompt": "red green blue sky", "completion": "the grass"},  # 4 + 2 + EOS
        {"prompt": "red green", "completion": "is the grass green ?"},  # 2 + 5 + EOS
        {"prompt": "red", "completion": "blue"},
    ]
    with caplog.at_level(logging.WARNING):
        result = train_sft(lm, records, config(batch_size=3, max_length=5))
    assert (result.metrics["truncated_prompts"], result.metrics["truncated_completions"]) == (2, 1)
    assert "2 prompts and 1 completions were cut" in caplog.text
    kept = [("blue sky", "the grass"), ("green", "is the grass green"), ("red", "blue")]
    expected = [{"prompt": p, "completion": c, "truncated": c.endswith("green")} for p, c in kept]
    assert result.history[0]["loss"] == pytest.approx(hand_nll(lm, expected), rel=1e-4)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, "record 2: a demonstration must have 'prompt' and 'completion'"),
        ({"prompt": 3, "completion": "b"}, "record 2: 'prompt' must be"),
        ({"prompt": "a", "completion": None}, "record 2: the completion must be"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "record 2: 'messages' must be a chat that ends"),
        ({"messages": "a"}, "record 2: 'messages' must be"),
        ({**RECORDS[0], "truncated": "no"}, "record 2: 'truncated' must be true or false, got 'no'"),
    ],
)
def test_a_malformed_record_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        load_demonstrations([RECORDS[0], record])


def test_malformed_jsonl_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "demos.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n{oops\n")
    with pytest.raises(ValueError, match=r"demos\.jsonl, line 2: not valid JSON"):
        train_sft(tiny_model(), path)
    path.write_text(json.dumps(RECORDS[0]) + "\n" + json.dumps({"prompt": "a"}) + "\n")
    with pytest.raises(ValueError, match=r"demos\.jsonl, line 2"):
        train_sft(tiny_model(), path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "", "completion": "blue"}, "a prompt must have a token"),
        ({"prompt": "red", "completion": "", "truncated": True}, "must have a token to learn"),
    ],
)
def test_an_example_without_context_or_content_is_refused(record, message):
    with pytest.raises(ValueError, match=message):
        train_sft(tiny_model(), [record], config())


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"warmup_ratio": 1.0},
        {"max_length": 1},
        {"save_steps": 0},
    ],
)
def test_a_setting_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SFTConfig(**wrong)


def test_an_epoch_shows_every_example_once_in_windows_of_similar_length():
    lengths = torch.tensor(np.random.default_rng(0).integers(1, 100, size=1003))
    orders = [torch.cat(list(epoch_windows(lengths, 8, 0, epoch))).tolist() for epoch in (0, 1, 0)]
    assert all(sorted(order) == list(range(1003)) for order in orders)
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]
    windows = lengths[orders[0][:1000]].reshape(-1, 8)
    padding = 1 - windows.sum() / (8 * windows.max(1).values.sum())
    assert padding < 0.05  # 0.44 in random order
    longest = windows[:50].max(1).values.float()  # one pool
    assert abs(np.corrcoef(longest, np.arange(50))[0, 1]) < 0.5  # in random order, not from short to long


def test_ragged_lists_are_padded_with_zeros_on_either_side():
    ragged = Ragged([[1, 2, 3], [], [4, 5]])
    right, lengths = ragged.padded(torch.tensor([2, 0, 1]))
    assert right.tolist() == [[4, 5, 0], [1, 2, 3], [0, 0, 0]]
    assert lengths.tolist() == [2, 3, 0]
    assert ragged.padded(torch.tensor([2, 0]), left=True)[0].tolist() == [[0, 4, 5], [1, 2, 3]]
    assert Ragged([[1], [2, 3]]).digest() != Ragged([[1, 2], [3]]).digest()


def test_texts_are_tokenised_as_an_environment_does_it():
    from tokenizers.processors import TemplateProcessing

    lm = tiny_model()
    lm.tokenizer.chat_template = TEMPLATE
    lm.tokenizer.add_special_tokens({"bos_token": "<s>"})
    lm.model.resize_token_embeddings(len(lm.tokenizer), mean_resizing=False)
    bos = lm.tokenizer.bos_token_id
    lm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    prompts = ["the sky", [{"role": "user", "content": "the sky"}], "grass", "the sky", "<s> red"]
    prompt_ids, response_ids = encode_texts(lm.tokenizer, prompts, ["blue", "", "red", "is", "sky"])
    assert prompt_ids == [lm.encode_prompt(prompt) for prompt in prompts]
    assert prompt_ids[0] == [bos, 7, 4]
    assert response_ids == [lm.encode_response(text, eos=False) for text in ("blue", "", "red", "is", "sky")]
    # A reward model is handed rendered text: no second BOS.
    assert encode_texts(lm.tokenizer, prompts, [""] * 5, rendered=True)[0][4] == [bos, 1]


@pytest.mark.slow
def test_on_ample_data_the_nll_reaches_the_entropy_and_never_passes_it():
    """Four answers, equally likely, then EOS for sure: the entropy is log 4 / 2 a token."""
    rng = np.random.default_rng(0)
    answers, prompts = ["red", "green", "blue", "grass"], ["what is the sky ?", "the sky is", "what ?"]
    train = [{"prompt": str(rng.choice(prompts)), "completion": str(rng.choice(answers))} for _ in range(2000)]
    held_out = [{"prompt": prompt, "completion": answer} for prompt in prompts for answer in answers]
    result = train_sft(tiny_model(), train, config(epochs=3, batch_size=50, learning_rate=5e-3), eval_records=held_out)
    entropy = math.log(4) / 2
    assert entropy <= result.metrics["eval_nll"] <= 1.05 * entropy
