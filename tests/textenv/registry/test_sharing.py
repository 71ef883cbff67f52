"""Loaded models that have matrices in common hold them once: nothing else changes."""

import gc
import weakref
from pathlib import Path

import gymnasium
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import textenv
from agents.ppo import PPO, PPOConfig
from reward_models.preferences import load_rankings
from reward_models.scorers.transformer import TransformerRewardModel, load_reward_model
from reward_models.training.start import start_reward_model
from reward_models.training.trainer import RewardConfig, train_reward_model
from tests.conftest import FAMILIES, encoder_folder, tiny_model
from textenv.config import Loading
from textenv.lm.load import load_language_model
from textenv.registry import clear_cache, sharing
from textenv.registry.sharing import share_matrices
from textenv.training.memory import MemoryConfig, named_policy

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

RANKINGS = [
    {"prompt": "what is the sky ?", "responses": ["blue", "red", "the grass"], "ranking": [0, 1, 2]},
    {"prompt": "the grass", "responses": ["is green", "is not green", "sky"], "ranking": [0, 2, 1]},
]
TEXTS = [["the sky", "red", "what is"], ["is blue", "<eos>", "green grass ?"]]


@pytest.fixture(autouse=True)
def _nothing_loaded(monkeypatch):
    clear_cache()
    monkeypatch.setattr(sharing, "_holders", weakref.WeakSet())
    yield
    clear_cache()


def trunk(model, *, matrices=True):
    named = {name.replace(".base_layer.", "."): p for name, p in model.base_model.named_parameters()}
    return {name: p for name, p in named.items() if (p.ndim > 1) == matrices and "lora_" not in name}


def shared(one, other):
    """Names of the matrices (and vectors) that two models hold in the same memory."""
    names = {}
    for matrices in (True, False):
        mine, theirs = trunk(one, matrices=matrices), trunk(other, matrices=matrices)
        names[matrices] = {n for n in mine if n in theirs and mine[n].data_ptr() == theirs[n].data_ptr()}
    return names


def on_frozen_trunk(family, folder, **settings):
    """A reward model whose trunk is that of the language model saved beside it."""
    start = tiny_model(family)
    start.save_pretrained(folder / "lm")
    config = RewardConfig(learning_rate=1e-2, epochs=2, freeze_trunk=True, **settings)
    train_reward_model(start, RANKINGS, config, folder / "rm")
    return str(folder / "lm"), str(folder / "rm")


def test_a_function_that_returns_a_model_it_keeps_lends_it_to_nobody_who_trains():
    """A policy that were the reference itself would have no KL, and would move the reference with it."""
    kept = tiny_model()
    textenv.register_language_model("kept", lambda: kept)
    fresh = [textenv.fresh_language_model("kept") for _ in range(2)]
    reference = textenv.language_model("kept")
    models = [kept.model, *(lm.model for lm in fresh)]
    assert len({id(model) for model in models}) == 3
    assert len({weight.data_ptr() for model in models for weight in [next(model.parameters())]}) == 3
    assert reference.model is kept.model


@pytest.mark.parametrize("order", ["reference first", "reward model first"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reward_model_on_the_frozen_trunk_of_the_reference_holds_no_trunk_of_its_own(family, order, tmp_path):
    """All matrices of the blocks; the embedding has a row more here, for the padding token."""
    lm, rm = on_frozen_trunk(family, tmp_path)
    alone, logits = load_reward_model(rm), load_language_model(lm).model(torch.tensor([[1, 2, 3]])).logits
    names = [lambda: textenv.reward_model(rm), lambda: textenv.language_model(lm)]
    for load in names if order == "reward model first" else names[::-1]:
        load()
    scorer, reference = textenv.reward_model(rm), textenv.language_model(lm)
    blocks = {name for name in trunk(reference.model) if name.startswith(("h.", "layers."))}
    assert len(blocks) == (8 if family == "gpt2" else 14)
    found = shared(scorer.model, reference.model)
    assert blocks <= found[True]
    assert not found[False]  # normalising shifts a bias in place
    assert scorer(*TEXTS) == alone(*TEXTS)
    assert scorer.identity == alone.identity
    assert torch.equal(reference.model(torch.tensor([[1, 2, 3]])).logits, logits)


def test_what_is_trained_or_normalised_shares_nothing(tmp_path):
    lm, rm = on_frozen_trunk("gpt2", tmp_path)
    reference, scorer = textenv.language_model(lm), textenv.reward_model(rm)
    before = reference.model(torch.tensor([[1, 2, 3]])).logits
    for own in (textenv.fresh_language_model(lm).model, start_reward_model(rm).model, load_reward_model(rm).model):
        assert not any(shared(own, reference.model).values())
        assert not any(shared(own, scorer.model).values())
    fresh = tiny_model()
    textenv.register_language_model("made", lambda: fresh)
    assert not any(shared(textenv.language_model("made").model, reference.model).values())  # its maker may train it
    scorer.normalize(load_rankings(RANKINGS))
    assert torch.equal(reference.model(torch.tensor([[1, 2, 3]])).logits, before)


def test_heads_on_one_frozen_trunk_share_all_of_it_in_an_ensemble(tmp_path):
    folders = [str(tmp_path / str(seed)) for seed in (1, 2)]
    for seed, folder in enumerate(folders):
        config = RewardConfig(learning_rate=1e-2, freeze_trunk=True, epochs=seed + 1)
        train_reward_model(tiny_model(), RANKINGS, config, folder)
    spec = {"ensemble": [folders[0], {"classifier": folders[1], "batch_size": 3}]}
    alone = [load_reward_model(folder)(*TEXTS) for folder in folders]
    ensemble = textenv.reward_model(spec)
    one, other = ensemble.members.values()
    assert shared(one.model, other.model)[True] == set(trunk(one.model))
    assert ensemble(*TEXTS) == pytest.approx([(a + b) / 2 for a, b in zip(*alone, strict=True)], abs=1e-6)


def test_only_what_is_equal_bit_for_bit_is_shared():
    one, other = tiny_model().model, tiny_model().model
    with torch.no_grad():
        for model, zero in ((one, 0.0), (other, -0.0)):
            model.transformer.h[0].attn.c_attn.weight[0, 0] = zero
        other.transformer.h[1].mlp.c_fc.weight[0, 0] += 1e-6
    lower = tiny_model().model.to(torch.bfloat16)
    assert share_matrices(one) == 0
    freed = share_matrices(other)
    assert share_matrices(lower) == 0
    apart = {"h.0.attn.c_attn.weight", "h.1.mlp.c_fc.weight"}
    assert shared(one, other)[True] == set(trunk(one)) - apart
    assert freed == 4 * sum(weight.numel() for name, weight in trunk(one).items() if name not in apart)
    assert share_matrices(other) == 0
    assert one.lm_head.weight is one.transformer.wte.weight
    assert other.lm_head.weight is other.transformer.wte.weight


def test_encoders_share_too(tmp_path):
    encoder_folder("bert", tmp_path / "start")
    for name, epochs in (("a", 1), ("b", 2)):
        config = RewardConfig(learning_rate=1e-2, epochs=epochs, freeze_trunk=True)
        train_reward_model(TransformerRewardModel.from_encoder(tmp_path / "start"), RANKINGS, config, tmp_path / name)
    one, other = (textenv.reward_model(str(tmp_path / name)) for name in "ab")
    assert shared(one.model, other.model)[True] == set(trunk(one.model))
    assert one(*TEXTS) != other(*TEXTS)


def test_an_environment_loads_the_trunk_of_both_once_and_trains_beside_it(text_options, tmp_path):
    lm, rm = on_frozen_trunk("llama", tmp_path)
    options = {**text_options, "reference": lm, "reward_model": rm}
    env = gymnasium.make_vec("textenv/Text-v0", num_envs=8, **options).unwrapped
    scorer = textenv.reward_model(rm)
    before = scorer(*TEXTS)
    assert len(shared(scorer.model, env.reference.model)[True]) >= 14
    agent = PPO(env, PPOConfig(batch_size=16, learning_rate=1e-2)).learn(32)
    assert not any(shared(agent.policy.model, env.reference.model).values())
    assert scorer(*TEXTS) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_plain_peft_with_a_head_are_a_reward_model_on_the_weights_of_the_reference(family, tmp_path):
    peft = pytest.importorskip("peft")
    tiny_model(family).save_pretrained(tmp_path / "lm")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=1)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=family == "gpt2"
    )
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "rm")
    reference, scorer = textenv.language_model(str(tmp_path / "lm")), textenv.reward_model(str(tmp_path / "rm"))
    # Last token of each text: EOS, which the model reads after prompt and completion.
    ids = [[*reference.tokenizer(f"{p} {c}").input_ids, 0] for p, c in zip(*TEXTS, strict=True)]
    base.config.pad_token_id = None  # it is EOS here, before which transformers would read the score
    with torch.no_grad():
        plain = [float(theirs(input_ids=torch.tensor([row])).logits) for row in ids]
    assert scorer(*TEXTS) == pytest.approx(plain, abs=1e-5)
    assert shared(scorer.model, reference.model)[True] == set(trunk(reference.model))
    scorer.save_pretrained(tmp_path / "merged")
    assert load_reward_model(tmp_path / "merged")(*TEXTS) == pytest.approx(plain, abs=1e-5)
    more = start_reward_model(str(tmp_path / "rm"))
    assert all(weight.requires_grad for weight in more.model.parameters())
    assert more(*TEXTS) == pytest.approx(plain, abs=1e-5)
    trained = train_reward_model(more, RANKINGS, RewardConfig(learning_rate=1e-2), tmp_path / "more")
    assert load_reward_model(tmp_path / "more")(*TEXTS) == pytest.approx(trained.model(*TEXTS), abs=1e-6)


def test_adapters_without_a_head_are_no_reward_model(tmp_path):
    peft = pytest.importorskip("peft")
    start = tiny_model()
    start.save_pretrained(tmp_path / "lm")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    wrapped = peft.get_peft_model(start.model, config)
    wrapped.peft_config["default"].base_model_name_or_path = str(tmp_path / "lm")
    wrapped.save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match=r"must come with a score head, or .*, got '.*/policy' for"):
        load_reward_model(tmp_path / "policy")


def test_an_adapter_keeps_the_weights_of_its_base_where_another_model_has_equal_ones(tmp_path):
    """The base is made by a function, and so is not shared; a folder that was loaded before has the same weights."""
    pytest.importorskip("peft")
    tiny_model("llama").save_pretrained(tmp_path / "twin")
    twin = textenv.language_model(str(tmp_path / "twin"))
    textenv.register_language_model("sharing-base", lambda: tiny_model("llama"))
    named_policy(MemoryConfig(lora_rank=2), "sharing-base", Loading(), 0).save_pretrained(tmp_path / "adapter")
    base, loaded = textenv.language_model("sharing-base"), textenv.language_model(str(tmp_path / "adapter"))
    weights = {p.data_ptr() for p in loaded.model.parameters()}
    assert {p.data_ptr() for p in base.model.parameters()} <= weights
    assert not {p.data_ptr() for p in twin.model.parameters()} & weights


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says which files are in memory")
def test_what_stays_its_own_does_not_keep_the_whole_file_in_memory(tmp_path):
    lm, rm = on_frozen_trunk("gpt2", tmp_path)
    clear_cache()
    textenv.language_model(lm)
    weights = str(tmp_path / "rm" / "model.safetensors")
    alone = load_reward_model(rm)
    assert weights in Path("/proc/self/maps").read_text()  # safetensors maps the file; a tensor is a part of it
    del alone
    gc.collect()
    kept = textenv.reward_model(rm)
    assert shared(textenv.language_model(lm).model, kept.model)[True]
    assert weights not in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says which files are in memory")
def test_a_language_model_that_equals_another_does_not_keep_its_file_in_memory(tmp_path):
    for name in "ab":
        tiny_model().save_pretrained(tmp_path / name)
    models = [textenv.language_model(str(tmp_path / name)) for name in "ab"]
    gc.collect()
    assert models[0].model is not models[1].model
    mapped = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "a" / "model.safetensors") in mapped
    assert str(tmp_path / "b" / "model.safetensors") not in mapped
