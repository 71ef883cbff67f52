"""Preference records: every form reads as one ranking, and malformed ones are named."""

import gzip
import json
import operator

import pytest

from reward_models.preferences import (
    Ranking,
    better_pairs,
    load_rankings,
    ranking_of,
    read_rankings,
    split_by_prompt,
)
from tests.reward_models.test_dialogues import DIALOGUE
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
