"""Frozen blocks run once a row: the same gradients, fewer passes."""

import contextlib
import copy
import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import textenv
from agents.core import learner as learner_module
from agents.ppo import PPO, PPOConfig
from tests.conftest import FAMILIES, WORDS, tiny_model, word_tokenizer
from textenv.lm import Responses, response_scores
from textenv.lm import frozen as frozen_module
from textenv.lm.distribution import TokenRule
from textenv.lm.frozen import blocks_of, frozen_blocks, kept_activations, shared_activations
from textenv.lm.load import wrap_language_model
from textenv.training.memory import sharding
from textenv.training.memory.policy import _freeze_below

ROWS = Responses(
    torch.tensor([[0, 1, 2, 3], [0, 0, 0, 5], [4, 4, 1, 2]]),
    torch.tensor([3, 1, 4]),
    torch.tensor([[1, 2, 3, 4, 5, 0], [6, 0, 0, 0, 0, 0], [7, 7, 0, 0, 0, 0]]),
    torch.tensor([6, 1, 3]),
)


@pytest.fixture
def updated(make_vector, monkeypatch):
    def make(family, *, kept=True, **config):
        textenv.register_language_model(f"small-{family}", lambda: small(family))
        env = make_vector(16, reference=f"small-{family}").unwrapped
        settings = {"batch_size": 32, "learning_rate": 1e-3, "minibatches": 2, "epochs": 3, "train_layers": 1}
        agent = PPO(env, PPOConfig(**{**settings, **config}))
        with monkeypatch.context() as patch:
            if not kept:
                for module, name in ((learner_module, "kept_activations"), (sharding, "shared_activations")):
                    patch.setattr(module, name, lambda *models: contextlib.nullcontext())
            agent.learn(64)
        return agent

    return make


def small(family):
    if family != "bloom":
        return tiny_model(family)
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": len(WORDS)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **sizes, eos_token_id=0))
    return wrap_language_model(model, word_tokenizer())


def frozen(family="gpt2"):
    model = tiny_model(family).model
    _freeze_below(model, 1)
    return model


def gradients(model, batch):
    """Of the mean log-probability."""
    model.zero_grad()
    response_scores(model, batch, TokenRule()).logprobs.mean().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def runs(module):
    count = []
    module.register_forward_pre_hook(lambda module, inputs: count.append(1))
    return count


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1], [0, 0, 2]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_and_log_probabilities_are_those_of_plain_passes_in_any_company(family, rows):
    """Rows are kept padded or packed, alone or with others, and used likewise."""
    model, part = frozen(family), ROWS.select(torch.tensor(rows))
    plain, expected = gradients(model, part), response_scores(model, part, TokenRule()).logprobs
    for first in ([[0], [1], [2]], [[0, 1, 2]], [[1, 0], [2, 1]]):
        with kept_activations(model):
            for index in first:
                gradients(model, ROWS.select(torch.tensor(index)))
            lower = runs(frozen_blocks(model)[0].mlp)
            found, logprobs = gradients(model, part), response_scores(model, part, TokenRule()).logprobs
            assert not lower
        assert found.keys() == plain.keys()
        for name in plain:
            torch.testing.assert_close(found[name], plain[name], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(logprobs, expected, atol=1e-6, rtol=1e-5)


OPTIONS = [{}, {"lora_rank": 2}, {"value_function": "trunk"}, {"gradient_checkpointing": True}]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_updates_lead_to_the_weights_of_plain_ones(updated, family, options):
    agent, plain = updated(family, **options), updated(family, kept=False, **options)
    for (name, one), other in zip(agent.actor.named_parameters(), plain.actor.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=name)


def test_frozen_blocks_run_in_the_first_of_several_passes_over_a_batch_and_nothing_is_kept_after_it(updated):
    agent = updated("gpt2")
    bottom, top = agent.policy.model.transformer.h
    rollout = agent.collect()
    lower, upper = runs(bottom.mlp), runs(top.mlp)
    agent.update(rollout)
    assert (len(lower), len(upper)) == (2, 6)  # two minibatches, three passes
    agent.update(rollout)
    assert (len(lower), len(upper)) == (4, 12)
    assert "forward" not in vars(bottom)
    single = updated("gpt2", epochs=1)
    assert len(frozen_blocks(single.policy.model)) == 1


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_reference_and_the_policy_run_the_blocks_that_they_have_in_common_once(updated, family, options, epochs):
    """16 slots, batches of 32: the reference scores two rounds; the policy's passes add nothing below."""
    agent = updated(family, epochs=epochs, **options)
    reference, counts = agent.task.reference.model, []
    for model in (reference, agent.policy.model):
        bottom, top = blocks_of(model)
        counts.append((runs(bottom.mlp), runs(top.mlp)))
    decoding = []
    act = agent.actor.act
    agent.actor.act = lambda *args, **kwargs: decoded(decoding, counts, act, *args, **kwargs)
    agent.learn(32)
    (ref_lower, ref_upper), (lower, upper) = counts
    assert (len(ref_lower), len(ref_upper)) == (2, 2)
    steps = sum(decoding)
    assert (len(lower) - steps, len(upper) - steps) == (0, 2 * epochs)


def decoded(decoding, counts, act, *args, **kwargs):
    """Counts the passes of the policy while it samples."""
    before = len(counts[1][0])
    sampled = act(*args, **kwargs)
    decoding.append(len(counts[1][0]) - before)
    return sampled


def test_a_reference_that_is_another_model_below_shares_nothing(updated):
    agent = updated("gpt2", epochs=1)
    policy, reference = agent.policy.model, agent.task.reference.model
    changes = {
        "a block": lambda model: model.transformer.h[0].mlp.c_fc.weight,
        "a token": lambda model: model.transformer.wte.weight[11],
        "a position": lambda model: model.transformer.wpe.weight[30],
    }
    with shared_activations(policy, reference):
        assert kept_of(policy) is not None
        assert kept_of(policy) is kept_of(reference)
    assert kept_of(policy) is None
    for name, weight in changes.items():
        other = copy.deepcopy(policy)
        with torch.no_grad():
            weight(other).add_(1e-3)
        with shared_activations(other, reference):
            assert kept_of(other) is None, name
            assert kept_of(reference) is None, name
    half = copy.deepcopy(policy).bfloat16()
    with shared_activations(half, reference):
        assert kept_of(half) is None


def test_weights_that_change_between_two_updates_are_compared_anew(updated, make_vector):
    """Loaded, or trained in a run of all layers in between: the first ratio is that of one policy."""
    agent = updated("gpt2", epochs=1)
    other = {name: weight + 0.1 for name, weight in agent.policy.model.state_dict().items()}
    agent.policy.model.load_state_dict(other)
    agent.learn(32)
    assert agent.history[-1]["first_ratio_deviation"] < 1e-4
    config = {"batch_size": 32, "learning_rate": 1e-3, "minibatches": 2, "epochs": 1}
    env, policy = agent.env, agent.task.reference.merged()
    for layers in (1, None, 1):
        agent = PPO(env, PPOConfig(**config, train_layers=layers), policy)
        agent.learn(32)
        assert agent.history[-1]["first_ratio_deviation"] < 1e-4
        policy.model.requires_grad_()


def test_embeddings_that_are_trained_after_all_are_not_skipped(updated):
    agent = updated("gpt2", epochs=2)
    agent.policy.model.get_input_embeddings().requires_grad_()
    agent.learn(32)
    gradient = agent.policy.model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_an_adapter_that_says_something_below_is_no_reference(updated):
    agent = updated("gpt2", lora_rank=2, epochs=1)
    policy, reference = agent.policy.model, agent.task.reference.model
    bottom = blocks_of(policy)[0]
    with shared_activations(policy, reference):
        assert kept_of(policy) is not None
    changed = copy.deepcopy(policy)
    with torch.no_grad():
        for name, weight in blocks_of(changed)[0].named_parameters():
            if "lora_B" in name:
                weight[0, 0] = 1e-3
    with shared_activations(changed, reference):
        assert kept_of(changed) is None
    assert not any(weight.any() for name, weight in bottom.named_parameters() if "lora_B" in name)
    with torch.no_grad():  # of a model that was found equal before
        next(weight for name, weight in bottom.named_parameters() if "lora_B" in name)[0, 0] = 1e-3
    with shared_activations(policy, reference):
        assert kept_of(policy) is None


def kept_of(model):
    kept = frozen_module._kept.get(model)
    return None if kept is None else kept.rows


def test_all_blocks_are_trained_unless_some_are_frozen():
    model = tiny_model().model
    lower = runs(model.transformer.h[0].mlp)
    with kept_activations(model, None):
        for _ in range(3):
            gradients(model, ROWS)
    assert len(lower) >= 3
    model.requires_grad_(False)
    assert frozen_blocks(model) == []


def test_a_family_that_trains_something_below_its_blocks_is_passed_plainly_and_said_so(updated, caplog):
    """BLOOM has a norm on its embeddings, which train_layers leaves to be trained."""
    with caplog.at_level(logging.WARNING):
        agent = updated("bloom")
    assert "BloomForCausalLM: its 1 frozen blocks are computed anew in every pass over a batch" in caplog.text
    assert caplog.text.count("computed anew") == 1
    plain = updated("bloom", kept=False)
    for one, other in zip(agent.actor.parameters(), plain.actor.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_model_whose_upper_blocks_look_past_the_hidden_states_is_passed_plainly(caplog):
    model, noted = frozen(), []
    bottom, top = model.transformer.h
    bottom.mlp.register_forward_hook(lambda module, inputs, output: noted.append(output[:1, :1]))
    top.register_forward_hook(lambda module, inputs, output: output + noted[-1])
    gradients(model, ROWS)  # what is measured once a model
    with kept_activations(model):
        lower = runs(bottom.mlp)
        for _ in range(2):
            gradients(model, ROWS)
        assert len(lower) == 2
    assert "computed anew" in caplog.text


def test_an_interrupted_pass_leaves_the_blocks_as_they_were():
    model = frozen()
    with contextlib.suppress(KeyboardInterrupt), kept_activations(model):
        gradients(model, ROWS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.transformer.ln_f, "forward", lambda hidden: (_ for _ in ()).throw(KeyboardInterrupt))
            gradients(model, ROWS)
    assert "forward" not in vars(model.transformer.h[0])
    lower = runs(model.transformer.h[0].mlp)
    gradients(model, ROWS)
    assert len(lower) == 1
