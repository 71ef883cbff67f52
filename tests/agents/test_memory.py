"""What saves memory in training: recomputed activations, fewer layers, smaller optimisers. Adapters: test_lora.py."""

import sys
import types

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

import textenv
from agents.core.returns import Advantages
from agents.ppo import PPO, PPOConfig
from agents.rloo import RLOOConfig
from tests.conftest import FAMILIES, tiny_model
from textenv.training.memory import MemoryConfig
from textenv.training.optimizer import make_adamw
from textenv.training.trainable import check_trainable


@pytest.fixture
def learner(make_vector):
    def make(family="gpt2", env_options=(), **config):
        textenv.register_language_model(f"small-{family}", lambda: tiny_model(family))
        env = make_vector(16, reference=f"small-{family}", **dict(env_options)).unwrapped
        return PPO(env, PPOConfig(**{"batch_size": 32, "learning_rate": 1e-2, **config}))

    return make


def step(agent):
    """One step with made-up advantages; the gradients."""
    rollout = agent.collect()
    advantages = torch.randn(rollout.values.shape, generator=torch.Generator().manual_seed(0))
    agent.step(rollout, Advantages(advantages, advantages), torch.arange(20))
    return rollout, {name: p.grad for name, p in agent.actor.named_parameters() if p.grad is not None}


def kept_bytes(agent, rollout):
    """Bytes that the forward pass keeps for the backward pass, weights apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in agent.actor.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        agent.actor.evaluate(rollout.tokens, agent.task)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("options", [{}, {"lora_rank": 3}, {"value_function": "trunk"}, {"train_layers": 1}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_change_no_gradient_and_no_sample(learner, family, options):
    plain, lean = (learner(family, gradient_checkpointing=on, **options) for on in (False, True))
    (rollout, expected), (again, found) = step(plain), step(lean)
    assert torch.equal(rollout.tokens.response_ids, again.tokens.response_ids)
    torch.testing.assert_close(rollout.logprobs, again.logprobs)  # prompts are padded or packed, too
    assert expected.keys() == found.keys()
    for name in expected:  # recomputed passes are padded, the others packed
        torch.testing.assert_close(expected[name], found[name], atol=1e-6, rtol=1e-4)
    assert kept_bytes(lean, rollout) < 0.7 * kept_bytes(plain, rollout)


@pytest.mark.parametrize("lora_rank", [0, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_blocks_are_computed_twice_in_an_update_and_once_with_the_cache_in_sampling(learner, family, lora_rank):
    agent = learner(family, gradient_checkpointing=True, lora_rank=lora_rank)
    blocks = [m for m in agent.policy.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert len(blocks) == 2
    agent.collect()  # what is measured once a model
    columns = []
    blocks[0].mlp.register_forward_pre_hook(lambda module, inputs: columns.append(inputs[0].shape[1]))
    rollout = agent.collect()
    assert len(columns) == 2 * 6  # two batches of the environment's 16 slots, at most six tokens each
    assert sum(width > 1 for width in columns) == 2  # the prompts; then one token at a time
    columns.clear()
    with torch.no_grad():
        agent.actor.evaluate(rollout.tokens, agent.task)
    assert len(columns) == 1
    agent.actor.evaluate(rollout.tokens, agent.task).logprobs.sum().backward()
    assert len(columns) == 3


def test_the_lowest_layers_and_the_embeddings_stay_as_they_are_and_get_no_gradient(learner):
    """GPT-2's LM head is its embedding, so the top block of two, the final norm and the value head are trained."""
    agent = learner(train_layers=1)
    trained = {name for name, weight in agent.policy.model.named_parameters() if weight.requires_grad}
    assert trained == {
        name
        for name, _ in agent.policy.model.named_parameters()
        if name.startswith(("transformer.h.1.", "transformer.ln_f."))
    }
    below = []
    agent.policy.model.transformer.h[0].register_forward_hook(lambda module, inputs, out: below.append(out))
    _, gradients = step(agent)
    assert not below[-1].requires_grad
    assert gradients.keys() == {f"model.{name}" for name in trained} | {
        "value_head.features.weight",
        "value_head.features.bias",
        "value_head.output.linear.weight",
        "value_head.output.linear.bias",
    }
    full = step(learner())[1]
    for name in trained:  # what is trained gets the gradient that it would get anyway, before clipping
        one, other = gradients[f"model.{name}"], full[f"model.{name}"]
        assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), 0) > 1 - 1e-5


def test_an_lm_head_of_its_own_is_trained_with_the_top_layers(learner):
    agent = learner("llama", train_layers=2)
    frozen = [name for name, weight in agent.policy.model.named_parameters() if not weight.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("options", [{"train_layers": 1}, {"train_layers": 1, "lora_rank": 2}], ids=str)
def test_a_learner_of_the_top_layers_resumes_bit_for_bit(learner, tmp_path, options):
    options = {**options, "gradient_checkpointing": True}
    whole, half = learner(**options).learn(64), learner(**options).learn(32)
    half.save(tmp_path / "run")
    resumed = PPO.load(tmp_path / "run", half.env).learn(32)
    for (name, one), other in zip(whole.actor.named_parameters(), resumed.actor.parameters(), strict=True):
        assert torch.equal(one, other), name
        assert one.requires_grad == other.requires_grad
    if "lora_rank" not in options:
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")


def test_too_many_layers_are_refused(learner):
    with pytest.raises(ValueError, match="train_layers must be 2 or less, the blocks of the model, got 3"):
        learner(train_layers=3)
    with pytest.raises(ValueError, match="train_layers must be 1 or more, got 0"):
        learner(train_layers=0)


def test_the_scale_of_adapters_without_adapters_is_refused():
    for kind in (PPOConfig, RLOOConfig, MemoryConfig):
        with pytest.raises(ValueError, match="lora_alpha needs lora_rank, got 4 alone"):
            kind(lora_alpha=4.0)


def test_eight_bit_adam_is_refused_where_it_cannot_run(learner, monkeypatch):
    with pytest.raises(ValueError, match="adam_8bit needs a CUDA device, got cpu"):
        learner(adam_8bit=True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    on_gpu = types.SimpleNamespace(ndim=1, device=torch.device("cuda"))
    with pytest.raises(
        ValueError, match=r"adam_8bit needs the package bitsandbytes: pip install 'textenv\[adam8bit\]'"
    ):
        make_adamw(PPOConfig(), [[on_gpu]], [1e-5], eight_bit=True)


def test_frozen_weights_may_have_any_precision_and_trained_ones_float32_alone():
    model = tiny_model().model.to(torch.bfloat16).requires_grad_(False)
    model.transformer.ln_f.float().requires_grad_(True)
    check_trainable(model)
    model.transformer.h[1].requires_grad_(True)
    with pytest.raises(ValueError, match=r"must have float32 weights, got torch\.bfloat16"):
        check_trainable(model)


def test_log_probabilities_of_a_bfloat16_pass_are_normalised_in_float32(learner):
    """bfloat16 has 8 bits: a log-softmax in it would miss the sum 1 by about a hundredth."""
    from textenv.lm import response_outputs

    agent = learner(env_options={"dtype": "bfloat16"}, lora_rank=2)
    tokens = agent.collect().tokens
    with torch.no_grad(), agent.task.precision():
        for model in (agent.policy.model, agent.task.reference.model):
            logprobs, _ = response_outputs(model, tokens, agent.task.rule)
            assert logprobs.dtype == torch.float32
            torch.testing.assert_close(logprobs.exp().sum(1), torch.ones(len(logprobs)), atol=1e-5, rtol=0)
