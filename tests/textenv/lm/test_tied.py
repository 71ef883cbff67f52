"""The gradient of a tied embedding: the numbers of PyTorch's own, without its matrices of zeros and sums."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import tiny_model
from textenv.lm import heads
from textenv.lm.heads import run
from textenv.lm.kernels import layers, tied
from textenv.lm.kernels.tied import TiedEmbedding, tie
from textenv.lm.load import disable_dropout

IDS = torch.tensor([[1, 2, 2, 7], [0, 2, 9, 9]])  # some tokens stand there twice
SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
KINDS = {
    "llama": {**SIZES, "num_attention_heads": 2, "tie_word_embeddings": True},
    "gpt2": {"vocab_size": 11, "n_embd": 8, "n_layer": 1, "n_head": 2},
}


def made(kind="llama", **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**KINDS.get(kind, SIZES), **changes}))
    disable_dropout(model)
    return model


@pytest.fixture(params=KINDS)
def pair(request):
    """A model with PyTorch's gradient, and the same with ours."""
    plain = made(request.param)
    ours = copy.deepcopy(plain)
    tie(ours)
    assert [type(one.get_input_embeddings()) for one in (plain, ours)] == [nn.Embedding, TiedEmbedding]
    return plain, ours


def picked(outputs, index):
    return outputs.at(index)[0].log_softmax(-1)[:, 3].sum()


def one_part(model):
    return picked(run(model, IDS)[0], (slice(None), 1))


def two_parts(model):
    outputs, _ = run(model, IDS)
    return picked(outputs, (0, slice(None))) - 2 * picked(outputs, (1, slice(2)))


def recomputed_parts(model):
    outputs, _ = run(model, IDS)
    parts = [(0, slice(None)), (1, slice(2))]
    return sum(checkpoint(picked, outputs, part, use_reentrant=False) for part in parts)


def without_head(model):
    return run(model, IDS)[0].hidden.sin().sum()


def head_and_hidden(model):
    outputs, _ = run(model, IDS)
    return picked(outputs, (0, slice(None))) + outputs.hidden.sin().sum()


def no_positions(model):
    return picked(run(model, IDS)[0], (slice(0), 1))


def of_transformers(model):
    return model(input_ids=IDS).logits.log_softmax(-1)[..., 3].sum()


def two_passes_at_once(model):
    return one_part(model) + two_parts(model).square()


LOSSES = [one_part, two_parts, recomputed_parts, without_head, head_and_hidden, no_positions, of_transformers]
LOSSES += [two_passes_at_once]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("onednn", [False, True])
def test_losses_and_gradients_are_those_of_pytorch(pair, loss, passes, onednn, monkeypatch):
    monkeypatch.setattr(layers, "onednn_is_faster", lambda: onednn)
    monkeypatch.setattr(layers, "WORTH_IT", 1)
    values = []
    for one in pair:
        for _ in range(passes):
            value = loss(one)
            value.backward()
        values.append(value.detach())
    torch.testing.assert_close(*values)
    for (name, plain), ours in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        assert (plain.grad is None) == (ours.grad is None), name
        if plain.grad is not None:
            torch.testing.assert_close(ours.grad, plain.grad, msg=name)


@pytest.mark.parametrize("rows", [4, 4096])
@pytest.mark.parametrize("loss", [one_part, two_parts, without_head])
def test_gradients_under_autocast_are_those_of_pytorch_up_to_rounding(pair, loss, rows, monkeypatch):
    monkeypatch.setattr(tied, "ROWS", rows)
    for one in pair:
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(one)
        value.backward()
    for (name, plain), ours in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        if plain.grad is not None:
            assert ours.grad.dtype == torch.float32
            torch.testing.assert_close(ours.grad, plain.grad, atol=0.02, rtol=0.02, msg=name)


def test_weights_in_bfloat16_have_gradients_in_bfloat16(pair):
    for one in pair:
        one_part(one.to(torch.bfloat16)).backward()
    plain, ours = (one.get_input_embeddings().weight.grad for one in pair)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, plain, atol=0.02, rtol=0.02)


def test_capped_logits_are_capped_with_a_link_too(pair):
    """No family that caps has a plain embedding today; one may."""
    _, ours = pair
    ours.config.final_logit_softcapping = 0.5
    hidden = torch.randn(3, 8) * 10
    linked = heads._head_logits(ours, hidden, tied.Link())
    assert linked.abs().max() <= 0.5
    torch.testing.assert_close(linked, heads._head_logits(ours, hidden))


def last_norm(model):
    return [weight for name, weight in model.named_parameters() if "norm" in name or "ln_f" in name][-1]


def test_a_pass_can_be_differentiated_again_and_in_parts(pair):
    """What one backward pass leaves and does not fetch is no part of the next one."""
    found = []
    for one in pair:
        table = one.get_input_embeddings().weight
        norm = last_norm(one)
        value = two_parts(one)
        asked = [[norm], [table], [norm], [norm, table], [table]]
        found.append([torch.autograd.grad(value, weights, retain_graph=True)[-1] for weights in asked])
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_later_pass_without_the_head_has_nothing_of_an_earlier_one_with_it(pair):
    found = []
    for one in pair:
        outputs, _ = run(one, IDS)
        table = one.get_input_embeddings().weight
        torch.autograd.grad(picked(outputs, (0, slice(None))), [last_norm(one)], retain_graph=True)
        found.append(torch.autograd.grad(outputs.hidden.sin().sum(), [table])[0])
    torch.testing.assert_close(*found)


class Called(TorchDispatchMode):
    """How often operators made something of the shape of the embedding."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape == (11, 8) and func.name() in NEW:
            self.made.append(func.name().removeprefix("aten::"))
        return out


NEW = (
    "aten::mm",
    "aten::addmm",
    "aten::embedding_dense_backward",
    "aten::zeros",
    "aten::new_zeros",
    "aten::add.Tensor",
)


@pytest.mark.parametrize("loss", [one_part, recomputed_parts])
def test_one_gradient_is_made(pair, loss):
    value = loss(pair[1])
    with Called() as called:
        value.backward()
    assert called.made == ["mm"] * (2 if loss is recomputed_parts else 1)  # each part's, and no matrix of zeros


def test_copies_link_passes_of_their_own(pair):
    plain, ours = pair
    one_part(plain).backward()
    one_part(ours)  # a pass that nobody differentiates
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        one_part(again).backward()
        torch.testing.assert_close(again.get_input_embeddings().weight.grad, plain.get_input_embeddings().weight.grad)
    assert all(weight.grad is None for weight in ours.parameters())


def test_a_weight_that_is_no_longer_tied_has_its_own_gradient():
    plain = made()
    ours = copy.deepcopy(plain)
    tie(ours)
    for one in (plain, ours):
        one.lm_head.weight = nn.Parameter(one.lm_head.weight.detach() * 2)
        one_part(one).backward()
    for table in ("get_input_embeddings", "get_output_embeddings"):
        torch.testing.assert_close(getattr(ours, table)().weight.grad, getattr(plain, table)().weight.grad)


def test_a_language_model_is_tied_and_scores_its_responses_by_the_link(monkeypatch):
    lm, taken = tiny_model(), []
    assert type(lm.model.get_input_embeddings()) is TiedEmbedding
    monkeypatch.setattr(tied.Link, "take", lambda link, take=tied.Link.take: taken.append(take(link)) or taken[-1])
    one_part(lm.model).backward()
    assert [left is not None for left in taken] == [True]


def test_only_plain_tied_layers_are_linked():
    scaled = made("gemma3_text", num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    for one in (made(tie_word_embeddings=False), scaled):
        kind = type(one.get_input_embeddings())
        tie(one)
        assert type(one.get_input_embeddings()) is kind


def test_frozen_and_unasked_weights_are_read_as_usual(pair):
    embedding = pair[1].get_input_embeddings()
    with torch.no_grad():
        assert embedding(IDS).grad_fn is None
    embedding.weight.requires_grad_(False)
    assert not embedding(IDS).requires_grad
    assert embedding.link is None
    one_part(pair[1]).backward()
    assert embedding.weight.grad is None
