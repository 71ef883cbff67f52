"""Preference records: every form reads as one ranking, and malformed ones are named."""

import gzip
import json

import pytest

from reward_models.preferences import Ranking, load_rankings, split_by_prompt

CHAT = [{"role": "user", "content": "hello"}]


def test_responses_are_put_in_order_from_best_to_worst():
    (ranking,) = load_rankings([{"prompt": "p", "responses": ["a", "b", "c"], "ranking": [2, 0, 1]}])
    assert ranking == Ranking("p", ("c", "a", "b"), 0.0)


def test_a_pair_is_a_ranking_of_two_and_may_have_a_margin():
    records = [
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"prompt": CHAT, "chosen": [{"role": "assistant", "content": "good"}], "rejected": "bad", "margin": 2},
    ]
    assert load_rankings(records) == [Ranking("p", ("good", "bad"), 0.0), Ranking(CHAT, ("good", "bad"), 2.0)]
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
        ({"responses": ["a", "b"], "ranking": [0, 1]}, "'prompt' must be a non-empty string"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "'prompt' must be a non-empty string"),
        ({"prompt": "p", "responses": ["a", "b"]}, "must have 'responses' and 'ranking', or 'chosen' and 'rejected'"),
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
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "'chosen' and 'rejected' must differ"),
        ({"prompt": "p", "chosen": "", "rejected": "a"}, "'chosen' must have text, with ''"),
        ({"prompt": "p", "chosen": "a", "rejected": " \n"}, "'rejected' must have text"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "tie": 1}, "'tie' must be true or false, with 1"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "wide"}, "'margin' must be a finite number"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": float("nan")}, "'margin' must be a finite number"),
    ],
)
def test_a_malformed_record_is_named(record, message):
    with pytest.raises(ValueError, match=f"record 2: .*{message}"):
        load_rankings([{"prompt": "p", "chosen": "a", "rejected": "b"}, record])


def test_an_empty_response_may_stand_in_a_ranking_and_ties_have_equal_ranks():
    record = {"prompt": "p", "responses": ["a", "", "b", "c"], "ranking": [2, [0, 3], 1]}
    assert load_rankings([record]) == [Ranking("p", ("b", "a", "c", ""), 0.0, (0, 1, 1, 2))]
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
    with pytest.raises(ValueError, match="at least one good record"):
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
    with pytest.raises(ValueError, match="record 2: 'chosen' and 'rejected' must differ"):
        load_rankings(records)
    assert len(load_rankings(records, skip_malformed=True)) == 2
    assert "1 of 3 preferences left out. The first: record 2" in caplog.text
    with pytest.raises(ValueError, match=r"at least one good record.*malformed \(=1\)"):
        load_rankings(records[1:2], skip_malformed=True)


def test_without_a_prompt_texts_that_are_no_dialogues_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="record 1: without a 'prompt', 'chosen' and 'rejected' are whole dialogues"):
        load_rankings([{"chosen": "a", "rejected": "b"}])


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_chats_are_pairs_of_last_messages_whatever_prompt_stands_beside_them():
    record = {"prompt": "hello", "chosen": chat("hello", "good day"), "rejected": chat("hello", "go away")}
    assert load_rankings([record]) == [Ranking(chat("hello"), ("good day", "go away"))]


@pytest.mark.parametrize(
    ("rejected", "message"),
    [
        (chat("hello", "good day"), "must differ in the last message"),
        (chat("bye", "go away"), "same up to the last message"),
        (chat("hello", "go away", "why ?"), "end with an assistant's message, with rejected"),
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
    assert load_rankings(str(tmp_path / "pairs"), split="test") == load_rankings([DIALOGUE] * 2)
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
        ("x", "a preference must be a JSON object or a Ranking, with 'x'"),
        (None, "a preference must be a JSON object or a Ranking, with None"),
        ({**GOOD, "prompt": ["x"]}, "a chat message must have the strings 'role' and 'content', with 'x'"),
        ({**GOOD, "prompt": [{"role": "user", "content": None}]}, "a chat message must have.*'content': None"),
        ({**GOOD, "prompt": [{"role": "user"}]}, "a chat message must have the strings"),
        ({**GOOD, "chosen": "\ud800"}, r"without lone surrogates, with '\\ud800'"),
        ({**GOOD, "prompt": "\ud800"}, r"without lone surrogates, with '\\ud800'"),
        ({"prompt": "p", "responses": ["a", "a"], "ranking": [0, 1]}, "two that differ, with all 'a'. Drop the record"),
        ({"prompt": "p", "responses": ["a", "a"], "ranking": [[0, 1]]}, "two that differ, with all 'a'"),
        (Ranking("p", ("a", "a", "a")), "two that differ, with all 'a'"),
        (Ranking("p", ("a",)), r"two or more, with \('a',\)"),
        (Ranking("p", ("a", "b"), float("nan")), "'margin' must be a finite number, with nan"),
        (Ranking("p", ("a", "b", "c"), 0.0, (0, 1)), r"'ranks' must hold one rank .* \(=3\): \[0, 1\]"),
        (Ranking("p", ("a", "b"), 0.0, (1, 0)), "from best to worst"),
        (Ranking("", ("a", "b")), "'prompt' must be a non-empty string"),
    ],
)
def test_what_can_teach_nothing_or_break_later_is_refused_or_left_out(record, message):
    with pytest.raises(ValueError, match=f"record 2: .*{message}"):
        load_rankings([GOOD, record])
    assert load_rankings([GOOD, record], skip_malformed=True) == [Ranking("p", ("a", "b"))]


def test_one_record_is_no_list_of_them():
    for one in (GOOD, Ranking("p", ("a", "b"))):
        with pytest.raises(ValueError, match=r"must be a list of records, with one record .* Put it in a list"):
            load_rankings(one)


def test_fields_that_are_none_are_absent_as_in_a_table():
    empty = dict.fromkeys(("responses", "ranking", "margin", "tie"))
    assert load_rankings([{**GOOD, **empty}]) == load_rankings([GOOD])
    ranked = {"prompt": "p", "responses": ["a", "b"], "ranking": [1, 0], "chosen": None, "rejected": None}
    assert load_rankings([ranked]) == [Ranking("p", ("b", "a"))]
    assert load_rankings([{**DIALOGUE, "prompt": None, "tie": None}]) == load_rankings([DIALOGUE])
