"""Preference records: every form reads as one ranking, and malformed ones are named."""

import gzip
import json
import operator
import os
import pickle
from pathlib import Path

import pytest

from reward_models.preferences import (
    Ranking,
    better_pairs,
    load_rankings,
    ranking_of,
    read_rankings,
    split_by_prompt,
    split_dialogue,
    split_messages,
)
from reward_models.scorers.texts import in_template
from textenv.cli.common import skipping_named

CHAT = [{"role": "user", "content": "hello"}]


def test_responses_are_put_in_order_from_best_to_worst():
    (ranking,) = load_rankings([{"prompt": "p", "responses": ["a", "b", "c"], "ranking": [2, 0, 1]}])
    assert ranking == Ranking("p", ("c", "a", "b"))


def test_pairs_are_of_different_texts_the_better_one_first():
    assert list(better_pairs(["a", "b", "c"], [0, 1, 1])) == [(0, 1), (0, 2)]
    # The same text at ranks 0 and 2 is no pair; each of them is one with what stands between.
    assert list(better_pairs(["a", "b", "a"], [0, 1, 2])) == [(0, 1), (1, 2)]
    assert list(better_pairs(["a", "b", "a"], [0, 0, 0], operator.eq)) == [(0, 1), (1, 2)]


def test_a_pair_is_a_ranking_of_two_and_may_have_a_margin():
    records = [
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"prompt": CHAT, "chosen": [{"role": "assistant", "content": "good"}], "rejected": "bad", "margin": 2},
    ]
    assert load_rankings(records) == [Ranking("p", ("good", "bad")), Ranking(CHAT, ("good", "bad"), margin=2.0)]
    assert load_rankings(load_rankings(records)) == load_rankings(records)


def test_a_ranking_may_hold_the_same_response_twice():
    """Samples of one prompt do coincide; only a pair of equals says nothing at all."""
    assert load_rankings([{"prompt": "p", "responses": ["a", "a", "b"], "ranking": [1, 2, 0]}])[0].responses == (
        "a",
        "b",
        "a",
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"responses": ["a", "b"], "ranking": [0, 1]}, r"Nearest: ranking \(without 'prompt'\)"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "'prompt' must be a non-empty string"),
        ({"prompt": "p", "responses": ["a", "b"]}, r"the keys of a layout, .* Nearest: ranking \(without 'ranking'\)"),
        ({"prompt": "p", "responses": ["a"], "ranking": [0]}, "two or more"),
        ({"prompt": "p", "responses": ["a", "b"], "ranking": [0, 0]}, "permutation of 0…1"),
        ({"prompt": "p", "responses": ["a", "b"], "ranking": [1, 2]}, "permutation of 0…1"),
        ({"prompt": "p", "responses": ["a", "b"], "ranking": [0]}, "permutation of 0…1"),
        ({"prompt": "p", "responses": ["a", "b"], "ranking": [False, True]}, "permutation of 0…1"),
        ({"prompt": "p", "responses": ["a", 3], "ranking": [0, 1]}, "a response must be a string"),
        ({"prompt": "p", "responses": "ab", "ranking": [0, 1]}, "'responses' must be a list of two or more"),
        ({"prompt": "p", "responses": ["a", "b"], "ranking": 1}, "permutation of 0…1"),
        ({"prompt": "p", "responses": ["a", "b"], "ranking": [0, -1]}, "permutation of 0…1"),
        ({"prompt": "p", "responses": ["a", "b"], "ranking": [0, [], 1]}, "permutation of 0…1"),
        ({"prompt": "p", "responses": ["a", "b", "c"], "ranking": [[0, 1], [1, 2]]}, "permutation of 0…2"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "two that differ, got only 'a'"),
        ({"prompt": "p", "chosen": "", "rejected": "a"}, "'chosen' must have text, got ''"),
        ({"prompt": "p", "chosen": "a", "rejected": " \n"}, "'rejected' must have text"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "tie": 1}, "'tie' must be true or false, got 1"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "wide"}, "'margin' must be a finite number"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": float("nan")}, "'margin' must be finite"),
    ],
)
def test_a_malformed_record_is_named(record, message):
    with pytest.raises(ValueError, match=f"record 2: .*{message}"):
        load_rankings([{"prompt": "p", "chosen": "a", "rejected": "b"}, record])


def test_an_empty_response_may_stand_in_a_ranking_and_ties_have_equal_ranks():
    record = {"prompt": "p", "responses": ["a", "", "b", "c"], "ranking": [2, [0, 3], 1]}
    assert load_rankings([record]) == [Ranking("p", ("b", "a", "c", ""), (0, 1, 1, 2))]
    (tie,) = load_rankings([{"prompt": "p", "chosen": "a", "rejected": "b", "tie": True}])
    assert tie.ranks == (0, 0)


def test_errors_of_a_file_name_the_file_and_the_line(tmp_path):
    path = tmp_path / "prefs.jsonl"
    good = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n"
    path.write_text(good + "nonsense\n")
    with pytest.raises(ValueError, match=r"prefs\.jsonl, line 2: not valid JSON"):
        load_rankings(path)
    path.write_text(good + "\n" + json.dumps({"prompt": "p", "chosen": "a"}))  # a blank line is a line
    with pytest.raises(ValueError, match=r"prefs\.jsonl, line 3: a preference must have"):
        load_rankings(path)
    path.write_text(good)
    assert load_rankings(str(path)) == [Ranking("p", ("a", "b"))]
    with pytest.raises(ValueError, match=r"must hold a record, got none. Give a list"):
        load_rankings([])


def test_a_split_keeps_all_rankings_of_a_prompt_on_one_side():
    prompts = [f"p{i}" for i in range(20)] + [[{"role": "user", "content": str(i)}] for i in range(20)]
    rankings = [Ranking(prompt, (f"a{k}", "b")) for k in range(3) for prompt in prompts]
    rest, held_out = split_by_prompt(rankings, 0.25, seed=1)
    keys = [{str(ranking.prompt) for ranking in side} for side in (rest, held_out)]
    assert not keys[0] & keys[1]
    assert (len(keys[0]), len(keys[1])) == (30, 10)
    assert (len(rest), len(held_out)) == (90, 30)
    assert split_by_prompt(rankings, 0.25, seed=1) == (rest, held_out)
    assert split_by_prompt(rankings, 0.25, seed=2) != (rest, held_out)


@pytest.mark.parametrize("fraction", [0.0, 1.0, 0.01])
def test_a_split_that_leaves_a_side_empty_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction"):
        split_by_prompt([Ranking("p", ("a", "b")), Ranking("q", ("a", "b"))], fraction)


HELLO = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: bye\n\nAssistant:"
DIALOGUE = {
    "chosen": "\n\nHuman: hello\n\nAssistant: good day",
    "rejected": "\n\nHuman: hello\n\nAssistant: go away",
}


def test_whole_dialogues_are_pairs_of_last_turns():
    assert load_rankings([DIALOGUE]) == [Ranking("\n\nHuman: hello\n\nAssistant:", (" good day", " go away"))]
    assert load_rankings([{**DIALOGUE, "tie": True}])[0].ranks == (0, 0)


def test_a_compressed_file_with_odd_line_separators_inside_its_strings_is_read(tmp_path):
    # U+2028 and U+0085 end lines for str.splitlines, not in JSONL.
    record = {"prompt": "a\u2028b", "chosen": "c\u0085d", "rejected": "e"}
    path = tmp_path / "prefs.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(record, ensure_ascii=False).encode() + b"\n"))
    assert load_rankings(path) == [Ranking("a\u2028b", ("c\u0085d", "e"))]
    path.write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"prefs\.jsonl\.gz"):
        load_rankings(path)


def test_malformed_records_are_left_out_only_when_asked_and_counted(caplog):
    records = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        DIALOGUE,
    ]
    with pytest.raises(ValueError, match="record 2: 'responses' must hold two that differ"):
        load_rankings(records)
    assert len(load_rankings(records, skip_malformed=True)) == 2
    assert "1 of 3 preferences left out. The first: record 2" in caplog.text
    with pytest.raises(ValueError, match="a good record, got 1 malformed ones"):
        load_rankings(records[1:2], skip_malformed=True)


def test_without_a_prompt_texts_that_are_no_dialogues_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="record 1: without a 'prompt', a dialogue must end with an assistant turn"):
        load_rankings([{"chosen": "a", "rejected": "b"}])


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_chats_are_pairs_of_last_messages_whatever_prompt_stands_beside_them():
    record = {"prompt": "hello", "chosen": chat("hello", "good day"), "rejected": chat("hello", "go away")}
    assert load_rankings([record]) == [Ranking(chat("hello"), ("good day", "go away"))]


BRIEF = {"role": "system", "content": "be brief"}


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


def test_a_data_set_on_disk_is_read_by_its_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_list([{**DIALOGUE, "note": name}] * count) for name, count in
             (("train", 3), ("test", 2))}  # fmt: skip
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "pairs"))
    assert len(load_rankings(tmp_path / "pairs")) == 3
    assert load_rankings(str(tmp_path / "pairs"), split="test") == load_rankings([{**DIALOGUE, "note": "test"}] * 2)
    with pytest.raises(ValueError, match="no-such-data"):
        load_rankings(str(tmp_path / "no-such-data"))


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


def test_a_line_that_is_no_json_is_left_out_and_counted_as_any_malformed_record_is(tmp_path, caplog):
    path = tmp_path / "prefs.jsonl"
    path.write_text('{"prompt": "x", \n' + json.dumps(GOOD) + "\n" + "[" * 100_000 + "\n")
    assert load_rankings(path, skip_malformed=True) == [Ranking("p", ("a", "b"))]
    assert "2 of 3 preferences left out. The first:" in caplog.text
    # The line has 16 characters: what is missing stands behind them.
    with pytest.raises(ValueError, match=r"prefs\.jsonl, line 1: not valid JSON \(.*, column 17\)"):
        load_rankings(path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("x", "a preference must be a JSON object or a Ranking, got 'x'"),
        (None, "a preference must be a JSON object or a Ranking, got None"),
        ({**GOOD, "prompt": ["x"]}, "a chat message must have the strings 'role' and 'content', got 'x'"),
        ({**GOOD, "prompt": [{"role": "user", "content": None}]}, "a chat message must have.*'content': None"),
        ({**GOOD, "prompt": [{"role": "user"}]}, "a chat message must have the strings"),
        ({**GOOD, "chosen": "\ud800"}, r"without lone surrogates, got '\\ud800'"),
        ({**GOOD, "prompt": "\ud800"}, r"without lone surrogates, got '\\ud800'"),
        ({"prompt": "p", "responses": ["a", "a"], "ranking": [0, 1]}, "two that differ, got only 'a'. Drop the record"),
        ({"prompt": "p", "responses": ["a", "a"], "ranking": [[0, 1]]}, "two that differ, got only 'a'"),
        (Ranking("p", ("a", "a", "a")), "two that differ, got only 'a'"),
        (Ranking("p", ("a",)), r"two or more, got \('a',\)"),
        (Ranking("p", ("a", "b"), margin=float("nan")), "'margin' must be finite, got nan"),
        (Ranking("p", ("a", "b", "c"), (0, 1)), r"'ranks' must hold one value per response, got \(0, 1\) for 3"),
        (Ranking("p", ("a", "b"), (1, 0)), "from best to worst"),
        (Ranking("", ("a", "b")), "'prompt' must be a non-empty string"),
    ],
)
def test_what_can_teach_nothing_or_break_later_is_refused_or_left_out(record, message):
    with pytest.raises(ValueError, match=f"record 2: .*{message}"):
        load_rankings([GOOD, record])
    assert load_rankings([GOOD, record], skip_malformed=True) == [Ranking("p", ("a", "b"))]


def test_a_value_that_is_null_is_called_so_and_not_a_missing_column():
    with pytest.raises(ValueError, match=r"record 2: a preference must have values, got null for 'rejected'. Give"):
        load_rankings([GOOD, {**GOOD, "rejected": None}])
    with pytest.raises(ValueError, match=r"format 'pair' must have values, got null for 'prompt'. Give them, or drop"):
        load_rankings([{**GOOD, "prompt": None}], format="pair")
    with pytest.raises(ValueError, match=r"without 'rejected'.* Rename the columns"):
        load_rankings([{"prompt": "p", "chosen": "a", "tie": None}])
    with pytest.raises(ValueError, match=r"Nearest: .* Rename the columns"):  # one is null, one is missing
        load_rankings([{"history": "p", "human_ref_A": "a", "labels": None}])


def test_a_command_names_its_flag_that_leaves_records_out_and_another_does_not():
    with pytest.raises(ValueError, match=r"Correct it, or leave it out\.$"):
        load_rankings([GOOD, "x"])
    flag = r"leave it out\. --skip-malformed leaves all such records out\.$"
    with pytest.raises(ValueError, match=flag), skipping_named():
        load_rankings([GOOD, "x"])


def test_one_record_is_no_list_of_them():
    for one in (GOOD, Ranking("p", ("a", "b"))):
        with pytest.raises(ValueError, match=r"must be a list of records, got one record: .* Put it in a list"):
            load_rankings(one)


def test_fields_that_are_none_are_absent_as_in_a_table():
    empty = dict.fromkeys(("responses", "ranking", "margin", "tie"))
    assert load_rankings([{**GOOD, **empty}]) == load_rankings([GOOD])
    ranked = {"prompt": "p", "responses": ["a", "b"], "ranking": [1, 0], "chosen": None, "rejected": None}
    assert load_rankings([ranked]) == [Ranking("p", ("b", "a"))]
    assert load_rankings([{**DIALOGUE, "prompt": None, "tie": None}]) == load_rankings([DIALOGUE])


def test_a_table_says_as_text_whether_responses_are_tied(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected,tie\np,a,b,False\np,a,b,True\np,a,b,\n")
    assert [ranking.levels for ranking in load_rankings(path)] == [(0, 1), (0, 0), (0, 1)]
    path.write_text('prompt,responses,ranking,tie\np,"[""a"", ""b""]","[1, 0]",False\n')
    assert load_rankings(path) == [Ranking("p", ("b", "a"))]


def test_a_ranking_is_put_in_order_with_everything_that_belongs_to_its_responses():
    ranking = ranking_of(
        {
            "prompt": "p",
            "responses": ["a", "b", "c"],
            "ranking": [2, 0, 1],
            "gold": [1, 2, 3],
            "finish_reasons": ["eos", "length", "stop"],
            "category": "x",
            "answer": 7,
        }
    )
    assert ranking.responses == ("c", "a", "b")
    assert ranking.levels == (0, 1, 2)
    assert ranking.gold == (3.0, 1.0, 2.0)
    assert ranking.finish_reasons == ("stop", "eos", "length")
    assert (ranking.category, ranking.columns) == ("x", {"answer": 7})


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


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("[1]", "must be a JSON object"),
        ("{", "not valid JSON"),
        ('{"prompt": "p", "chosen": "a"}', r"Nearest: dialogues \(without 'rejected'\)|Nearest: pair"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "tie": 1}', "'tie' must be true or false"),
        ('{"prompt": "p", "responses": ["a", "b"], "ranking": [0, 0]}', "permutation"),
        ('{"prompt": "p", "responses": ["a", "b"], "ranking": [0, 1], "gold": [1]}', "one value per response"),
        ('{"chosen": "no roles", "rejected": "at all"}', "must end with an assistant turn"),
        ('{"prompt": "p", "chosen": "a", ', "not valid JSON .*column 32"),  # of 31 characters
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "p", "chosen": "\\ud800", "rejected": "b"}', "without lone surrogates"),
        ('{"prompt": "p", "responses": ["a", "a"], "ranking": [0, 1]}', "two that differ"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "gold": [1.0, NaN]}', r"'gold' must .* got \(1.0, nan\)"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "gold": [1, null]}', r"'gold' must .* got \(1, None\)"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "gold": [1, "x"]}', r"'gold' must .* got \(1, 'x'\)"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "prompts": "x"}', "got 'prompts'"),
        (
            '{"prompt": "p", "chosen": "a", "rejected": "b", "completions": 1}',
            "got 'completions'",
        ),
    ],
)
def test_a_malformed_line_is_named_or_skipped_and_counted(tmp_path, record, message):
    good = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"})
    path = tmp_path / "d.jsonl"
    path.write_text(f"{good}\n\n{record}\n{good}\n")
    with pytest.raises(ValueError, match=rf"(?s)d\.jsonl, line 3: .*{message}"):
        read_rankings(path)
    rankings, malformed = read_rankings(path, skip_malformed=True)
    assert (len(rankings), len(malformed)) == (2, 1)
    rankings, malformed = read_rankings(path, limit=2, skip_malformed=True)
    assert (len(rankings), len(malformed)) == (2, 1), "a limit of good records"


def test_compressed_files_limits_and_empty_files(tmp_path):
    line = json.dumps({"prompt": "ä", "chosen": "a", "rejected": "b"}) + "\n"
    with gzip.open(tmp_path / "d.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(line * 5)
    rankings, _ = read_rankings(tmp_path / "d.jsonl.gz", limit=3)
    assert [ranking.prompt for ranking in rankings] == ["ä"] * 3
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="at least one record"):
        read_rankings(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="must be a JSONL file"):
        read_rankings(tmp_path / "absent.jsonl")


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


def test_a_malformed_line_in_a_folder_of_files_is_skipped_or_named_with_its_file(tmp_path):
    good = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n"
    (tmp_path / "a.jsonl").write_text(good)
    (tmp_path / "b.jsonl").write_text(good + '{"prompt": "x", \n')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: not valid JSON"):
        read_rankings(tmp_path)
    rankings, malformed = read_rankings(tmp_path, skip_malformed=True)
    assert (len(rankings), len(malformed)) == (2, 1)


def test_optional_fields_that_are_none_are_absent_and_other_fields_stay_as_they_are():
    record = {
        "prompt": "p",
        "chosen": "a",
        "rejected": "b",
        "tie": None,
        "margin": None,
        "ranking": None,
        "answer": None,
    }
    assert ranking_of(record) == ranking_of({"prompt": "p", "chosen": "a", "rejected": "b", "answer": None})
    assert ranking_of(record).columns == {"answer": None}
