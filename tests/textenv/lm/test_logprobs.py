"""Log-probabilities, values and sampling do not depend on padding, batch or cache; the oracle is one unpadded row."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import LLAMA, tiny_model
from textenv.lm import (
    Responses,
    ScalarHead,
    TokenRule,
    disable_dropout,
    gather_predictions,
    pad_left,
    pad_right,
    response_logprobs,
    response_outputs,
    rows,
    sample_responses,
)
from textenv.lm.decoding import decodes_with_cache
from textenv.lm.load import has_plain_head

RULE = TokenRule(temperature=0.8, min_new_tokens=1, stop_ids=(0,))
PROMPTS = [[1, 2, 3], [4], [0, 5, 0, 6, 7], [8, 9], [2, 2, 2, 2], [10], [3, 0], [7, 6, 5, 4, 3, 2]]
RESPONSES = [[4, 5, 0], [6, 0], [1, 2, 3, 4, 5, 0], [9, 9, 9, 9, 9, 9], [3, 0], [1, 1, 0], [2, 0], [5]]


def batch_of(indices, left=0, right=0, fill=0):
    """A batch with extra padding columns that hold ``fill``."""
    prompts, responses = [PROMPTS[i] for i in indices], [RESPONSES[i] for i in indices]
    width = max(map(len, prompts)) + left
    length = max(map(len, responses)) + right
    return Responses(*pad_left(prompts, fill, width), *pad_right(responses, fill, length))


@torch.no_grad()
def alone(model, prompt, response, rule=RULE):
    """One row, no padding, no cache, plain transformers, float64 softmax."""
    ids = torch.tensor([prompt + response])
    logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0].double() / rule.temperature
    out = []
    for t, token in enumerate(response):
        row = logits[len(prompt) + t - 1].clone()
        if t < rule.min_new_tokens:
            row[list(rule.stop_ids)] = -torch.inf
        out.append(torch.log_softmax(row, -1)[token])
    return torch.stack(out).float()


@pytest.mark.parametrize(("left", "right", "fill"), [(0, 0, 0), (1, 0, 0), (3, 2, 11), (7, 5, 0), (0, 9, 5)])
@pytest.mark.parametrize("size", [1, 4, 64])
def test_logprobs_equal_those_of_a_lone_row_whatever_the_padding_and_batch(family_model, left, right, fill, size):
    batch = batch_of(range(8), left, right, fill)
    got = response_logprobs(family_model.model, batch, RULE, batch_size=size)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        torch.testing.assert_close(
            got[row, : len(response)], alone(family_model.model, prompt, response), atol=1e-5, rtol=0
        )
        assert (got[row, len(response) :] == 0).all()


def test_logprobs_do_not_depend_on_who_else_is_in_the_batch(family_model):
    whole = response_logprobs(family_model.model, batch_of(range(8)), RULE)
    for indices in ([3], [7, 3], [3, 0, 1, 2]):
        part = response_logprobs(family_model.model, batch_of(indices), RULE)
        width = part.shape[1]
        torch.testing.assert_close(part, whole[torch.tensor(indices), :width], atol=1e-5, rtol=0)


def test_the_shift_is_one_token(family_model):
    """Response token t of a prompt of p tokens is predicted at column p + t − 1 of the joined row."""
    joined = rows(batch_of([0, 1]))
    assert joined.input_ids.tolist() == [[1, 2, 3, 4, 5, 0], [4, 6, 0, 0, 0, 0]]
    assert joined.predictors.tolist() == [[2, 3, 4], [0, 1, 0]]


def test_decoding_with_a_cache_gives_the_logprobs_and_values_of_teacher_forcing(family_model):
    """Left padding, the cache and rows leaving the batch change nothing that is reported."""
    prompts, lengths = pad_left(PROMPTS * 6, 0, 9)
    head = ScalarHead(family_model.hidden_size)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(0))
    sampled = sample_responses(
        family_model.model,
        prompts,
        lengths,
        max_new_tokens=12,
        rule=RULE,
        pad_id=0,
        generator=torch.Generator().manual_seed(0),
        value_head=head,
    )
    assert len(set(sampled.response_lengths.tolist())) > 4
    batch = Responses(prompts, lengths, sampled.response_ids, sampled.response_lengths)
    again = response_logprobs(family_model.model, batch, RULE)
    torch.testing.assert_close(sampled.logprobs, again, atol=1e-5, rtol=0)
    with torch.no_grad():
        _, hidden = response_outputs(family_model.model, batch, RULE)
        values = gather_predictions(head(hidden), batch)
    torch.testing.assert_close(sampled.values, values, atol=1e-5, rtol=0)
    assert (values[batch.response_mask].abs() > 1e-3).float().mean() > 0.9


def test_sampled_responses_end_at_their_first_stop_token_and_are_padded_after_it(family_model):
    prompts, lengths = pad_left(PROMPTS * 20, 0)
    sampled = sample_responses(
        family_model.model,
        prompts,
        lengths,
        max_new_tokens=7,
        rule=TokenRule(stop_ids=(0, 5)),
        pad_id=11,
        generator=torch.Generator().manual_seed(1),
    )
    for ids, length in zip(sampled.response_ids.tolist(), sampled.response_lengths.tolist(), strict=True):
        ending = [t for t, token in enumerate(ids[:length]) if token in (0, 5)]
        assert ending == [length - 1] or (not ending and length == 7)
        assert ids[length:] == [11] * (7 - length)


def test_a_seed_draws_the_same_and_greedy_takes_the_most_likely(family_model):
    prompts, lengths = pad_left(PROMPTS, 0)

    def draw(seed=0, greedy=False):
        return sample_responses(
            family_model.model,
            prompts,
            lengths,
            max_new_tokens=5,
            rule=RULE,
            pad_id=0,
            generator=torch.Generator().manual_seed(seed),
            greedy=greedy,
        ).response_ids

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    assert torch.equal(draw(3, greedy=True), draw(4, greedy=True))
    first = draw(greedy=True)[:, 0]
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        logits = family_model.model(ids, attention_mask=torch.ones_like(ids)).logits[0, -1].detach()
        logits[0] = -torch.inf
        assert first[row] == logits.argmax()


def test_a_model_that_caps_its_logits_takes_the_slow_path_and_is_right():
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    config = AutoConfig.for_model(
        "gemma2", vocab_size=12, final_logit_softcapping=0.5, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.4, generator=torch.Generator().manual_seed(0))
    disable_dropout(model)
    assert not has_plain_head(model)
    got = response_logprobs(model, batch_of(range(8)), RULE)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        torch.testing.assert_close(got[row, : len(response)], alone(model, prompt, response), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "cached"), [("jamba", True), ("mamba", False), ("recurrent_gemma", False), ("rwkv", False)]
)
def test_a_model_with_a_state_reports_its_own_logprobs(family, cached):
    """State that padding enters, or that no cache carries, is measured, and each step reads the whole row instead."""
    lm = tiny_model(family)
    assert decodes_with_cache(lm.model) is cached
    prompts, lengths = pad_left(PROMPTS, 11)
    half = TokenRule(temperature=0.8, min_new_tokens=1, stop_ids=(0, 1, 2, 3, 4, 5))  # rows leave the batch on the way
    draw = {"max_new_tokens": 6, "rule": half, "pad_id": 0, "generator": torch.Generator().manual_seed(0)}
    sampled = sample_responses(lm.model, prompts, lengths, **draw)
    assert len(set(sampled.response_lengths.tolist())) > 1
    batch = Responses(prompts, lengths, sampled.response_ids, sampled.response_lengths)
    scored = response_logprobs(lm.model, batch, half)
    for row, prompt in enumerate(PROMPTS):
        count = int(sampled.response_lengths[row])
        own = alone(lm.model, prompt, sampled.response_ids[row, :count].tolist(), half)
        torch.testing.assert_close(sampled.logprobs[row, :count], own, atol=2e-5, rtol=0)
        torch.testing.assert_close(scored[row, :count], own, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attention_model_is_decoded_with_its_cache_in_any_precision(family_model, dtype):
    assert decodes_with_cache(copy.deepcopy(family_model.model).to(dtype))


def test_how_a_model_decodes_is_measured_once_and_in_the_precision_of_its_weights():
    model, lowered = tiny_model().model, []
    model.base_model.register_forward_pre_hook(lambda *_: lowered.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        assert decodes_with_cache(model)
        passes = len(lowered)
        assert decodes_with_cache(model)
    assert passes > 0
    assert lowered == [False] * passes


def test_a_model_that_looks_ahead_is_refused_by_name():
    config = AutoConfig.for_model("bert", vocab_size=12, initializer_range=0.4, **LLAMA)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=r"from those before it alone, got BertLMHeadModel\. Use a causal"):
        sample_responses(model, *pad_left(PROMPTS, 0), max_new_tokens=2, rule=RULE, pad_id=0, greedy=True)


def test_nothing_that_matters_is_random_after_loading():
    """Dropout is off even in train mode."""
    model = tiny_model("llama").model
    ids = torch.tensor([[1, 2, 3]])
    model.train()
    torch.testing.assert_close(model(ids).logits, model(ids).logits, atol=0, rtol=0)


def test_saving_and_loading_keeps_the_function(tmp_path, family_model):
    from textenv.lm import load_language_model

    family_model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = load_language_model(tmp_path)
    assert (loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (0, 0, 12)
    assert loaded.encode_prompt("the sky is blue") == family_model.encode_prompt("the sky is blue") == [7, 4, 6, 3]
    want = response_logprobs(family_model.model, batch_of(range(8)), RULE)
    assert torch.equal(response_logprobs(loaded.model, batch_of(range(8)), RULE), want)


def test_a_folder_that_is_no_model_is_a_clear_error(tmp_path):
    from textenv.lm import load_language_model

    with pytest.raises(ValueError, match=r"a registered name, a folder, a hub id or a \.gguf file"):
        load_language_model(tmp_path)
