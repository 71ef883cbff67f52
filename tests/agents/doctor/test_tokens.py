"""Faults of tokenizers and chat templates."""

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from agents.doctor.parts import ModelPart, Text
from tests.agents.doctor.helpers import ASK, GOOD, TURNS, chat_part, levels, model_part, seen
from tests.conftest import word_tokenizer
from textenv.conformance.subject import Skipped

TEMPLATE_CHECKS = ["ending tokens", "system turn", "answer after prompt"]


@pytest.mark.parametrize("name", TEMPLATE_CHECKS)
def test_a_good_template_is_silent(name):
    assert not seen(f"model: {name}", chat_part(GOOD))


def test_a_padding_token_that_ends_responses_is_noted():
    assert levels("model: pad token", model_part()) == ["note"]
    tokenizer = word_tokenizer()
    tokenizer.pad_token = "<unk>"
    assert levels("model: pad token", model_part(tokenizer=tokenizer)) == []
    tokenizer.pad_token = None
    assert levels("model: pad token", model_part(tokenizer=tokenizer)) == ["note"]


def test_more_tokens_than_rows_are_found_and_more_rows_than_tokens_noted():
    tokenizer = word_tokenizer()
    assert levels("model: vocabulary", model_part(tokenizer=tokenizer)) == []
    tokenizer.add_tokens(["purple"])
    [(level, what)] = seen("model: vocabulary", model_part(tokenizer=tokenizer))
    assert level == "error"
    assert "ids up to 12" in what
    assert "12 rows" in what
    part = model_part(lambda model: model.resize_token_embeddings(16, mean_resizing=False))
    assert levels("model: vocabulary", part) == ["note"]


def test_an_ending_that_generate_does_not_know_is_found():
    [(level, what)] = seen("model: ending tokens", chat_part(GOOD, ending=False))
    assert level == "warning"
    assert "'<end>'" in what
    part = model_part(lambda model: setattr(model.generation_config, "eos_token_id", None))
    assert levels("model: ending tokens", part) == ["warning"]


def test_an_ending_beyond_the_head_is_an_error():
    assert levels("model: ending tokens", model_part(eos_id=12)) == ["error"]


def test_a_missing_or_doubled_bos_is_found():
    assert levels("model: BOS", chat_part(GOOD, bos=True)) == ["warning"]
    assert levels("model: BOS", chat_part("<bos> " + GOOD, bos=True)) == ["note"]
    assert levels("model: BOS", chat_part("<bos> <bos> " + GOOD, bos=True)) == ["error"]
    rendered = chat_part("<bos> " + GOOD, bos=True, texts=[Text("<bos> the sky", "blue")])
    assert levels("model: BOS", rendered) == ["error", "note"]
    with pytest.raises(Skipped):
        seen("model: BOS", chat_part(GOOD))


@pytest.mark.parametrize(
    ("template", "level", "word"),
    [
        ("{% for m in messages if m['role'] != 'system' %}" + TURNS.partition("%}")[2] + ASK, "warning", "drops"),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + GOOD,
            "warning",
            "refuses",
        ),
        ("user {% for m in messages %}{{ m['content'] }} {% endfor %}<end> " + ASK, "note", "merges"),
    ],
)
def test_a_system_turn_that_is_lost_is_found(template, level, word):
    [(found, what)] = seen("model: system turn", chat_part(template))
    assert found == level
    assert word in what


def test_a_template_that_writes_an_answered_prompt_in_another_way_is_found():
    thinking = GOOD.replace("assistant {%", "assistant SYSTEM {%")
    [(level, what)] = seen("model: answer after prompt", chat_part(thinking))
    assert level == "warning"
    assert "another beginning" in what


def test_a_template_that_drops_a_part_of_some_answers_is_found():
    """As thinking is dropped from earlier turns."""
    dropping = GOOD.replace("m['content']", "m['content'].split('SYSTEM')[-1]")
    chat = [{"role": "user", "content": "question"}]
    texts = [Text(chat, "red SYSTEM blue"), Text(chat, "blue"), Text("a plain prompt", "red SYSTEM blue")]
    assert not seen("model: answer after prompt", chat_part(GOOD, texts=texts))
    [(level, what)] = seen("model: answer after prompt", chat_part(dropping, texts=texts))
    assert level == "warning"
    assert what.startswith("1 of 2 chats of the data get other tokens with their answer than before it: 'red SYSTEM")


def test_a_template_that_refuses_an_answer_does_not_end_the_check():
    """Other answers are still compared."""
    refusing = "{% for m in messages if not m['content'] %}{{ raise_exception('empty') }}{% endfor %}" + GOOD
    dropping = refusing.replace("m['content'] }}", "m['content'].split('SYSTEM')[-1] }}")
    chat = [{"role": "user", "content": "question"}]
    texts = [Text(chat, ""), Text(chat, "red SYSTEM blue")]
    assert not seen("model: answer after prompt", chat_part(refusing, texts=texts))
    [(_, what)] = seen("model: answer after prompt", chat_part(dropping, texts=texts))
    assert what.startswith("1 of 2 chats of the data")


def test_a_template_without_an_ending_is_found():
    endless = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}" + ASK
    assert levels("model: answer after prompt", chat_part(endless)) == ["warning"]


def test_a_tokenizer_that_loses_capitals_is_found():
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    lm = model_part(tokenizer=tokenizer).lm
    [(level, what)] = seen("model: round trip", ModelPart(lm, texts=[Text("red", "The sky"), Text("red", "the sky")]))
    assert level == "warning"
    assert "1 of 2" in what
    assert not seen("model: round trip", ModelPart(lm, texts=[Text("red", "the sky")]))


def test_words_that_the_tokenizer_does_not_know_are_found():
    lm = model_part().lm
    part = ModelPart(lm, texts=[Text("red", "the purple sky")])
    assert levels("model: round trip", part) == ["error"]
    with pytest.raises(Skipped):
        seen("model: round trip", ModelPart(lm))


def test_words_with_a_space_between_are_no_boundary():
    assert not seen("model: joint tokens", ModelPart(model_part().lm, texts=[Text("the sky", "is blue")]))


def test_a_boundary_that_joins_into_one_token_is_found():
    core = Tokenizer(models.BPE({"<eos>": 0, "a": 1, "b": 2, "ab": 3, " ": 4}, [("a", "b")]))
    lm = model_part(tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")).lm
    assert levels("model: joint tokens", ModelPart(lm, texts=[Text("a", "b")])) == ["warning"]
    assert levels("model: joint tokens", ModelPart(lm, texts=[Text("b", "a"), Text("a", " b")])) == []
