"""Stable-Baselines3's algorithms on adapters: one model in memory, saved and loaded by their own verbs."""

import json
import zipfile

import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, PPO
from transformers import AutoModelForCausalLM

import textenv
from agents.core.job import Job
from agents.sb3 import CausalLMPolicy, make_vec_env
from agents.sb3.masks import MaskableCausalLMPolicy, SB3MaskablePPO, SharedMasksDict
from agents.sb3.training import SB3PPO
from tests.conftest import FAMILIES, tiny_model
from textenv.tasks.exact import exact_world

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LORA = {"lora_rank": 3}
IDS = torch.tensor([[1, 2, 3], [4, 0, 5]])


def make(env, algorithm=PPO, policy=CausalLMPolicy, *, seed=0, memory=LORA, **options):
    options = {"learning_rate": 1e-2, "seed": seed, "device": "cpu", "policy_kwargs": dict(memory), **options}
    sizes = {"n_steps": 13} if algorithm is A2C else {"n_steps": 13, "batch_size": 13, "n_epochs": 2}
    return algorithm(policy, env, **{**sizes, **options})


def storages(model):
    return {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}


def logits(model):
    return model(IDS, attention_mask=torch.ones_like(IDS)).logits.detach()


def weights(policy):
    return {name: weight.detach().clone() for name, weight in policy.named_parameters()}


@pytest.mark.parametrize("algorithm", [PPO, A2C, "maskable"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_policy_has_the_weights_of_the_reference_and_trains_adapters_and_value_head_alone(
    vec_env, algorithm, family
):
    env = vec_env(reference=f"{family}-a")
    if algorithm == "maskable":
        options = {"rollout_buffer_class": SharedMasksDict}
        agent = make(env, SB3MaskablePPO.kind, MaskableCausalLMPolicy, **options)
    else:
        agent = make(env, algorithm)
    reference = env.get_attr("task")[0].reference.model
    assert storages(reference) < storages(agent.policy.model)
    assert torch.equal(logits(reference), logits(agent.policy.model))  # B is 0
    before, untouched = weights(agent.policy), logits(reference)
    agent.learn(130)
    changed = {name for name, weight in agent.policy.named_parameters() if not torch.equal(weight, before[name])}
    expected = {name for name in before if "lora_" in name or name.startswith("value_head.")}
    assert changed == expected
    assert len(expected) == 2 + 2 * 2 * (4 if family == "gpt2" else 7)  # two blocks; each adapter is A and B
    assert torch.equal(logits(reference), untouched)
    assert not torch.allclose(logits(agent.policy.model), untouched, atol=1e-3)


def test_the_kl_is_0_at_the_start(vec_env):
    env = vec_env()
    agent = make(env)
    observation = env.reset()
    kls = []
    while len(kls) < 20:
        observation, _, _, infos = env.step(agent.predict(observation, deterministic=False)[0])
        kls += [info["kl"] for info in infos if "kl" in info]
    assert np.abs(kls).max() < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_agent_holds_what_is_trained_and_is_loaded_onto_the_shared_weights(vec_env, tmp_path, dtype):
    env = vec_env(dtype=dtype)
    agent = make(env, memory={**LORA, "lora_alpha": 4.0}).learn(26)
    agent.save(tmp_path / "agent.zip")
    small, whole = (make(env, memory=memory) for memory in (LORA, {}))
    whole.save(tmp_path / "whole.zip")
    held = [zipfile.ZipFile(tmp_path / f"{name}.zip").getinfo("policy.pth").file_size for name in ("agent", "whole")]
    assert held[0] < held[1]
    assert len(agent.policy.state_dict()) == 2 + 16
    for options in ({"env": vec_env(dtype=dtype)}, {}):
        loaded = PPO.load(tmp_path / "agent.zip", device="cpu", **options)
        assert storages(env.get_attr("task")[0].reference.model) < storages(loaded.policy.model)
        assert torch.equal(logits(loaded.policy.model), logits(agent.policy.model))
        assert torch.equal(loaded.policy.value_head.linear.weight, agent.policy.value_head.linear.weight)
    agent.policy.save(tmp_path / "policy.pt")
    again = CausalLMPolicy.load(tmp_path / "policy.pt", device="cpu")
    assert torch.equal(logits(again.model), logits(agent.policy.model))
    assert not torch.equal(logits(small.policy.model), logits(agent.policy.model))


def test_weights_of_the_base_are_never_loaded_into_what_others_share(vec_env):
    whole, agent = make(vec_env(), memory={}), make(vec_env())
    with pytest.raises(ValueError, match="must be those that a policy with adapters trains, got model"):
        agent.set_parameters(whole.get_parameters(), exact_match=False)


def test_the_policy_is_saved_as_an_adapter_that_plain_peft_loads_and_merged(vec_env, model_folder, tmp_path):
    agent = make(vec_env()).learn(26)
    agent.policy.language_model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        model_folder
    )
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(plain), logits(agent.policy.model))
    assert torch.equal(logits(textenv.language_model(str(tmp_path / "adapter")).model), logits(agent.policy.model))
    agent.policy.language_model.merged().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(agent.policy.model), atol=1e-5, rtol=0)
    # A saved adapter is a policy to go on with: adapters that are there already are trained, and saved, alone.
    more = make(vec_env(), memory={"model": str(tmp_path / "adapter")})
    assert torch.equal(logits(more.policy.model), logits(agent.policy.model))
    assert len(more.policy.state_dict()) == 2 + 16


def test_other_seeds_draw_other_adapters_and_the_same_seed_the_same(vec_env):
    one, same, other = (weights(make(vec_env(), seed=seed).policy) for seed in (1, 1, 2))
    name = next(name for name in one if "lora_A" in name)
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])


def test_fewer_layers_and_recomputed_activations_train_what_they_should(vec_env):
    plain = make(vec_env(), memory={"train_layers": 1}).learn(65)
    agent = make(vec_env(), memory={"train_layers": 1, "gradient_checkpointing": True})
    before = weights(agent.policy)
    agent.learn(65)
    changed = {name for name, weight in agent.policy.named_parameters() if not torch.equal(weight, before[name])}
    top = ("model.transformer.h.1.", "model.transformer.ln_f.", "value_head.")
    assert changed == {name for name in before if name.startswith(top)}
    for one, other in zip(agent.policy.parameters(), plain.policy.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_wrong_settings_are_refused(vec_env):
    with pytest.raises(ValueError, match="lora_rank must be 0 or more, got -1"):
        make(vec_env(), memory={"lora_rank": -1})
    with pytest.raises(ValueError, match="train_layers must be 2 or less, the blocks of the model, got 3"):
        make(vec_env(), memory={"train_layers": 3})
    with pytest.raises(ValueError, match="lora_alpha must be above 0"):
        SB3PPO.check({"lora_rank": 2, "lora_alpha": 0.0})
    textenv.register_language_model("other", lambda: tiny_model(seed=5))
    agent = make(vec_env(), memory={"model": "other", **LORA})
    assert storages(textenv.language_model("other").model) < storages(agent.policy.model)


def test_experiments_take_the_same_options_and_adapters_learn_the_exact_world(tmp_path):
    """A regret ratio of 1 is the reference's."""
    settings = {"num_envs": 128, "n_steps": 8, "batch_size": 256, "n_epochs": 4, "gamma": 1.0, "vf_coef": 0.1}
    options = {**settings, "learning_rate": 5e-3, "lora_rank": 16, "lora_alpha": 32}
    trained = SB3PPO.train(Job("textenv/Micro-v0", options, 0, 1500, tmp_path))
    reference = trained.agent.task.reference.model
    assert storages(reference) < storages(trained.model)
    world = exact_world(make_vec_env("textenv/Micro-v0", 4))
    assert world.measure(reference).regret_ratio == pytest.approx(1.0)
    assert world.measure(trained.model).regret_ratio < 0.85
