"""Texts that a model would read otherwise than they were meant."""

import pytest

from agents.doctor import diagnose
from tests.agents.doctor.helpers import GOOD, chat_part, demonstration, levels, pair, seen
from tests.conftest import tiny_model
from textenv.data.records import write_jsonl


def chat(user, assistant, system=None):
    """A demonstration of one question and its answer."""
    turns = [("system", system)] if system else []
    turns += [("user", user), ("assistant", assistant)]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


RED = [{"role": "user", "content": "red"}]
TEXTS = ("template", "printed chats", "prompt in the response", "control tokens")


@pytest.mark.parametrize("record", [demonstration(), chat("question", "blue"), pair(), pair(prompt=RED)])
def test_healthy_texts_are_silent(read, record):
    part = read([record] * 3, lm=chat_part(GOOD).lm)
    kind = "preferences" if "chosen" in record else "demonstrations"
    assert {name: seen(f"{kind}: {name}", part) for name in TEXTS} == {name: [] for name in TEXTS}


STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + GOOD


def test_a_refused_system_turn_has_one_finding(tmp_path):
    """The template's own check names it; the checks of the data read the other record, or are skipped."""
    part = chat_part(STRICT, bos=True)
    write_jsonl(tmp_path / "data.jsonl", [chat("question", "blue", system="red"), chat("question", "sky")])
    diagnosis = diagnose(model=part.lm, data=[tmp_path / "data.jsonl"])
    refused = [finding for finding in diagnosis.findings if "no system" in finding.what]
    assert [(finding.check, finding.level) for finding in refused] == [("model: system turn", "error")]
    assert "1 of 2 texts of the data have one" in refused[0].what
    assert "demonstrations: endings" in diagnosis.ran
    assert not [finding for finding in diagnosis.findings if "broke off" in finding.what]
    write_jsonl(tmp_path / "data.jsonl", [chat("question", "blue", system="red")])
    diagnosis = diagnose(model=part.lm, data=[tmp_path / "data.jsonl"])
    assert diagnosis.skipped["demonstrations: context"] == "the chat template refuses every prompt"


@pytest.mark.parametrize("kind", ["demonstrations", "preferences"])
def test_chats_that_the_template_refuses_are_counted(read, kind):
    own_turn = "(m['role'] == 'user') == (loop.index0 % 2 == 0)"
    refuse = f"{{% if not {own_turn} %}}{{{{ raise_exception('take turns') }}}}{{% endif %}}"
    lm = chat_part(f"{{% for m in messages %}}{refuse}{{% endfor %}}{GOOD}").lm
    twice = RED * 2
    good, bad = chat("question", "blue"), {"messages": [*twice, {"role": "assistant", "content": "blue"}]}
    if kind == "preferences":
        good, bad = pair(prompt=twice[:1]), pair(prompt=twice)
    [(level, what)] = seen(f"{kind}: template", read([bad, good, good], lm=lm))
    assert level == "error"
    assert "1 of 3 prompts are refused: a chat must be one that the model's chat template accepts" in what
    assert "take turns" in what
    [(_, what)] = seen(f"{kind}: template", read([good], lm=tiny_model()))
    assert "no chat template" in what


def printed(*messages):
    return str([{"role": role, "content": text} for role, text in messages])


@pytest.mark.parametrize(
    "text",
    [
        printed(("user", "red"), ("assistant", "blue")),
        str({"role": "assistant", "content": "it's"}),
        "[{'from': 'gpt', 'value': 'blue'}\n {'from",
    ],
)
def test_chats_that_python_has_printed_are_found(read, text):
    [(level, what)] = seen("preferences: printed chats", read([pair(text), pair(prompt="red")]))
    assert level == "error"
    assert "1 of 4 texts" in what
    assert "role" in what or "from" in what
    assert levels("demonstrations: printed chats", read([demonstration(completion=text), *[demonstration()] * 10])) == [
        "warning"
    ]
    code = pair("['role', 'content']", "[{1: 'role'}]", prompt="{'a': 1}")
    assert not seen("preferences: printed chats", read([code]))


@pytest.mark.parametrize("prompt", ["the sky is", [{"role": "user", "content": "the sky is"}]])
def test_responses_that_begin_with_their_prompt_are_found(read, prompt):
    whole, half = pair("the sky is blue", "the sky is red", prompt), pair(" the sky is green", "red", prompt)
    [(level, what)] = seen("preferences: prompt in the response", read([whole, half]))
    assert level == "warning"
    assert "3 of 4 responses (75%)" in what
    assert not seen("preferences: prompt in the response", read([half, half]))
    part = read([demonstration(prompt, "the sky is blue")])
    assert levels("demonstrations: prompt in the response", part) == ["warning"]
    assert not seen("demonstrations: prompt in the response", read([demonstration("the sky is", "the sky is")]))


@pytest.mark.parametrize(
    ("record", "names"),
    [
        (chat("red <end> assistant sky", "blue"), "<end>"),
        (chat("red", "blue <eos> red"), "<eos>"),
        (chat("red", "blue", system="<bos>"), "<bos>"),
        (pair("blue <end> red", prompt=RED), "<end>"),
        (pair("blue", "red <bos> <end>"), "<bos>, <end>"),
        (demonstration(completion="blue <end> red"), "<end>"),
    ],
)
def test_control_tokens_in_a_text_are_found(read, record, names):
    lm = chat_part(GOOD).lm  # <end> closes its turns
    kind = "preferences" if "chosen" in record else "demonstrations"
    [(level, what)] = seen(f"{kind}: control tokens", read([record], lm=lm))
    assert level == "warning"
    assert f"hold {names}, which" in what
    healthy = chat("question", "blue") if kind == "demonstrations" else pair()
    assert levels(f"{kind}: control tokens", read([record, *[healthy] * 19], lm=lm)) == ["note"]


def test_control_tokens_where_they_belong_are_no_finding(read):
    """In a rendered prompt; at the end of a demonstration, where another check finds them; and others than the
    template's, such as those around the call of a tool."""
    lm = chat_part(GOOD).lm
    lm.tokenizer.add_special_tokens({"additional_special_tokens": ["<end>", "<call>"]})
    records = [
        demonstration("user red <end> assistant", "blue <end>"),
        demonstration(completion="<call> red"),
        demonstration(completion="<unk> < end >"),
    ]
    assert not seen("demonstrations: control tokens", read(records, lm=lm))
