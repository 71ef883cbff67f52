"""The shift, sampling, and how models that are not plain attention are run; ``tests/test_families.py`` has the rest."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import LLAMA, tiny_model
from tests.oracles import alone
from textenv.lm import (
    Responses,
    TokenRule,
    decoding,
    length_buckets,
    pad_left,
    pad_right,
    response_logprobs,
    rows,
    sample_responses,
)
from textenv.lm.decoding import CachedDecoding, decodes_with_cache

RULE = TokenRule(temperature=0.8, min_new_tokens=1, stop_ids=(0,))
PROMPTS = [[1, 2, 3], [4], [0, 5, 0, 6, 7], [8, 9], [2, 2, 2, 2], [10], [3, 0], [7, 6, 5, 4, 3, 2]]


def test_the_shift_is_one_token():
    """Response token t of a prompt of p tokens is predicted at column p + t − 1 of the joined row."""
    joined = rows(Responses(*pad_left(PROMPTS[:2], 0), *pad_right([[4, 5, 0], [6, 0]], 0)))
    assert joined.input_ids.tolist() == [[1, 2, 3, 4, 5, 0], [4, 6, 0, 0, 0, 0]]
    assert joined.predictors.tolist() == [[2, 3, 4], [0, 1, 0]]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_that_goes_wrong_is_noticed_in_any_precision_and_said(family_model, dtype, monkeypatch, caplog):
    start = CachedDecoding.__init__

    def sees_the_padding(self, *args):
        start(self, *args)
        self.attention = torch.ones_like(self.attention)

    monkeypatch.setattr(CachedDecoding, "__init__", sees_the_padding)
    assert not decodes_with_cache(copy.deepcopy(family_model.model).to(dtype))
    assert "is wrong with a cache: every token reads its row anew" in caplog.text


@pytest.mark.parametrize(
    ("distances", "cached"), [([0.4, 0.01, 0.4], True), ([0.4, 0.4, 0.01], True), ([0.4, 0.4, 0.4], False)]
)
def test_a_few_tokens_that_bfloat16_rounds_badly_do_not_cost_the_cache(distances, cached, monkeypatch):
    """With its first tokens, special ones, SmolLM2 in bfloat16 is 0.4 off with a cache; with others 0.02."""
    found = iter(distances + [0.0] * 3)
    monkeypatch.setattr(decoding, "_distance", lambda *_: next(found))
    assert decodes_with_cache(tiny_model().model.to(torch.bfloat16)) is cached


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


@pytest.mark.parametrize(
    ("family", "value", "message"),
    [
        ("gpt2", "nan", "NaN or infinite entries"),
        ("llama", "inf", "NaN or infinite entries"),
        ("mamba", "nan", "NaN or infinite entries"),
        ("gpt2", "1e30", "NaN or infinite logits"),
    ],
)
def test_a_model_without_numbers_is_refused_as_that(family, value, message):
    """Entries of 1e30 are finite, but the square of a hidden state is not, whose root divides it."""
    model = tiny_model(family).model
    for weight in model.parameters():
        weight.data.fill_(float(value))
    with pytest.raises(ValueError, match=f"must predict with finite numbers, .*{message}"):
        decodes_with_cache(model)


def test_nothing_that_matters_is_random_after_loading():
    """Dropout is off even in train mode."""
    model = tiny_model("llama").model
    ids = torch.tensor([[1, 2, 3]])
    model.train()
    torch.testing.assert_close(model(ids).logits, model(ids).logits, atol=0, rtol=0)


def test_a_folder_that_is_no_model_is_a_clear_error(tmp_path):
    from textenv.lm import load_language_model

    with pytest.raises(ValueError, match=r"a registered name, a folder, a hub id or a \.gguf file"):
        load_language_model(tmp_path)


@pytest.mark.parametrize(
    ("lengths", "most", "chunks"),
    [
        ([2, 2, 2, 2, 2], 4, [[0, 1], [2, 3], [4]]),  # as many as fit, to the last token
        ([5, 1, 6, 2], 4, [[1, 3], [0], [2]]),  # a row that is too long by itself stands alone
        ([6, 5], 4, [[1], [0]]),
        ([1, 1, 1, 1], None, [[0, 1, 2], [3]]),
        ([1, 1, 1, 1], 100, [[0, 1, 2], [3]]),
    ],
)
def test_chunks_hold_no_more_rows_and_tokens_than_they_may(lengths, most, chunks):
    found = length_buckets(torch.tensor(lengths), 3, max_tokens=most)
    assert [index.tolist() for index in found] == chunks
