"""Each published layout as a hand-made record or two, with the ranking that it means."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from reward_models.preferences import LAYOUTS, Ranking, layout_table, load_rankings, read_rankings
from textenv.cli import main

ASK = [{"role": "user", "content": "q"}]


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def rated(text: str, helpfulness: int, verbosity: int) -> dict:
    scales = {"helpfulness": helpfulness, "correctness": 3, "coherence": 4, "complexity": 2, "verbosity": verbosity}
    return {"prompt": "q", "response": text, **scales}


POST = {"subreddit": "tifu", "title": "T", "post": "P", "article": None}
HUMAN = "\n\nHuman: q\n\nAssistant:"
RECORDS: dict[str, list[tuple[dict | list[dict], dict]]] = {
    "ranking": [
        (
            {"prompt": "q", "responses": ["a", "b", "c"], "ranking": [2, [0, 1]]},
            {"responses": ("c", "a", "b"), "ranks": (0, 1, 1)},
        )
    ],
    "scored": [
        (
            {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 3, 1]},
            {"responses": ("b", "a", "c"), "ranks": (0, 1, 1)},
        )
    ],
    "pair": [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"responses": ("a", "b")}),
        ({"prompt": "q", "chosen": "a", "rejected": ["b", "c"]}, {"responses": ("a", "b", "c"), "ranks": (0, 1, 1)}),
        # a completion of several turns after a prompt of its own
        (
            {"prompt": ASK, "chosen": [*says("a"), *ASK, *says("b")], "rejected": says("c")},
            {"prompt": ASK, "responses": ("a\n\nHuman: q\n\nAssistant: b", "c")},
        ),
    ],
    "dialogues": [
        ({"chosen": [*ASK, *says("a")], "rejected": [*ASK, *says("b")]}, {"prompt": ASK, "responses": ("a", "b")}),
        ({"chosen": HUMAN + " a", "rejected": HUMAN + " b"}, {"prompt": HUMAN, "responses": (" a", " b")}),
    ],
    "rewardbench": [
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "subset": "math-prm", "id": 7},
            {"responses": ("a", "b"), "category": "math-prm", "columns": {"id": 7}},
        )
    ],
    "rewardbench2": [
        (
            {
                "id": "4",
                "prompt": "q",
                "chosen": ["a"],
                "rejected": ["b", "c", "d"],
                "num_correct": 1,
                "subset": "Math",
            },
            {"responses": ("a", "b", "c", "d"), "ranks": (0, 1, 1, 1), "category": "Math", "columns": {"id": "4"}},
        ),
        (
            {
                "id": "tied:1",
                "prompt": "q",
                "chosen": ["a", "b"],
                "rejected": ["c"],
                "num_correct": 2,
                "subset": "Ties",
            },
            {"responses": ("a", "b", "c"), "ranks": (0, 0, 1), "category": "Ties", "columns": {"id": "tied:1"}},
        ),
    ],
    "helpsteer2": [([rated("a", 2, 0), rated("b", 4, 3)], {"responses": ("b", "a")})],
    # b is preferred (1 > 0) and strongly (3); 0 is a tie
    "helpsteer3": [
        (
            {"domain": "code", "context": ASK, "response1": "a", "response2": "b", "overall_preference": 3},
            {"prompt": ASK, "responses": ("b", "a"), "margin": 3.0, "category": "code"},
        ),
        (
            {"domain": "code", "context": ASK, "response1": "a", "response2": "b", "overall_preference": -1},
            {"prompt": ASK, "responses": ("a", "b"), "margin": 1.0, "category": "code"},
        ),
        (
            {"domain": "code", "context": ASK, "response1": "a", "response2": "b", "overall_preference": 0},
            {"prompt": ASK, "responses": ("a", "b"), "ranks": (0, 0), "category": "code"},
        ),
    ],
    "ultrafeedback": [
        (
            {
                "instruction": "q",
                "completions": [{"response": r, "overall_score": s} for r, s in (("a", 7.5), ("b", 9.0), ("c", 7.5))],
            },
            {"responses": ("b", "a", "c"), "ranks": (0, 1, 1)},
        )
    ],
    "ultrafeedback-scores": [
        (
            {
                "prompt": "q",
                "chosen": [*ASK, *says("a")],
                "rejected": [*ASK, *says("b")],
                "score_chosen": 8.0,
                "score_rejected": 6.5,
            },
            {"prompt": ASK, "responses": ("a", "b")},
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 8.0, "score_rejected": 8.0},
            {"responses": ("a", "b"), "ranks": (0, 0)},
        ),
    ],
    "ultrafeedback-ratings": [
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "chosen-rating": 5, "rejected-rating": 2},
            {"responses": ("a", "b")},
        )
    ],
    "nectar": [
        (
            {
                "prompt": HUMAN,
                "answers": [{"answer": "a", "rank": 3.0}, {"answer": "b", "rank": 1.0}, {"answer": "c", "rank": 2.0}],
            },
            {"prompt": HUMAN, "responses": ("b", "c", "a")},
        )
    ],
    "shp": [
        (
            {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 0, "score_ratio": 2.0, "domain": "d"},
            {"responses": ("b", "a"), "margin": math.log(2.0), "category": "d"},
        ),
        (
            {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_ratio": 1.0, "domain": "d"},
            {"responses": ("a", "b"), "category": "d"},
        ),
        ({"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}, {"responses": ("a", "b")}),
    ],
    "pku-saferlhf": [
        ({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1}, {"responses": ("b", "a")})
    ],
    "summarize-from-feedback": [
        (
            {"info": POST, "summaries": [{"text": " a"}, {"text": " b"}], "choice": 1},
            {"prompt": "SUBREDDIT: r/tifu\n\nTITLE: T\n\nPOST: P\n\nTL;DR:", "responses": (" b", " a")},
        ),
        (
            {"info": {"title": "T", "article": "N"}, "summaries": [{"text": " a"}, {"text": " b"}], "choice": 0},
            {"prompt": "TITLE: T\n\nARTICLE: N\n\nTL;DR:", "responses": (" a", " b")},
        ),
    ],
    "question": [
        ({"question": "q", "response_chosen": "a", "response_rejected": "b"}, {"responses": ("a", "b")}),
        (
            {
                "system": "be kind",
                "history": [["q", "r"]],
                "question": "s",
                "response_chosen": "a",
                "response_rejected": "b",
            },
            {
                "prompt": [
                    {"role": "system", "content": "be kind"},
                    *ASK,
                    *says("r"),
                    {"role": "user", "content": "s"},
                ],
                "responses": ("a", "b"),
            },
        ),
        (
            {"history": [["q", "r"], ["s", "t"]], "question": "u", "response_chosen": "a", "response_rejected": "b"},
            {
                "prompt": [
                    *ASK,
                    *says("r"),
                    {"role": "user", "content": "s"},
                    *says("t"),
                    {"role": "user", "content": "u"},
                ],
                "responses": ("a", "b"),
            },
        ),
    ],
    "arena": [
        (
            {"conversation_a": [*ASK, *says("a")], "conversation_b": [*ASK, *says("b")], "winner": "model_a"},
            {"prompt": ASK, "responses": ("a", "b")},
        ),
        (
            {"conversation_a": [*ASK, *says("a")], "conversation_b": [*ASK, *says("b")], "winner": "model_b"},
            {"prompt": ASK, "responses": ("b", "a")},
        ),
        (
            {"conversation_a": [*ASK, *says("a")], "conversation_b": [*ASK, *says("b")], "winner": "tie (bothbad)"},
            {"prompt": ASK, "responses": ("a", "b"), "ranks": (0, 0)},
        ),
        *(
            (
                {"conversation_a": [*ASK, *says("a")], "conversation_b": [*ASK, *says("b")], "winner": winner},
                {"prompt": ASK, "responses": ("a", "b"), "ranks": (0, 0)},
            )
            for winner in ("tie", "both_bad")
        ),
    ],
}
CASES = [
    pytest.param(name, record, expected, id=f"{name}-{number}")
    for name, pairs in RECORDS.items()
    for number, (record, expected) in enumerate(pairs)
]


@pytest.mark.parametrize(("name", "record", "expected"), CASES)
def test_a_layout_is_read_by_its_keys_and_by_its_name(name, record, expected):
    records = record if isinstance(record, list) else [record]
    expected = {"prompt": "q", **expected}
    assert load_rankings(records) == [Ranking(**expected)]
    assert load_rankings(records, format=name) == [Ranking(**expected)]


def test_every_layout_of_the_table_has_a_record_here():
    assert {layout.name for layout in LAYOUTS} == {*RECORDS, "unpaired"}


@pytest.mark.parametrize(("name", "record", "expected"), CASES)
def test_a_table_with_json_text_and_arrays_is_read_alike(name, record, expected, tmp_path):
    """CSV holds every value as text, pandas hands out arrays."""
    records = record if isinstance(record, list) else [record]
    want = [ranking._replace(columns={}) for ranking in load_rankings(records)]

    def cell(value):
        text = json.dumps(value) if isinstance(value, list | dict) else "" if value is None else str(value)
        return '"' + text.replace('"', '""') + '"'

    path = tmp_path / "records.csv"
    lines = [",".join(map(cell, keys)) for keys in [records[0], *(row.values() for row in records)]]
    if not (name == "pair" and isinstance(record["rejected"], list) and isinstance(record["rejected"][0], str)):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        assert [ranking._replace(columns={}) for ranking in load_rankings(path)] == want
    arrays = [
        {key: np.array(value, dtype=object) if isinstance(value, list) else value for key, value in row.items()}
        for row in records
    ]
    assert [ranking._replace(columns={}) for ranking in load_rankings(arrays)] == want
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records, indent=1))
    assert [ranking._replace(columns={}) for ranking in load_rankings(path)] == want


def test_helpsteer2_ranks_by_the_scale_or_the_weights_that_are_named():
    rows = [rated("a", 2, 0), rated("b", 4, 3), {**rated("c", 1, 1), "prompt": "other"}, rated("d", 3, 1)]
    rows.insert(3, {**rated("e", 2, 1), "prompt": "other"})
    first, second = load_rankings(rows)
    assert (first.responses, second.responses) == (("b", "d", "a"), ("e", "c"))
    # helpfulness - verbosity: a 2 - 0, b 4 - 3, d 3 - 1
    (first, _) = load_rankings(rows, format="helpsteer2:helpfulness-verbosity")
    assert (first.responses, first.ranks) == (("a", "d", "b"), (0, 0, 1))
    # half of it and two of verbosity: a 1 + 0, b 2 + 6, d 1.5 + 2
    assert load_rankings(rows, format="helpsteer2:0.5*helpfulness+2*verbosity")[0].responses == ("b", "d", "a")
    # 0.1 · 3 and 0.3 · 1 are equal, though not to the last bit
    even = [rated("a", 3, 0), rated("b", 0, 1)]
    assert load_rankings(even, format="helpsteer2:0.1*helpfulness+0.3*verbosity")[0].ranks == (0, 0)
    assert [ranking.responses for ranking in read_rankings(rows, limit=1)[0]] == [("b", "d", "a")]
    with pytest.raises(ValueError, match=r"a scale must be one of helpfulness, .*got 'kindness'"):
        load_rankings(rows, format="helpsteer2:kindness")


def test_a_limit_counts_good_records_of_every_layout_together():
    lonely, other = {**rated("c", 1, 1), "prompt": "other"}, {**rated("a", 2, 0), "prompt": "third", "source": "x"}
    rows = [lonely, other, {**other, "response": "b"}, rated("d", 3, 1), rated("e", 2, 1), PAIR]
    found, malformed = read_rankings(rows, limit=2, skip_malformed=True)
    assert [ranking.responses for ranking in found] == [("a", "b"), ("a", "b")]  # the pair, then the third prompt
    assert [text.partition(":")[0] for text in malformed] == ["record 1"]
    assert [ranking.columns for ranking in found] == [{}, {}]


def test_which_label_of_pku_saferlhf_counts_is_asked_for_by_name():
    record = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0}
    assert load_rankings([record], format="pku-saferlhf:better")[0].responses == ("b", "a")
    assert load_rankings([record], format="pku-saferlhf:safer")[0].responses == ("a", "b")
    with pytest.raises(ValueError, match="pku-saferlhf:better or pku-saferlhf:safer"):
        load_rankings([record])


SHP = RECORDS["shp"][0][0]
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
H3 = RECORDS["helpsteer3"][0][0]


@pytest.mark.parametrize(
    ("record", "format", "message"),
    [
        ({"prompt": "q", "chosen": "a", "reject": "b"}, None, r"Nearest: pair \(without 'rejected'\)"),
        ({"text": "q"}, None, r"must have the keys of a layout, got \['text'\]"),
        ({**PAIR, "answers": []}, None, "the keys of one layout, got those of pair and nectar. Name the one"),
        (PAIR, "nectar", "format 'nectar' must have 'prompt', 'answers', got none of 'answers'"),
        (PAIR, "pears", "format must be one of ranking, scored, pair"),
        (PAIR, "pair:safer", "format 'pair' must stand alone"),
        ({"prompt": "q", "completion": "a", "label": True}, None, "Join the good and the bad ones of each prompt"),
        ({**SHP, "labels": 2}, None, "'labels' must be one of '1', '0', got 2"),
        ({**SHP, "labels": None}, None, "must have values, got null for 'labels'. Give them"),
        ({**SHP, "score_ratio": 0.5}, None, "'score_ratio' must be 1 or more"),
        ({**H3, "overall_preference": "better"}, None, "'overall_preference' must be a finite number, got 'better'"),
        ({**H3, "response1": " "}, None, "a response of a pair must have text"),
        ({**H3, "response1": "b"}, None, "two that differ"),
        ({"instruction": "q", "completions": []}, None, "'responses' must be a list of two or more"),
        ({"instruction": "q", "completions": [{"response": "a", "overall_score": None}]}, None, "list of objects with"),
        ({**PAIR, "score_chosen": 1, "score_rejected": 2}, None, "must not be below 'score_rejected', got 1 < 2"),
        ({**RECORDS["arena"][0][0], "winner": "model_c"}, None, "'winner' must be one of 'model_a'"),
        (rated("a", 1, 1), None, "'responses' must be a list of two or more"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1]}, None, "'scores' must hold one number per response"),
        ({**PAIR, "rejected": []}, None, "'rejected' must have text"),
        ({**RECORDS["question"][1][0], "history": ["q"]}, None, "'history' must hold pairs"),
        ({"info": {}, "summaries": [], "choice": 0}, None, "'info' must have a 'post' or an 'article'"),
    ],
)
def test_a_wrong_record_is_refused_with_the_rule_and_the_nearest_layouts(record, format, message):
    with pytest.raises(ValueError, match=message):
        load_rankings([record], format=format)


def test_the_guide_prints_the_table_of_layouts():
    guide = Path(__file__).parents[2] / "docs" / "reward-models.md"
    assert layout_table() in guide.read_text("utf-8")


FILES = ("rewardbench2", "helpsteer2", "helpsteer3", "ultrafeedback")


def small_file(name: str, path: Path) -> Path:
    """Records of a layout, for several prompts, in words that the small model knows."""
    words, rows = {'"a"': '"red"', '"b"': '"green"', '"c"': '"the sky"', '"d"': '"is blue"'}, []
    for question in ("what is the sky ?", "the grass is", "what is the grass ?"):
        for records, _ in RECORDS[name]:
            for record in records if isinstance(records, list) else [records]:
                text = json.dumps(record).replace('"q"', json.dumps(question))
                rows.append(re.sub(r'"[abcd]"', lambda found: words[found[0]], text))
    path.write_text("\n".join(rows))
    return path


@pytest.mark.parametrize("flags", [[], ["--format"]])
@pytest.mark.parametrize("name", FILES)
def test_a_reward_model_is_trained_and_benchmarked_on_a_file_of_it_from_the_shell(
    capsys, tmp_path, model_folder, name, flags
):
    data = ["--data", str(small_file(name, tmp_path / "data.jsonl")), *flags, *([name] if flags else [])]
    start, model = tmp_path / "start", str(tmp_path / "rm")
    shutil.copytree(model_folder, start)
    (start / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }} {% endfor %}")
    assert main(["reward", "--model", str(start), *data, "--output", model]) == 0, capsys.readouterr().err
    assert main(["rm-bench", model, *data, "--output", str(tmp_path / "bench"), "--resamples", "20"]) == 0
    assert "accuracy, %" in capsys.readouterr().out
