"""Small worlds made on the spot: word-level tokenizers and random models of several families, no network."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from tests import shapes

# Shapes are types: in the tests, beartype checks those of calls into the packages.
shapes.install("textenv", "reward_models", "agents")

from transformers import AutoConfig  # noqa: E402

import textenv  # noqa: E402
from textenv.lm.load import word_level_tokenizer, wrap_language_model  # noqa: E402

torch.set_num_threads(1)  # the models are tiny: more threads only wait for one another


def pytest_collection_modifyitems(items):
    """What trains models goes first, so that no process is left alone with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _first_calls_are_checked():
    shapes.new_test()


WORDS = ("<eos>", "red", "green", "blue", "sky", "grass", "is", "the", "what", "?", "not", "<unk>")

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": LLAMA,
    "qwen2": LLAMA,
}
FORGETFUL = {"mistral": {**LLAMA, "sliding_window": 3}}
"""A family whose attention reaches back no further than its window."""
GEMMA = {**LLAMA, "head_dim": 8, "sliding_window": 3}
OTHERS = {
    "qwen3": {**LLAMA, "head_dim": 8},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
    "gemma3_text": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": LLAMA,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 24,
        "max_position_embeddings": 64,
    },
    "gpt_neox": {name: size for name, size in LLAMA.items() if name != "num_key_value_heads"},
    "smollm": {**LLAMA, "model_type": "llama", "tie_word_embeddings": True},
    "smollm3": {**LLAMA, "no_rope_layers": [1, 0]},
}
EVERY_FAMILY = {**FAMILIES, **FORGETFUL, **OTHERS}
"""The families of the README, of which ``tests/test_families.py`` trains each; the others try the first three."""
STATEFUL = {
    "jamba": {**LLAMA, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "num_experts": 2},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "recurrent_gemma": {**LLAMA, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 64},
}
"""Families with recurrent layers. Only Jamba's can be padded on the left and cached."""


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token; the padding token *is* EOS."""
    return word_level_tokenizer(WORDS)


def kl_k2(logprobs, ref_logprobs):
    """(log π − log π_ref)² / 2 per token: the biased estimator that must not stand inside a reward."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def tiny_model(family: str = "gpt2", seed: int = 0, spread: float = 0.2):
    """A random causal language model over ``WORDS``, far from uniform, as a ``LanguageModel``."""
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    recipe = {"model_type": family, **{**EVERY_FAMILY, **STATEFUL}[family]}
    config = AutoConfig.for_model(vocab_size=len(WORDS), **special, **recipe)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, spread)
    return wrap_language_model(model, word_tokenizer(), name=f"tiny-{family}-{seed}")


ENCODERS = {
    "bert": (BertConfig, BertModel),
    "deberta-v2": (DebertaV2Config, DebertaV2Model),
    "roberta": (RobertaConfig, RobertaModel),
}


def encoder_folder(kind: str, folder: Path) -> Path:
    """A random pre-trained encoder of 64 positions; a pair reads ``<cls> a <sep> b <sep>``."""
    make_config, make_model = ENCODERS[kind]
    words = word_tokenizer()
    words.add_special_tokens({"pad_token": "<pad>", "cls_token": "<cls>", "sep_token": "<sep>"})
    special = [(token, words.convert_tokens_to_ids(token)) for token in ("<cls>", "<sep>")]
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<cls> $A <sep>", pair="<cls> $A <sep> $B:1 <sep>:1", special_tokens=special
    )
    config = make_config(
        vocab_size=len(words),
        pad_token_id=words.pad_token_id,
        type_vocab_size=2,
        max_position_embeddings=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make_model(config)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=list(FAMILIES))
def family_model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(folder)
    return folder


PROMPTS = ["what is the sky ?", "the grass", "red", "is the <eos> not green"]


def colour_score(prompts, completions, **columns):
    """A reward that reads prompt, text and ending, so that a mix-up of any of them shows."""
    reasons = columns["finish_reason"]
    return [
        completion.split().count("blue")
        - 0.3 * len(completion.split())
        + 0.01 * len(prompt)
        - 0.5 * (reason == "length")
        for prompt, completion, reason in zip(prompts, completions, reasons, strict=True)
    ]


@pytest.fixture
def text_options(model_folder) -> dict:
    textenv.register_reward_model("colour", colour_score)
    return {
        "prompts": PROMPTS,
        "reference": str(model_folder),
        "reward_model": "colour",
        "max_prompt_tokens": 7,
        "max_new_tokens": 6,
        "kl_coef": 0.1,
    }


@pytest.fixture
def make_vector(text_options):
    def make(num_envs: int, **options):
        return gymnasium.make_vec("textenv/Text-v0", num_envs=num_envs, **{**text_options, **options})

    return make


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
