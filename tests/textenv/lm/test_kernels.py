"""Faster kernels: the numbers and gradients of the layers that they stand in for."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from textenv.lm.kernels import layers
from textenv.lm.kernels.layers import OneDNNConv1D, OneDNNLinear, speed_up
from textenv.lm.packing import spare_rows

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="PyTorch was built without oneDNN",
)
SHAPES = {"matrix": (80, 128), "batch": (4, 20, 128), "one row too many": (81, 128)}


def layer(kind, *, bias=True):
    torch.manual_seed(0)
    if kind is OneDNNLinear:
        made = nn.Linear(128, 112, bias=bias)
    else:
        made = Conv1D(112, 128)
        nn.init.normal_(made.bias)
    made.__class__ = kind
    return made


def by_hand(module, x, grad):
    """``(y, ∂/∂x, ∂/∂W, ∂/∂b)`` in float64, from the definitions."""
    weight = module.weight.detach().double()
    weight = weight.T if isinstance(module, nn.Linear) else weight
    x, grad = x.detach().double(), grad.double()
    y = torch.einsum("...i,io->...o", x, weight)
    y = y if module.bias is None else y + module.bias.detach().double()
    weight_grad = torch.einsum("...i,...o->io", x, grad)
    if isinstance(module, nn.Linear):
        weight_grad = weight_grad.T
    return y, torch.einsum("...o,io->...i", grad, weight), weight_grad, grad.flatten(0, -2).sum(0)


@pytest.mark.parametrize("kind", [OneDNNLinear, OneDNNConv1D])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_product_and_its_gradients_are_those_of_the_definition(kind, shape, monkeypatch):
    calls, product = [], layers._product
    monkeypatch.setattr(layers, "_product", lambda *args: calls.append(args) or product(*args))
    module, x = layer(kind), torch.randn(shape, requires_grad=True)
    grad = torch.randn(*shape[:-1], 112)
    y = module(x)
    y.backward(grad)
    assert len(calls) == 3  # forward, and for each of both gradients
    found = y, x.grad, module.weight.grad, module.bias.grad
    for one, other in zip(found, by_hand(module, x, grad), strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(module(x), y.detach(), atol=1e-5, rtol=1e-5)
    assert module.weight.grad.stride() == module.weight.stride()


def test_a_layer_without_bias_and_one_with_frozen_weights_have_the_gradients_that_are_asked_for():
    module, x = layer(OneDNNLinear, bias=False), torch.randn(80, 128)
    grad = torch.randn(80, 112)
    module(x).backward(grad)
    torch.testing.assert_close(module.weight.grad.double(), by_hand(module, x, grad)[2], atol=1e-4, rtol=1e-4)
    frozen, x = layer(OneDNNConv1D).requires_grad_(False), torch.randn(80, 128, requires_grad=True)
    frozen(x).backward(grad)
    assert frozen.weight.grad is None
    torch.testing.assert_close(x.grad.double(), by_hand(frozen, x, grad)[1], atol=1e-4, rtol=1e-4)
    assert not frozen(x.detach()).requires_grad


def test_what_is_small_in_another_precision_or_autocast_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(layers, "_product", None)
    module, plain = layer(OneDNNLinear), layer(OneDNNLinear)
    plain.__class__ = nn.Linear
    x = torch.randn(80, 128)
    assert torch.equal(module(x[:8]), plain(x[:8]))
    assert torch.equal(copy.deepcopy(module).double()(x.double()), copy.deepcopy(plain).double()(x.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), plain(x))
    assert module(x[:0]).shape == (0, 112)


@pytest.mark.parametrize("sizes", [(4, 0, 3), (0, 4, 3), (4, 3, 0), (0, 0, 3), (4, 0, 0)])
def test_a_product_without_rows_columns_or_anything_to_sum_is_pytorchs(sizes, monkeypatch):
    monkeypatch.setattr(layers, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(layers, "WORTH_IT", 1)
    rows, summed, columns = sizes
    product = layers.product(torch.ones(rows, summed), torch.ones(columns, summed))
    assert torch.equal(product, torch.zeros(rows, columns))


def gpt2():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model("gpt2", n_layer=2, n_embd=64, n_head=2, vocab_size=96, n_positions=32)
        return AutoModelForCausalLM.from_config(config).eval()


def gradients(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss, *(weight.grad for weight in model.parameters())]


def test_a_whole_model_keeps_its_outputs_gradients_and_weights_by_name(monkeypatch):
    monkeypatch.setattr(layers, "onednn_is_faster", lambda: True)
    plain, fast = gpt2(), gpt2()
    speed_up(fast)
    kinds = {type(module) for module in fast.modules()}
    assert {OneDNNLinear, OneDNNConv1D} <= kinds
    assert not {nn.Linear, Conv1D} & kinds
    ids = torch.randint(0, 96, (16, 24), generator=torch.Generator().manual_seed(1))
    for one, other in zip(gradients(fast, ids), gradients(plain, ids), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert plain.state_dict().keys() == fast.state_dict().keys()
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(again(ids).logits, fast(ids).logits)
        assert again.transformer.h[0].mlp.c_fc.weight is not fast.transformer.h[0].mlp.c_fc.weight


def test_layers_of_other_classes_stay_what_they_are(monkeypatch):
    class Quantised(nn.Linear):
        pass

    monkeypatch.setattr(layers, "onednn_is_faster", lambda: True)
    model = nn.Sequential(Quantised(4, 4), nn.GELU(), nn.Linear(4, 4))
    speed_up(model)
    assert [type(module) for module in model] == [Quantised, nn.GELU, OneDNNLinear]


def test_a_processor_of_intel_keeps_its_own_library(monkeypatch):
    monkeypatch.setattr(layers, "_is_intel", lambda: True)
    assert not layers.onednn_is_faster.__wrapped__()


def test_matrices_have_few_sizes_and_little_to_spare():
    device = torch.device("cpu")
    sizes = [count + spare_rows(count, device) for count in range(1, 4097)]
    assert all(count <= size <= count * 17 / 16 for count, size in enumerate(sizes, 1))
    assert len({size for size in sizes if 512 < size <= 1024}) == 16
    assert spare_rows(0, device) == 0
    assert spare_rows(1000, torch.device("cuda")) == 0
