"""Texts that a tokenizer cannot read, weights that no file holds, and packages that are not there."""

import json

import pytest
from safetensors.torch import load_file, save_file

import textenv
from reward_models import load_reward_model
from tests.conftest import encoder_folder, tiny_model
from textenv.cli import main
from textenv.lm import load_language_model


@pytest.mark.parametrize("text", ["user: hello stranger", "caf\u00e9"])
def test_a_word_that_a_model_does_not_know_is_named(text):
    model = textenv.registry.language_model("micro-reference")
    for encode in (model.encode_prompt, lambda own: model.encode_response(own, eos=True)):
        with pytest.raises(ValueError, match=f"tokens that 'micro-reference' knows, got '{text}'.*Correct the text"):
            encode(text)


@pytest.mark.parametrize("command", ["sft", "reward", "dpo"])
def test_so_is_one_in_the_data_of_a_training(command, tmp_path, capsys):
    well = {"prompt": "a b", "completion": "c"} if command == "sft" else {"prompt": "a b", "chosen": "c"}
    well |= {} if command == "sft" else {"rejected": "d"}
    records = [well, {**well, "prompt": "hello stranger"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = ["--data", str(tmp_path / "data.jsonl"), "--output", str(tmp_path / "out")]
    assert main([command, "--model", "micro-reference", *options]) == 2
    said = capsys.readouterr().err
    assert "must be made of tokens that" in said
    assert "got 'hello stranger'" in said


def test_a_kind_of_attention_whose_package_is_missing_is_one_clear_error(model_folder, tmp_path):
    """In every way to a model: a folder, a function, and a classifier."""
    textenv.register_language_model("made", lambda: tiny_model())
    rule = "attn_implementation must be one whose package is installed, got 'flash_attention_2'.*or use sdpa"
    classifier = str(textenv.registry.registered_sources("reward model")["assistant-rm"])
    for load, name in (
        (textenv.language_model, str(model_folder)),
        (textenv.language_model, "made"),
        (textenv.reward_model, classifier),
    ):
        with pytest.raises(ValueError, match=rule):
            load(name, attn_implementation="flash_attention_2")


def without(folder, *names):
    weights = load_file(folder / "model.safetensors")
    for name in names:
        weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["lm_head.weight"], r"without 1 of them \(lm_head.weight\)"),
        (["model.norm.weight", "model.layers.0.mlp.up_proj.weight"], r"without 2 of them \(model.layers.0.*, …\)"),
    ],
)
def test_a_model_without_some_of_its_weights_is_refused(names, found, tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "lm")
    folder = without(tmp_path / "lm", *names)
    with pytest.raises(ValueError, match=f"all its weights, got .*{found}: they would be random numbers"):
        load_language_model(folder)
    (tmp_path / "data.jsonl").write_text('{"prompt": "what", "completion": "that"}\n')
    options = ["--data", str(tmp_path / "data.jsonl"), "--output", str(tmp_path / "out")]
    assert main(["sft", "--model", str(folder), *options]) == 2
    assert "must have all its weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tied_head_is_not_missing_and_an_encoder_has_none(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path / "tied")
    load_language_model(tmp_path / "tied")
    with pytest.raises(ValueError, match=r"a language model must have all its weights, got .*lm_head"):
        load_language_model(encoder_folder("roberta", tmp_path / "encoder"))


def test_a_reward_model_without_its_score_head_is_refused(tmp_path):
    source = textenv.registry.registered_sources("reward model")["assistant-rm"]
    model = load_reward_model(source)
    model.save_pretrained(tmp_path / "rm")
    load_reward_model(tmp_path / "rm")
    with pytest.raises(ValueError, match=r"a reward model must have all its weights, got .* \(score.weight\)"):
        load_reward_model(without(tmp_path / "rm", "score.weight"))
