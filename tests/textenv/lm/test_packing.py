"""Rows without padding, and logits in parts: when, and with the same numbers and gradients as otherwise.

That packed rows equal padded ones in every family is in ``tests/test_families.py``.
"""

import copy
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from textenv.lm import Responses, TokenRule, logprobs, packing, response_logprobs, response_scores
from textenv.lm.heads import Outputs, run

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
CAPPED = {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 1}
FAMILIES = {
    "gemma2": {
        **GROUPED,
        "head_dim": 8,
        "sliding_window": 4,
        "attn_logit_softcapping": 0.5,
        "query_pre_attn_scalar": 1,
    },
    "gpt2": {"n_layer": 2, "n_head": 4, "n_embd": 32},
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 4},
}
RULE = TokenRule(temperature=0.7, min_new_tokens=2, stop_ids=(3,))


def family(name, **options):
    special = {"bos_token_id": 1, "eos_token_id": 3, **FAMILIES.get(name, SIZES), **options}
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, vocab_size=64, **special)).eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    prompts, responses = (torch.randint(5, 64, (4, width), generator=generator) for width in (6, 9))
    return Responses(prompts, torch.tensor([3, 6, 2, 5]), responses, torch.tensor([9, 2, 4, 1]))


@pytest.fixture
def passes(monkeypatch):
    """Counts the passes whose attention was packed."""
    seen, attend = [], packing.run_packed
    monkeypatch.setattr(packing, "run_packed", lambda *args: seen.append(args) or attend(*args))
    return seen


def outputs_and_gradient(model, batch, **options):
    model.zero_grad()
    scores = response_scores(model, batch, RULE, **options)
    weights = torch.linspace(-1, 1, len(scores.logprobs))
    loss = (scores.logprobs * weights).sum() + 0.1 * scores.hidden.square().sum()
    (loss if scores.entropy is None else loss + (scores.entropy * weights).sum()).backward()
    return [*scores[: 2 + bool(options)], *(weight.grad for weight in model.parameters() if weight.grad is not None)]


def test_what_stands_in_the_padding_changes_nothing(batch, passes):
    model = family("llama")
    other = batch._replace(response_ids=batch.response_ids.masked_fill(~batch.response_mask, 63))
    assert torch.equal(response_logprobs(model, batch, RULE), response_logprobs(model, other, RULE))
    assert passes


def test_a_family_whose_states_flow_from_row_to_row_is_padded(batch):
    run_packed = packing.run_packed
    model = family("mamba", hidden_size=32, num_hidden_layers=2, state_size=4)
    tried = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "run_packed", lambda *args: tried.append(1) or run_packed(*args))
        together = response_logprobs(model, batch, RULE)
    assert tried
    assert not packing.can_pack(model)
    assert model.config._attn_implementation == "eager"
    alone = response_logprobs(model, batch.select(torch.tensor([1])), RULE)
    torch.testing.assert_close(together[1, :2], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rounding", "packs"), [(2e-5, True), (1e-2, False)])
def test_large_hidden_numbers_of_pretrained_models_do_not_hide_that_they_pack(monkeypatch, rounding, packs):
    """SmolLM2-135M: numbers of about 1, a few up to 47, and rounding of 2e-4 in the vectors that have those."""
    model, attend = family("llama"), packing.run_packed
    model.model.norm.weight.data[0] = 100.0

    def with_rounding(*args):
        outputs = attend(*args)
        noise = torch.randn(outputs.hidden.shape, generator=torch.Generator().manual_seed(0))
        length = outputs.hidden.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        return Outputs(model, outputs.hidden + rounding * length * noise, None)

    monkeypatch.setattr(packing, "run_packed", with_rounding)
    assert packing.can_pack(model) is packs


def test_one_token_that_differs_is_not_lost_among_the_others(monkeypatch):
    model, attend = family("llama"), packing.run_packed

    def with_one_stretched(*args):
        hidden = attend(*args).hidden.clone()
        hidden[0, 4] *= 1 + 2e-4  # twice what rounding may do to a token; less than that of all 8, √8 · 1e-4
        return Outputs(model, hidden, None)

    monkeypatch.setattr(packing, "run_packed", with_one_stretched)
    assert not packing.can_pack(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_rows_see_one_another_does_not_pack(monkeypatch, dtype):
    model = family("llama", initializer_range=0.3).to(dtype)
    assert packing.can_pack(model)
    packing._packs.clear()

    def joined(model, ids, layout):
        tokens = ids[layout.real][None]
        return run(model, tokens, attention_mask=torch.ones_like(tokens), use_cache=False)[0]

    monkeypatch.setattr(packing, "run_packed", joined)
    assert not packing.can_pack(model)


def test_little_padding_another_attention_and_recomputed_activations_are_left_as_they_are(batch, passes):
    model = family("llama")
    even = batch._replace(prompt_lengths=torch.full((4,), 6), response_lengths=torch.full((4,), 9))
    response_logprobs(model, even, RULE)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    response_logprobs(eager, batch, RULE)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    response_scores(model, batch, RULE).logprobs.sum().backward()
    assert passes == []


@pytest.mark.parametrize("vocabulary", ["plain", "capped"])
def test_logits_in_parts_have_the_values_and_gradients_of_logits_as_a_whole(batch, vocabulary, monkeypatch):
    model = family("llama") if vocabulary == "plain" else family("gemma2")
    whole = outputs_and_gradient(model, batch, entropy=True)
    monkeypatch.setattr(logprobs, "MAX_LOGITS", 64 * 3)  # three positions of 16 at a time
    heads, run = [], model.get_output_embeddings().forward
    monkeypatch.setattr(model.get_output_embeddings(), "forward", lambda x: heads.append(len(x)) or run(x))
    parts = outputs_and_gradient(model, batch, entropy=True)
    assert sorted(heads) == [1, 1] + [3] * 10  # each once, and again for the gradient
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_batch_without_response_tokens_has_no_scores(batch):
    empty = batch._replace(response_lengths=torch.zeros(4, dtype=torch.int64))
    assert len(response_scores(family("llama"), empty, RULE).logprobs) == 0


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
@pytest.mark.parametrize("even", [True, False])
def test_attention_in_bfloat16_is_near_that_in_float32_with_gradients(name, even, batch, passes):
    model = family(name)
    if even:
        batch = batch._replace(prompt_lengths=torch.full((4,), 6), response_lengths=torch.full((4,), 9))
    exact = outputs_and_gradient(model, batch)
    before = len(passes)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = outputs_and_gradient(model, batch)
    assert len(passes) > before  # also without padding, where float32 rows are not packed
    for one, other in zip(rounded, exact, strict=True):
        assert (one.float() - other).norm() <= 0.05 * other.norm() + 1e-4


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_no_family_takes_flash_attention_in_bfloat16_on_a_cpu(name, batch, monkeypatch):
    """Its backward pass is many times slower there. Llama rotates queries and keys in float32 under autocast."""

    def flash(*args, **options):
        raise AssertionError("flash attention")

    model = family(name)
    assert packing.can_pack(model)  # measured in float32
    monkeypatch.setattr(packing, "scaled_dot_product_attention", flash)
    with torch.autocast("cpu", torch.bfloat16):
        response_scores(model, batch, RULE)
    with pytest.raises(AssertionError, match="flash attention"):
        response_scores(model, batch, RULE)


@pytest.mark.parametrize("window", [16, 5, 1])
def test_written_out_attention_is_pytorchs(window):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, 16, 8, generator=generator) for heads in (6, 2, 2))
    mask = packing.causal_mask(16, window, torch.device("cpu"))
    assert mask.sum() == sum(min(row + 1, window) for row in range(16))
    found = packing.written_out(query, key, value, mask, 0.3)
    attend = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(found, attend(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True))


@pytest.mark.parametrize("size", [5, 300])
def test_capped_logits_are_those_of_a_sum_written_by_hand(size):
    """Heads 0-2 read keys and values 0, heads 3-5 keys and values 1."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (2 * torch.randn(1, heads, size, 8, generator=generator) for heads in (6, 2, 2))
    mask = packing.causal_mask(size, size, torch.device("cpu"))
    found = packing.written_out(query, key, value, mask, 0.5, softcap=1.5)
    for head, token in [(0, 0), (2, 3), (3, 4), (5, size - 1)]:
        logits = (key[0, head // 3, : token + 1].double() @ query[0, head, token].double()) * 0.5
        assert token < 3 or logits.abs().max() > 1.5  # some are capped
        expected = (1.5 * torch.tanh(logits / 1.5)).softmax(0) @ value[0, head // 3, : token + 1].double()
        torch.testing.assert_close(found[0, head, token].double(), expected, atol=1e-5, rtol=1e-5)


def test_capped_attention_drops_weights_and_keeps_their_mean():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(4, 2, 64, 8, generator=generator) for _ in range(2))
    ones = torch.ones(4, 2, 64, 8)
    mask = packing.causal_mask(64, 64, torch.device("cpu"))
    torch.manual_seed(0)
    sums = packing.written_out(query, key, ones, mask, None, softcap=5.0, dropout=0.25)[..., 0]
    assert sums.std() > 0.1
    assert abs(sums.mean() - 1) < 0.05
    assert (sums[:, :, 0] == 0).any()  # a token that sees itself alone: all or nothing
    assert set(sums[:, :, 0].flatten().tolist()) <= {0.0, torch.tensor(4 / 3).item()}


def test_rows_of_many_tokens_are_packed_with_some_to_spare_and_nothing_changes(passes, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 64, (24, 9), generator=generator)
    batch = Responses(ids[:, :3], torch.full((24,), 3), ids, torch.arange(24) % 9 + 1)
    model = family("llama")
    with_spare = outputs_and_gradient(model, batch)
    assert passes[-1][2].spare > 0
    monkeypatch.setattr(packing, "spare_rows", lambda count, device: 0)
    monkeypatch.setattr(logprobs, "spare_rows", lambda count, device: 0)
    for one, other in zip(with_spare, outputs_and_gradient(model, batch), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_long_rows_attend_in_groups_of_similar_length_in_whatever_order_they_come(name, passes, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 64, (24, 200), generator=generator)
    lengths = torch.randint(2, 190, (24,), generator=generator)
    batch = Responses(ids[:, :10], torch.arange(24) % 10 + 1, ids, lengths)
    model = family(name)
    grouped = outputs_and_gradient(model, batch)
    groups = passes[-1][2].groups
    assert len(groups) > 2
    assert sum(len(group.at) for group in groups) == batch.total_lengths.sum()
    assert (
        1 - batch.total_lengths.sum() / sum(group.rows * group.columns for group in groups) < 0.3
    )  # 0.44 in one group
    monkeypatch.setattr(packing, "WIDE", 1000)
    together = outputs_and_gradient(model, batch)
    assert len(passes[-1][2].groups) == 1
    monkeypatch.setattr(packing, "can_pack", lambda model: False)
    padded = outputs_and_gradient(model, batch)
    for one, *others in zip(grouped, together, padded, strict=True):
        for other in others:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
