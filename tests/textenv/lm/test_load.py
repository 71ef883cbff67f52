"""Texts that a tokenizer cannot read."""

import pytest

import textenv


@pytest.mark.parametrize("text", ["user: hello stranger", "caf\u00e9"])
def test_a_word_that_a_model_does_not_know_is_named(text):
    model = textenv.registry.language_model("micro-reference")
    for encode in (model.encode_prompt, lambda own: model.encode_response(own, eos=True)):
        with pytest.raises(ValueError, match=f"tokens that 'micro-reference' knows, got '{text}'.*Correct the text"):
            encode(text)
