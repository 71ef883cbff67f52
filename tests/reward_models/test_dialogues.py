"""Preferences between dialogues, as text or as chats: where their prompt ends, and what they are refused for."""

import gzip
import json
import os
import pickle
from pathlib import Path

import pytest

from reward_models.preferences import (
    Ranking,
    load_rankings,
    ranking_of,
    read_rankings,
    split_dialogue,
    split_messages,
)
from reward_models.scorers.texts import in_template

BRIEF = {"role": "system", "content": "be brief"}
HELLO = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: bye\n\nAssistant:"


DIALOGUE = {
    "chosen": "\n\nHuman: hello\n\nAssistant: good day",
    "rejected": "\n\nHuman: hello\n\nAssistant: go away",
}


def test_whole_dialogues_are_pairs_of_last_turns():
    assert load_rankings([DIALOGUE]) == [Ranking("\n\nHuman: hello\n\nAssistant:", (" good day", " go away"))]
    assert load_rankings([{**DIALOGUE, "tie": True}])[0].ranks == (0, 0)


def test_without_a_prompt_texts_that_are_no_dialogues_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="record 1: without a 'prompt', a dialogue must end with an assistant turn"):
        load_rankings([{"chosen": "a", "rejected": "b"}])


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_chats_are_pairs_of_last_messages_whatever_prompt_stands_beside_them():
    record = {"prompt": "hello", "chosen": chat("hello", "good day"), "rejected": chat("hello", "go away")}
    assert load_rankings([record]) == [Ranking(chat("hello"), ("good day", "go away"))]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([BRIEF, *chat("hi", "yes ?", "hello")], [BRIEF, *chat("hi", "yes ?", "hello")]),
        ([BRIEF, *chat("hello")], [BRIEF, *chat("hi", "yes ?", "hello")]),
        ([BRIEF], [BRIEF, *chat("hi", "yes ?", "hello")]),
        (" hello\n", chat("hi", "yes ?", "hello")),  # the last of what people say
        ("\n\nHuman: hi\n\nAssistant: yes ?\n\nHuman: hello\n\nAssistant:", chat("hi", "yes ?", "hello")),
        ("", chat("hi", "yes ?", "hello")),
    ],
)
def test_a_prompt_beside_chats_repeats_them_or_adds_a_system_turn(prompt, expected):
    sides = [chat("hi", "yes ?", "hello", last) for last in ("good day", "go away")]
    record = {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
    assert load_rankings([record]) == [Ranking(expected, ("good day", "go away"))]


@pytest.mark.parametrize(
    "prompt",
    [
        "bye",
        "be brief\n\nhello",
        [BRIEF, *chat("bye")],
        [BRIEF, {"role": "system", "content": "in French"}, *chat("hello")],
        [*chat("hello"), BRIEF],
        chat("hello", "good day"),  # a response itself
        42,
    ],
)
def test_a_prompt_that_says_more_than_the_chats_beside_it_is_refused_with_both(prompt):
    system = [BRIEF] if "French" in str(prompt) else []
    sides = {"chosen": [*system, *chat("hello", "good day")], "rejected": [*system, *chat("hello", "go away")]}
    with pytest.raises(ValueError, match="record 1: a prompt beside whole chats") as refused:
        load_rankings([{"prompt": prompt, **sides}])
    assert repr(prompt) in str(refused.value)
    assert "'content': 'hello'" in str(refused.value)


@pytest.mark.parametrize(
    ("rejected", "message"),
    [
        (chat("hello", "good day"), "two chats must differ"),
        (chat("bye", "go away"), "must begin with the same messages"),
        (chat("hello", "go away", "why ?"), "end with an assistant's message, got 'rejected'"),
    ],
)
def test_chats_that_are_no_pair_are_refused_with_the_reason(rejected, message):
    with pytest.raises(ValueError, match=f"record 1.*{message}"):
        load_rankings([{"chosen": chat("hello", "good day"), "rejected": rejected}])


def test_a_dialogue_is_split_at_the_last_assistant_turn():
    prompt, chosen, rejected = split_dialogue(HELLO + " good bye", HELLO + " no")
    assert (prompt, chosen, rejected) == (HELLO, " good bye", " no")
    ranking = ranking_of({"chosen": HELLO + " good bye", "rejected": HELLO + " no"})
    assert (ranking.prompt, ranking.responses) == (HELLO, (" good bye", " no"))


def test_a_reply_may_be_empty_but_not_both_the_same():
    ranking = ranking_of({"chosen": HELLO + " ", "rejected": HELLO + " no", "tie": True})
    assert (ranking.responses, ranking.ranks) == ((" ", " no"), (0, 0))
    with pytest.raises(ValueError, match="two dialogues must differ"):
        split_dialogue(HELLO + " no", HELLO + " no")


def test_dialogues_that_differ_earlier_or_end_with_a_human_are_errors():
    with pytest.raises(ValueError, match="from character 9 on"):
        split_dialogue("\n\nHuman: a\n\nAssistant: x", "\n\nHuman: b\n\nAssistant: x")
    with pytest.raises(ValueError, match="must end with an assistant turn"):
        split_dialogue(HELLO + " x\n\nHuman: y", HELLO + " x")


def test_a_response_of_several_turns_is_read_in_the_words_of_the_chat_template():
    class Template:
        chat_template = "as below"

        def apply_chat_template(self, messages, add_generation_prompt=False, tokenize=False):
            turns = [f"<{message['role']}>{message['content']}</s>" for message in messages]
            return "".join(turns) + "<assistant>" * add_generation_prompt

    prompt, one, several = split_messages(chat("a", "x"), chat("a", "x", "b", "y"))
    assert in_template(Template(), prompt, one) == "x"
    assert in_template(Template(), prompt, several) == "x</s><user>b</s><assistant>y"

    class Forgetful(Template):
        def apply_chat_template(self, messages, add_generation_prompt=False, tokenize=False):
            return super().apply_chat_template(messages[-1:], add_generation_prompt)

    with pytest.raises(ValueError, match=r"continuation of its prompt, got another beginning for 'x"):
        in_template(Forgetful(), prompt, several)


def test_dialogues_that_part_before_the_last_turn_share_a_prompt_and_differ_in_several_turns():
    start, longer = "\n\nHuman: a\n\nAssistant:", " x\n\nHuman: b\n\nAssistant: y"
    assert split_dialogue(start + " x", start + longer) == (start, " x", longer)
    assert split_dialogue(start + longer, start + " z\n\nHuman: c\n\nAssistant: y")[0] == start
    # Two different questions after the same answer: the prompt ends where the assistant speaks for the last time.
    assert split_dialogue(start + longer, start + " x\n\nHuman: c\n\nAssistant: y")[0] == start
    prompt, one, several = split_messages(chat("a", "x"), chat("a", "x", "b", "y"))
    assert (prompt, one, several) == (chat("a"), "x", "x\n\nHuman: b\n\nAssistant: y")
    assert list(several.messages) == chat("a", "x", "b", "y")[1:]
    assert pickle.loads(pickle.dumps(several)).messages == several.messages


@pytest.fixture
def hh_path() -> Path:
    path = os.environ.get("TEXTENV_HH_DATA", "")
    if not Path(path).is_file():
        pytest.skip("TEXTENV_HH_DATA does not name a file of HH dialogues (JSONL, may be .gz).")
    return Path(path)


def test_real_dialogues_are_split_without_loss(hh_path):
    rankings, malformed = read_rankings(hh_path, skip_malformed=True)
    assert len(rankings) > 0.95 * (len(rankings) + len(malformed))
    with gzip.open(hh_path, "rt") if hh_path.suffix == ".gz" else hh_path.open() as file:
        dialogues = {json.loads(line)["chosen"] for line in file}
    assert all(ranking.prompt + ranking.responses[0] in dialogues for ranking in rankings)
    assert all(ranking.prompt.endswith("\n\nAssistant:") for ranking in rankings)
