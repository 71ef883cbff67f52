"""Comparisons of replies as chats, and their split by prompt."""

import json

import pytest

from agents.rlhf.data import Parts, as_chat, prepare, read_rankings, write_parts
from reward_models.preferences import Ranking, as_messages, load_rankings
from tests.conftest import tiny_model

DIALOGUE = "\n\nHuman: what is the sky ?\n\nAssistant: blue\n\nHuman: is the grass red ?\n\nAssistant:"
MARKS = "{% for m in messages %}{{ 'the ' if m.role == 'user' else 'is ' }}{{ m.content + ' ' }}{% endfor %}"


def pairs(count: int) -> list[Ranking]:
    """Pairs whose prompts, of 3 to 5 tokens, are all different."""
    words = ("red", "green", "blue", "sky", "grass", "is", "the")
    return [
        Ranking(f"what {words[i % 7]} {words[i // 7]}{' ?' * (i % 3)}", ("the sky", f"{words[i % 5]}"))
        for i in range(count)
    ]


def test_a_dialogue_as_text_becomes_the_messages_that_it_is_made_of():
    assert as_messages(DIALOGUE) == [
        {"role": "user", "content": "what is the sky ?"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "is the grass red ?"},
    ]
    assert as_messages("\n\nHuman: a\nHuman: b\n\nAssistant: c") == [
        {"role": "user", "content": "a\nHuman: b"},  # a mark stands after an empty line
        {"role": "assistant", "content": "c"},
    ]


@pytest.mark.parametrize("text", ["", "red", "\n\nAssistant: red", "\n\nHuman:\n\nAssistant: red", "x\n\nHuman: red"])
def test_what_is_no_dialogue_is_refused(text):
    with pytest.raises(ValueError, match="a dialogue must have turns"):
        as_messages(text)


def test_a_comparison_becomes_a_chat_whose_answers_have_no_space_around_them():
    chat = as_chat(Ranking(DIALOGUE, (" no\n", "  red ")))
    assert chat is not None
    assert chat.prompt == as_messages(DIALOGUE)
    assert chat.responses == ("no", "red")
    plain = as_chat(Ranking("is the sky red ?", ("no", "red")))
    assert plain is not None
    assert plain.prompt == [{"role": "user", "content": "is the sky red ?"}]
    messages = [{"role": "user", "content": "red ?"}]
    assert as_chat(Ranking(messages, ("a", "b"))) == Ranking(messages, ("a", "b"))


def test_a_reply_of_several_turns_is_left_out():
    several = " no\n\nHuman: why ?\n\nAssistant: red"
    assert as_chat(Ranking(DIALOGUE, (several, " red"))) is None
    [loaded] = load_rankings([{"chosen": DIALOGUE + several, "rejected": DIALOGUE + " red"}])
    assert as_chat(loaded) is None
    assert as_chat(Ranking("\n\nHuman:\n\nAssistant: red\n\nHuman: sky\n\nAssistant:", ("a", "b"))) is None


def test_parts_share_no_prompt_and_long_prompts_are_left_out(tmp_path):
    rankings = pairs(48)
    parts = prepare(rankings, tiny_model(), max_prompt_tokens=4, max_pairs=None, held_out=0.25, seed=1)
    prompts = [{r.prompt for r in part} for part in parts]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 32  # a third has 5 tokens
    assert [len(part) for part in parts] == [22, 2, 8]
    again = prepare(rankings, tiny_model(), max_prompt_tokens=4, max_pairs=None, held_out=0.25, seed=1)
    other = prepare(rankings, tiny_model(), max_prompt_tokens=4, max_pairs=None, held_out=0.25, seed=2)
    assert again == parts != other
    assert (
        sum(map(len, prepare(rankings, tiny_model(), max_prompt_tokens=4, max_pairs=24, held_out=0.25, seed=1))) == 24
    )


def test_the_seed_draws_the_comparisons_which_stay_in_their_order():
    rankings = pairs(48)
    drawn = []
    for seed in (1, 2):
        parts = prepare(rankings, tiny_model(), max_prompt_tokens=9, max_pairs=24, held_out=0.25, seed=seed)
        places = [[rankings.index(ranking) for ranking in part] for part in parts]
        assert all(part == sorted(part) for part in places)
        drawn.append(set().union(*places))
    assert drawn[0] != drawn[1]


def test_demonstrations_are_the_better_replies_that_say_something(tmp_path):
    train = [Ranking("red", ("sky", "")), Ranking("blue", ("", "grass")), Ranking("is", ("the", "red", "sky"))]
    write_parts(Parts(train, [], []), tmp_path, demonstrations=3)
    records = map(json.loads, (tmp_path / "demonstrations.jsonl").read_text().splitlines())
    assert list(records) == [{"prompt": "red", "completion": "sky"}, {"prompt": "is", "completion": "the"}]


def test_a_model_with_a_chat_template_gets_chats_and_their_length_counts_the_template(tmp_path):
    lm = tiny_model()
    lm.tokenizer.chat_template = MARKS
    parts = prepare(pairs(48), lm, max_prompt_tokens=5, max_pairs=None, held_out=0.25, seed=1)
    assert sum(map(len, parts)) == 32  # "the what x y": one token more
    assert parts.train[0].prompt[0]["role"] == "user"
    write_parts(parts, tmp_path, demonstrations=3)
    assert read_rankings(tmp_path, "held-out") == parts.held_out
    demonstrations = (tmp_path / "demonstrations.jsonl").read_text().splitlines()
    assert len(demonstrations) == 3


def test_ties_survive_the_files(tmp_path):
    parts = prepare(
        [r._replace(ranks=(0, 0)) for r in pairs(24)], tiny_model(), max_prompt_tokens=9, max_pairs=None, held_out=0.3,
        seed=1,
    )  # fmt: skip
    write_parts(parts, tmp_path, demonstrations=3)
    assert [r.levels for r in read_rankings(tmp_path, "train")] == [(0, 0)] * len(parts.train)


def test_what_the_template_refuses_and_answers_that_were_begun_are_left_out(caplog):
    lm = tiny_model()
    lm.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content.startswith('what red') %}{{ raise_exception('no red') }}{% endif %}"
        "{{ m.content + ' ' }}{% endfor %}"
    )
    parts = prepare(pairs(48), lm, max_prompt_tokens=9, max_pairs=None, held_out=0.25, seed=1)
    assert sum(map(len, parts)) == 41  # red is the first of seven words
    assert "7 comparisons left out, whose prompt the model refuses. The first: record 1: a chat" in caplog.text
    assert "the template says: no red" in caplog.text
    assert as_chat(Ranking(DIALOGUE + " well,", ("a", "b"))) is None


def test_no_more_prompts_are_read_than_are_needed(monkeypatch):
    lm, read = tiny_model(), []
    monkeypatch.setattr(type(lm), "encode_prompt", lambda self, prompt: read.append(prompt) or [1])
    prepare(pairs(48), lm, max_prompt_tokens=9, max_pairs=24, held_out=0.25, seed=1)
    assert len(read) == 24


def test_too_few_comparisons_that_fit_are_refused():
    with pytest.raises(ValueError, match=r"at most max_prompt_tokens \(2\), got 0 of 48. Raise max_prompt_tokens"):
        prepare(pairs(48), tiny_model(), max_prompt_tokens=2, max_pairs=None, held_out=0.25, seed=1)
