"""The probability of one of several labels as a reward; the oracle is the classifier on one text."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import textenv
from tests.conftest import encoder_folder
from textenv.lm.load import load_tokenizer

PROMPTS = ["the sky is", "red " * 80, "what"]
COMPLETIONS = [" blue", " green", " is not the grass"]


@pytest.fixture(scope="module", params=["bert", "roberta"])
def folder(request, tmp_path_factory):
    folder = encoder_folder(request.param, tmp_path_factory.mktemp(request.param))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=3, id2label={0: "BAD", 1: "GOOD", 2: "OTHER"}
        )
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return folder


def test_the_reward_is_the_softmax_of_a_label_whatever_the_batch(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = load_tokenizer(folder)
    tokenizer.truncation_side = "left"
    room = 64 - (model.config.pad_token_id + 1 if model.config.model_type == "roberta" else 0)
    expected = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        row = tokenizer(prompt + completion, truncation=True, max_length=room, return_tensors="pt")
        with torch.no_grad():
            expected.append(model(row.input_ids).logits.softmax(-1)[0, 1].item())
    assert max(expected) - min(expected) > 0.01
    for size in (1, 64):
        spec = {"classifier": str(folder), "label": "GOOD", "batch_size": size}
        assert textenv.reward_model(spec)(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)


def test_a_label_that_the_model_lacks_is_named(folder):
    with pytest.raises(ValueError, match="label must be one of BAD, GOOD, OTHER, got 'POSITIVE'"):
        textenv.reward_model({"classifier": str(folder), "label": "POSITIVE"})
