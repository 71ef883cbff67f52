"""Texts that a tokenizer cannot read, and packages that are not there."""

import pytest

import textenv
from tests.conftest import tiny_model


@pytest.mark.parametrize("text", ["user: hello stranger", "caf\u00e9"])
def test_a_word_that_a_model_does_not_know_is_named(text):
    model = textenv.registry.language_model("micro-reference")
    for encode in (model.encode_prompt, lambda own: model.encode_response(own, eos=True)):
        with pytest.raises(ValueError, match=f"tokens that 'micro-reference' knows, got '{text}'.*Correct the text"):
            encode(text)


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
