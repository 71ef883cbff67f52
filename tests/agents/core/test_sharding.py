"""Learners whose weights are shared out over processes (FSDP2) learn what whole ones do."""

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import textenv
from agents import PPO
from agents.core import learner as core
from tests.agents.core.test_checkpoint import assert_same
from tests.agents.core.test_processes import (
    SETTINGS,
    assert_they_equal_one,
    learner,
    run,
    saving_learner,
    three_updates,
    weights_of,
)
from tests.conftest import FAMILIES, tiny_model
from tests.processes import in_processes, results
from tests.sharded import in_shares, shared_out
from textenv.lm.frozen import blocks_of
from textenv.training.processes import link, same_weights
from textenv.vector import make_vec


def in_float64(work):
    """A learner is made in shares of float64; it cannot change its precision afterwards."""

    def doubled():
        core.same_weights = lambda actor: same_weights(actor.double())
        return work()

    return doubled


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_with_half_of_the_weights_each_equal_one(name):
    assert_they_equal_one(name, shared_out(in_float64(lambda: three_updates(name))))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in FAMILIES),
        ("gpt2", {"gradient_checkpointing": True}),
        ("llama", {"offload_frozen": True}),
    ],
    ids=str,
)
def test_every_family_learns_in_shares_what_it_learns_whole(family, options):
    def learn():
        textenv.register_language_model("small", lambda: tiny_model(family))
        env = make_vec("textenv/Micro-v0", 12 // link().num_processes, reference="small", kl_coef=0.1)
        settings = {"batch_size": 12, "minibatches": 2, "micro_batch_size": 4, "learning_rate": 1e-2, **options}
        agent = PPO(env, PPO.config_type(**settings))
        return weights_of(agent).clone(), weights_of(agent.learn(12))

    (start, whole), (_, shared) = results(learn)[0], shared_out(learn)[0]
    assert (whole - start).abs().max() > 1e-3
    # Adam makes steps of rounding errors where a gradient is 0, as that of GPT-2's key biases: a few weights.
    assert ((shared - whole).abs() > 1e-4).float().mean() < 0.005


def test_in_an_update_each_process_holds_its_part_and_outside_all():
    def work():
        agent = learner("ppo", 4)
        held, step, loss = [], agent.step, agent.loss

        def after_the_forward_pass(*args):
            assert all(isinstance(w, DTensor) for block in blocks_of(agent.policy.model) for w in block.parameters())
            return loss(*args)

        def spied(*args):
            log = step(*args)
            weights = list(agent.actor.parameters())
            assert all(isinstance(weight, DTensor) for weight in weights)
            moments = [m for state in agent.optimizer.state.values() for m in state.values() if m.ndim]
            held.append([sum(x.to_local().numel() for x in xs) for xs in (weights, moments)])
            return log

        agent.step, agent.loss = spied, after_the_forward_pass
        agent.learn(16)
        weights = list(agent.actor.parameters())
        assert not any(isinstance(weight, DTensor) for weight in weights)
        return held[-1], sum(weight.numel() for weight in weights)

    for (weights, moments), total in shared_out(in_float64(work)):
        assert weights == pytest.approx(total / 2, rel=0.01)
        assert moments == 2 * weights


def test_weights_that_are_set_between_updates_are_those_that_learn():
    def work():
        agent = saving_learner(minibatches=1)
        with torch.no_grad():
            for weight in agent.actor.parameters():
                weight.fill_(0.01)
        agent.learn(16)
        return weights_of(agent)

    weights = shared_out(work)[0]
    assert (weights - 0.01).abs().max() < 0.05


def test_a_resumed_run_in_shares_equals_one_that_never_stopped_and_goes_on_without_shares(tmp_path):
    shared_out(lambda: run(tmp_path / "straight", 32))
    shared_out(lambda: run(tmp_path / "half", 16))
    shared_out(lambda: run(tmp_path / "half", 32))
    straight, resumed = (PPO.load(tmp_path / name, saving_learner().env) for name in ("straight", "half"))
    assert_same(straight, resumed)
    results(lambda: run(tmp_path / "half", 48))
    shared_out(lambda: run(tmp_path / "half", 64))
    assert len(PPO.load(tmp_path / "half", saving_learner().env).history) == 4


def test_what_is_saved_is_the_whole_policy(tmp_path):
    def work():
        agent = saving_learner().learn(16)
        agent.save(tmp_path / "run")
        agent.save_merged(tmp_path / "merged")
        return weights_of(agent), torch.cat([w.detach().flatten() for w in agent.policy.model.parameters()])

    _, policy = shared_out(work)[0]
    for folder in ("run/policy", "merged"):
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(torch.cat([weight.detach().flatten() for weight in saved.parameters()]), policy)


@pytest.mark.parametrize("options", [{"lora_rank": 2}, {"train_layers": 1}], ids=str)
def test_weights_that_are_not_trained_are_not_shared_out(options):
    _, errors = in_processes(in_shares(lambda: saving_learner(**options)))
    assert all("must train all weights, got" in error and "Leave out lora_rank" in error for error in errors), errors


@pytest.mark.parametrize(
    ("name", "value"),
    [("FSDP_VERSION", "1"), ("FSDP_OFFLOAD_PARAMS", "true"), ("ACCELERATE_MIXED_PRECISION", "bf16")],
)
def test_another_kind_of_sharding_is_refused_with_what_works(name, value):
    _, errors = in_processes(in_shares(saving_learner, **{name: value}))
    for error in errors:
        assert f"{name.lower()} must be" in error
        assert f"got {value}. Launch with examples/accelerate/fsdp2.yaml" in error
