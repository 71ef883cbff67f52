"""Reading preferences: every form, ties, dialogues, and errors that name the line."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from reward_models.benchmark.items import item_of, load_items
from reward_models.benchmark.layout import lay_out
from reward_models.preferences import split_dialogue

HELLO = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: bye\n\nAssistant:"


def test_a_ranking_is_put_in_order_with_everything_that_belongs_to_its_responses():
    item = item_of(
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
    assert item.responses == ("c", "a", "b")
    assert item.ranks == (0, 1, 2)
    assert item.gold == (3.0, 1.0, 2.0)
    assert item.finish_reasons == ("stop", "eos", "length")
    assert (item.category, item.columns) == ("x", {"answer": 7})


def test_ties_are_lists_in_a_ranking_or_marked_pairs():
    item = item_of({"prompt": "p", "responses": ["a", "b", "c", "d"], "ranking": [1, [3, 0], 2]})
    assert item.responses == ("b", "d", "a", "c")
    assert item.ranks == (0, 1, 1, 3)
    layout = lay_out([item])
    named = [(layout.texts.responses[a], layout.texts.responses[b]) for a, b in zip(*layout.pairs[:2], strict=True)]
    assert named == [("b", "d"), ("b", "a"), ("b", "c"), ("d", "c"), ("a", "c")]
    assert len(layout.ties.first) == 1
    assert item_of({"prompt": "p", "chosen": "a", "rejected": "b", "tie": True}).ranks == (0, 0)


def test_a_dialogue_is_split_at_the_last_assistant_turn():
    prompt, chosen, rejected = split_dialogue(HELLO + " good bye", HELLO + " no")
    assert (prompt, chosen, rejected) == (HELLO, " good bye", " no")
    item = item_of({"chosen": HELLO + " good bye", "rejected": HELLO + " no"})
    assert (item.prompt, item.responses) == (HELLO, (" good bye", " no"))


def test_a_reply_may_be_empty_but_not_both_the_same():
    item = item_of({"chosen": HELLO + " ", "rejected": HELLO + " no", "tie": True})
    assert (item.responses, item.ranks) == ((" ", " no"), (0, 0))
    with pytest.raises(ValueError, match="differ in the last turn"):
        split_dialogue(HELLO + " no", HELLO + " no")


def test_dialogues_that_differ_earlier_or_end_with_a_human_are_errors():
    with pytest.raises(ValueError, match="differ from character 9 on"):
        split_dialogue("\n\nHuman: a\n\nAssistant: x", "\n\nHuman: b\n\nAssistant: x")
    with pytest.raises(ValueError, match="must end with an assistant turn"):
        split_dialogue(HELLO + " x\n\nHuman: y", HELLO + " x")
    # The shorter dialogue is a beginning of the longer one.
    with pytest.raises(ValueError, match="same up to the last assistant turn"):
        split_dialogue("\n\nHuman: a\n\nAssistant: x", "\n\nHuman: a\n\nAssistant: x\n\nHuman: b\n\nAssistant: x")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("[1]", "must be a JSON object"),
        ("{", "not valid JSON"),
        ('{"prompt": "p", "chosen": "a"}', "'chosen' and 'rejected'"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "tie": 1}', "'tie' must be true or false"),
        ('{"prompt": "p", "responses": ["a", "b"], "ranking": [0, 0]}', "permutation"),
        ('{"prompt": "p", "responses": ["a", "b"], "ranking": [0, 1], "gold": [1]}', "one value a response"),
        ('{"chosen": "no roles", "rejected": "at all"}', "must end with an assistant turn"),
        ('{"prompt": "p", "chosen": "a", ', "not valid JSON .*column 32"),  # of 31 characters
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": "p", "chosen": "\\ud800", "rejected": "b"}', "without lone surrogates"),
        ('{"prompt": "p", "responses": ["a", "a"], "ranking": [0, 1]}', "two that differ"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "gold": [1.0, NaN]}', r"'gold' must .* with \[1.0, nan\]"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "gold": [1, null]}', r"'gold' must .* with \[1, None\]"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "gold": [1, "x"]}', r"'gold' must .* with \[1, 'x'\]"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "prompts": "x"}', "must not be called 'prompts'"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b", "completions": 1}', "must not be called 'completions'"),
    ],
)
def test_a_malformed_line_is_named_or_skipped_and_counted(tmp_path, record, message):
    good = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"})
    path = tmp_path / "d.jsonl"
    path.write_text(f"{good}\n\n{record}\n{good}\n")
    with pytest.raises(ValueError, match=rf"(?s)d\.jsonl, line 3: .*{message}"):
        load_items(path)
    items, skipped = load_items(path, skip_malformed=True)
    assert (len(items), skipped) == (2, 1)
    items, skipped = load_items(path, limit=2, skip_malformed=True)
    assert (len(items), skipped) == (2, 1), "a limit of good records"


def test_compressed_files_limits_and_empty_files(tmp_path):
    line = json.dumps({"prompt": "ä", "chosen": "a", "rejected": "b"}) + "\n"
    with gzip.open(tmp_path / "d.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(line * 5)
    items, _ = load_items(tmp_path / "d.jsonl.gz", limit=3)
    assert [item.prompt for item in items] == ["ä"] * 3
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="at least one record"):
        load_items(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="must be a JSONL file"):
        load_items(tmp_path / "absent.jsonl")


def test_equal_texts_are_scored_once_and_pairs_of_a_prompt_are_one_cluster():
    first = item_of({"prompt": "p", "responses": ["a", "b", "c"], "ranking": [0, 1, 2]})
    second = item_of({"prompt": "p", "responses": ["a", "b", "c"], "ranking": [2, 1, 0]})
    other = item_of({"prompt": "q", "chosen": "a", "rejected": "b"})
    layout = lay_out([first, second, other])
    assert len(layout.texts.responses) == 5
    assert layout.pairs.cluster.tolist() == [0] * 6 + [1]
    scores = np.array([ord(text[0]) for text in layout.texts.responses], dtype=float)
    assert layout.pairs.margins(scores).tolist() == [-1, -2, -1, 1, 2, 1, -1]


def test_texts_that_differ_in_a_column_are_not_the_same():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    layout = lay_out([item_of({**pair, "answer": 1}), item_of({**pair, "answer": 2})])
    assert layout.texts.columns["answer"] == [1, 1, 2, 2]
    assert layout.texts.columns["finish_reason"] == ["eos"] * 4


@pytest.fixture
def hh_path() -> Path:
    path = os.environ.get("TEXTENV_HH_DATA", "")
    if not Path(path).is_file():
        pytest.skip("TEXTENV_HH_DATA does not name a file of HH dialogues (JSONL, may be .gz).")
    return Path(path)


def test_real_dialogues_are_split_without_loss(hh_path):
    items, skipped = load_items(hh_path, skip_malformed=True)
    assert len(items) > 0.95 * (len(items) + skipped)
    with gzip.open(hh_path, "rt") if hh_path.suffix == ".gz" else hh_path.open() as file:
        dialogues = {json.loads(line)["chosen"] for line in file}
    assert all(item.prompt + item.responses[0] in dialogues for item in items)
    assert all(item.prompt.endswith("\n\nAssistant:") for item in items)


def test_texts_that_ended_otherwise_are_not_the_same():
    record = {"prompt": "p", "responses": ["a", "b"], "ranking": [0, 1]}
    reasons = (["eos", "length"], ["length", "length"])
    layout = lay_out([item_of({**record, "finish_reasons": pair}) for pair in reasons])
    assert layout.texts.responses == ["a", "b", "a"]
    assert layout.texts.columns["finish_reason"] == ["eos", "length", "length"]
    assert [rows.tolist() for rows in layout.rows] == [[0, 1], [2, 1]]


def test_a_malformed_line_in_a_folder_of_files_is_skipped_or_named_with_its_file(tmp_path):
    good = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n"
    (tmp_path / "a.jsonl").write_text(good)
    (tmp_path / "b.jsonl").write_text(good + '{"prompt": "x", \n')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: not valid JSON"):
        load_items(tmp_path)
    items, skipped = load_items(tmp_path, skip_malformed=True)
    assert (len(items), skipped) == (2, 1)


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
    assert item_of(record) == item_of({"prompt": "p", "chosen": "a", "rejected": "b", "answer": None})
    assert item_of(record).columns == {"answer": None}


def test_a_hub_id_may_hold_a_dot_and_a_file_that_is_not_there_is_no_hub_id(monkeypatch):
    asked = []
    record = {"prompt": "p", "chosen": "a", "rejected": "b"}
    monkeypatch.setattr("textenv.data.records._load_dataset", lambda name, *which: asked.append(name) or [record])
    assert load_items("org/data-1.5")[0] == [item_of(record)]
    assert asked == ["org/data-1.5"]
    for absent in ("runs/absent.jsonl.gz", "runs/absent.csv", "./absent-1.5"):
        with pytest.raises(ValueError, match="data must be a JSONL file"):
            load_items(absent)
