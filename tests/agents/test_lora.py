"""Adapters on the reference's own weights: one model in memory, an untouched reference, folders that peft reads."""

import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import textenv
from agents.core.returns import Advantages
from agents.grpo import GRPO
from agents.ppo import PPO
from agents.reinforce import Reinforce
from agents.rloo import RLOO
from tests.conftest import FAMILIES, tiny_model
from textenv.cli import main
from textenv.evaluation import evaluate
from textenv.lm import response_logprobs

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CONFIG = {"batch_size": 32, "learning_rate": 1e-2, "seed": 0, "lora_rank": 3}


@pytest.fixture
def learner(make_vector):
    def make(kind=PPO, policy=None, env_options=(), **config):
        env = make_vector(16, **dict(env_options)).unwrapped
        return kind(env, kind.config_type(**{**CONFIG, **config}), policy)

    return make


def storages(*models):
    return {parameter.untyped_storage().data_ptr() for model in models for parameter in model.parameters()}


def weights(agent):
    return {name: weight.detach().clone() for name, weight in agent.actor.named_parameters()}


def user_policy(**options):
    """What a user of peft has."""
    base = tiny_model(seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=2, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=True, **options
        )
        return base, peft.get_peft_model(base.model, config)


@pytest.mark.parametrize(
    ("kind", "family"), [(PPO, "llama"), (PPO, "gpt2"), (RLOO, "gpt2"), (GRPO, "qwen2"), (Reinforce, "llama")]
)
def test_the_policy_starts_as_the_reference_on_its_very_weights_and_leaves_it_alone(learner, kind, family):
    textenv.register_language_model(f"shared-{family}", lambda: tiny_model(family))
    agent = learner(kind, env_options={"reference": f"shared-{family}"})
    reference, policy = agent.task.reference.model, agent.policy.model
    assert policy is not reference
    assert storages(reference) < storages(policy)
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    grads = [parameter.requires_grad for parameter in reference.parameters()]
    rollout = agent.collect()
    scored = response_logprobs(reference, rollout.tokens, agent.task.rule)
    assert torch.equal(scored, response_logprobs(policy, rollout.tokens, agent.task.rule))  # B is 0
    assert rollout.kl_per_token.abs().max() < 1e-5
    agent.learn(64)
    assert torch.equal(scored, response_logprobs(reference, rollout.tokens, agent.task.rule))
    assert not torch.allclose(scored, response_logprobs(policy, rollout.tokens, agent.task.rule), atol=1e-3)
    assert reference.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in reference.state_dict().items())
    assert [parameter.requires_grad for parameter in reference.parameters()] == grads
    assert all(parameter.grad is None for parameter in reference.parameters())
    for module in policy.modules():  # with its adapters off, the trained policy is the reference
        if hasattr(module, "lora_A"):
            module.enable_adapters(False)
    assert torch.equal(scored, response_logprobs(policy, rollout.tokens, agent.task.rule))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_stand_on_every_linear_layer_of_the_trunk_and_the_value_head_trains_in_full(learner, family):
    """Two blocks of GPT-2 have 4 layers each, those of Llama and Qwen2 have 7; each adapter is A and B."""
    textenv.register_language_model(f"shared-{family}", lambda: tiny_model(family))
    agent = learner(env_options={"reference": f"shared-{family}"})
    trained = {name for name, weight in agent.actor.named_parameters() if weight.requires_grad}
    assert {name for name in trained if not name.startswith("model.")} == {
        "value_head.features.weight",
        "value_head.features.bias",
        "value_head.output.linear.weight",
        "value_head.output.linear.bias",
    }
    assert len(trained) - 4 == 2 * 2 * (4 if family == "gpt2" else 7)
    assert sum(len(group["params"]) for group in agent.optimizer.param_groups) == len(trained)


def test_an_update_allocates_no_second_model(learner):
    """Of all tensors that torch makes while a learner is built, only the value head is as large as a weight matrix."""
    agent = learner()
    largest = max(weight.numel() for weight in agent.task.reference.model.parameters())
    head = agent.actor.value_head.features.weight.numel()

    class Large(TorchDispatchMode):
        sizes: ClassVar[dict[int, int]] = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out.is_meta and not out._is_view():
                made = out.untyped_storage().data_ptr() not in shared
                if made and out.numel() >= min(largest, head):
                    Large.sizes[out.untyped_storage().data_ptr()] = out.numel()
            return out

    shared = storages(agent.task.reference.model)
    with Large():
        other = PPO(agent.env, agent.config)
    assert Large.sizes == {other.actor.value_head.features.weight.data_ptr(): head}


def test_a_critic_of_its_own_is_another_adapter_on_the_same_weights(learner, make_vector, tmp_path):
    agent = learner(value_function="trunk").learn(32)
    own = storages(agent.actor) - storages(agent.task.reference.model)
    assert len(own) == 2 * 16 + 4
    agent.save(tmp_path / "run")
    value = PPO.load(tmp_path / "run", make_vector(16).unwrapped).actor.critic
    for (name, saved), loaded in zip(agent.actor.critic.named_parameters(), value.parameters(), strict=True):
        assert torch.equal(saved, loaded), name


@pytest.mark.parametrize("kind", [PPO, RLOO, Reinforce])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_n_updates_saved_loaded_and_n_more_equal_two_n(learner, make_vector, kind, dtype, tmp_path):
    options = {"dtype": dtype}
    whole = learner(kind, env_options=options).learn(128)
    half = learner(kind, env_options=options).learn(64)
    half.save(tmp_path / "run")
    resumed = kind.load(tmp_path / "run", make_vector(16, **options).unwrapped)
    assert storages(resumed.task.reference.model) < storages(resumed.policy.model)
    resumed.learn(64)
    one, other = weights(whole), weights(resumed)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [log["kl"] for log in whole.history] == [log["kl"] for log in resumed.history]


def test_in_bfloat16_the_adapters_and_what_is_learnt_from_are_float32(learner):
    agent = learner(env_options={"dtype": "bfloat16"})
    dtypes = {(weight.dtype, weight.requires_grad) for weight in agent.actor.parameters()}
    assert dtypes == {(torch.bfloat16, False), (torch.float32, True)}
    rollout = agent.collect()
    new = agent.actor.evaluate(rollout.tokens, agent.task, entropy=True)
    assert (new.logprobs.dtype, new.values.dtype, new.entropy.dtype) == (torch.float32,) * 3
    assert rollout.kl_per_token.abs().mean() < 0.05
    agent.learn(64)
    assert all(np.isfinite(log["grad_norm"]) and log["grad_norm"] > 0 for log in agent.history)


def test_the_saved_policy_is_an_adapter_that_plain_peft_loads_onto_the_reference(learner, model_folder, tmp_path):
    agent = learner().learn(64)
    agent.save(tmp_path / "run")
    folder = tmp_path / "run" / "policy"
    assert not (folder / "model.safetensors").exists()
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == str(model_folder)
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (3, 6, "CAUSAL_LM")  # alpha is twice the rank
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    ids, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.int64)
    plain = base(ids, attention_mask=mask).logits
    loaded = peft.PeftModel.from_pretrained(base, folder)
    trained = agent.policy.model(ids, attention_mask=mask).logits
    torch.testing.assert_close(loaded(ids, attention_mask=mask).logits, trained)
    assert not torch.allclose(plain, trained, atol=1e-3)
    by_name = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(by_name(ids, attention_mask=mask).logits, trained)
    for load in (textenv.lm.load_language_model, lambda name: textenv.fresh_language_model(str(name))):
        assert torch.equal(load(folder).model(ids, attention_mask=mask).logits, trained)


def test_merged_weights_are_a_plain_model_that_says_the_same(learner, tmp_path):
    agent = learner().learn(64)
    before = weights(agent)
    agent.save_merged(tmp_path / "merged")
    assert all(torch.equal(before[name], weight) for name, weight in agent.actor.named_parameters())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    names = {name for name, _ in plain.named_parameters()}
    assert names == {name for name, _ in agent.task.reference.model.named_parameters()}
    tokens = agent.collect().tokens
    expected = response_logprobs(agent.policy.model, tokens, agent.task.rule)
    torch.testing.assert_close(response_logprobs(plain.eval(), tokens, agent.task.rule), expected, atol=1e-5, rtol=0)
    assert all(weight.requires_grad for weight in agent.policy.merged().model.parameters())


def test_an_adapter_of_a_registered_reference_is_found_by_its_name(learner, tmp_path):
    textenv.register_language_model("my-sft", lambda: tiny_model("llama"))
    agent = learner(env_options={"reference": "my-sft"}).learn(32)
    agent.save(tmp_path / "run")
    folder = tmp_path / "run" / "policy"
    loaded = textenv.language_model(str(folder))
    assert storages(textenv.language_model("my-sft").model) < storages(loaded.model)
    assert json.loads((folder / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"] == "my-sft"
    tokens = agent.collect().tokens
    ours, theirs = (response_logprobs(m, tokens, agent.task.rule) for m in (agent.policy.model, loaded.model))
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"the base of an adapter must be a folder.*got 'my-sft' in the adapter_con"):
        textenv.lm.load_language_model(folder)


def test_an_adapter_whose_base_is_missing_or_another_says_so(learner, tmp_path):
    learner().save(tmp_path / "run")
    file = tmp_path / "run" / "policy" / "adapter_config.json"
    config = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match=r"the base of an adapter must be a registered name.*/gone'.*Register it"):
        textenv.language_model(str(tmp_path / "run" / "policy"))
    with pytest.raises(ValueError, match="an adapter must fit its base, a LlamaForCausalLM"):
        textenv.lm.load_language_model(tmp_path / "run" / "policy", base=tiny_model("llama"))


def test_an_adapter_file_with_weights_of_the_base_does_not_overwrite_them(learner, tmp_path):
    learner().save(tmp_path / "run")
    file, base = tmp_path / "run" / "policy" / "adapter_model.safetensors", tiny_model()
    name = "base_model.model.transformer.wte.weight"
    save_file({**load_file(file), name: torch.zeros(12, 32)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"must fit its base.*: transformer\.wte\.weight is on one side only"):
        textenv.lm.load_language_model(file.parent, base=base)
    assert torch.equal(base.model.transformer.wte.weight, tiny_model().model.transformer.wte.weight)


def test_the_command_trains_adapters_merges_them_and_evaluates_both_alike(tmp_path, capsys):
    train = ["ppo", "--env-id", "textenv/Micro-v0", "--output", str(tmp_path / "ppo"), "--lora-rank", "4"]
    train += ["--total-episodes", "64", "--batch-size", "32", "--num-envs", "32", "--learning-rate", "0.01"]
    main([*train, "--merge-into", str(tmp_path / "merged")])
    assert (tmp_path / "ppo" / "policy" / "adapter_config.json").is_file()
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    capsys.readouterr()
    figures = []
    for model in (tmp_path / "ppo", tmp_path / "merged"):
        main(["evaluate", "--model", str(model), "--env-id", "textenv/Micro-v0", "--deterministic", "--json"])
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[0]["rm_score"] == figures[1]["rm_score"]


def test_a_policy_of_a_user_of_peft_is_trained_as_it_is(learner, make_vector, tmp_path):
    base, wrapped = user_policy(lora_dropout=0.5)
    policy = textenv.lm.load.wrap_language_model(wrapped, base.tokenizer, name="mine")
    agent = learner(policy=policy, lora_rank=0, learning_rate=1e-2)
    own = {weight.untyped_storage().data_ptr() for weight in wrapped.parameters() if weight.requires_grad}
    assert own == {p.untyped_storage().data_ptr() for p in agent.policy.model.parameters() if p.requires_grad}
    rollout = agent.collect()
    agent.actor.train()
    new = agent.actor.evaluate(rollout.tokens, agent.task)  # no dropout, so the first ratio is 1
    torch.testing.assert_close(new.logprobs, rollout.logprobs[:, : new.logprobs.shape[1]], atol=1e-5, rtol=0)
    before = [weight.detach().clone() for weight in wrapped.parameters() if weight.requires_grad]
    agent.learn(64)
    after = [weight for weight in wrapped.parameters() if weight.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert evaluate(agent, make_vector(4).unwrapped).kl.mean() > 0
    agent.save(tmp_path / "run")
    ids = torch.tensor([[1, 2, 3]])
    again = peft.PeftModel.from_pretrained(tiny_model(seed=0).model, tmp_path / "run" / "policy")
    assert torch.equal(again(ids).logits, wrapped(ids).logits)


def test_the_log_probabilities_of_a_wrapped_model_are_those_of_its_own_pass(make_vector):
    base, wrapped = user_policy(init_lora_weights=False)
    env = make_vector(4).unwrapped
    env.attach_policy(wrapped)
    observation, _ = env.reset(seed=0)
    ids, lengths = torch.tensor([[1, 2, 0]] * 4), torch.tensor([3] * 4)
    infos = env.play(ids, lengths)[4]["final_info"]
    for slot in range(4):
        prompt = observation["input_ids"][slot][: env.task.prompt_width][-int(observation["prompt_length"][slot, 0]) :]
        row = torch.tensor([[*prompt, 1, 2, 0]])
        own, ref = (
            m(row).logits[0, -4:-1].log_softmax(-1)[range(3), [1, 2, 0]] for m in (wrapped, env.reference.model)
        )
        np.testing.assert_allclose(infos["kl_per_token"][slot, :3], (own - ref).detach(), atol=1e-5)
    assert base.model is wrapped.get_base_model()


def test_what_cannot_be_combined_is_refused(learner, tmp_path):
    base, wrapped = user_policy()
    policy = textenv.lm.load.wrap_language_model(wrapped, base.tokenizer)
    with pytest.raises(ValueError, match=r"lora_rank must be 0 or the rank of the policy's own adapters \(2\), got 3"):
        learner(policy=policy)
    learner().save(tmp_path / "run")
    with pytest.raises(ValueError, match="must have no adapters before new ones are added, got default"):
        learner(env_options={"reference": str(tmp_path / "run" / "policy")})
    prompt = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", num_attention_heads=2)
    prompt.num_layers, prompt.token_dim = 2, 32
    tuned = peft.get_peft_model(tiny_model().model, prompt)
    with pytest.raises(ValueError, match="adapters must change layers of a model, got PROMPT_TUNING"):
        textenv.lm.load.wrap_language_model(tuned, base.tokenizer)
    wrapped.add_adapter("second", peft.LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=True))
    with pytest.raises(ValueError, match="must have one adapter to be saved, got default, second"):
        policy.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match=r"lora_alpha must be above 0, got 0"):
        learner(lora_alpha=0)


def test_the_gradient_of_an_adapter_is_that_of_the_weight_which_it_adapts(learner):
    """With W + s·B·A and B = 0: dL/dB = s · dL/dW · Aᵀ and dL/dA = 0, with s = lora_alpha / rank. GPT-2 holds Wᵀ."""
    agent, full = learner(lora_alpha=6.0, max_grad_norm=1e9), learner(lora_rank=0, max_grad_norm=1e9)
    rollout = agent.collect()
    advantages = torch.randn(rollout.values.shape, generator=torch.Generator().manual_seed(0))
    for one in (agent, full):
        one.step(rollout, Advantages(advantages, advantages), torch.arange(20))
    dense = dict(full.policy.model.named_parameters())
    found = 0
    for name, module in learner().policy.model.named_modules():  # A as it was before the step
        if not hasattr(module, "lora_A"):
            continue
        trained = agent.policy.model.get_submodule(name)
        expected = 6.0 / 3 * dense[f"{name}.weight"].grad.T @ module.lora_A["default"].weight.T
        torch.testing.assert_close(trained.lora_B["default"].weight.grad, expected, atol=1e-6, rtol=1e-3)
        assert trained.lora_A["default"].weight.grad.abs().max() == 0
        found += 1
    assert found == 8
