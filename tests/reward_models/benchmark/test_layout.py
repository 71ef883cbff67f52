"""Laying out rankings: equal texts are scored once, pairs and ties point to them, clusters are prompts."""

import numpy as np

from reward_models.benchmark.layout import lay_out
from reward_models.preferences import ranking_of


def test_ties_are_lists_in_a_ranking_or_marked_pairs():
    item = ranking_of({"prompt": "p", "responses": ["a", "b", "c", "d"], "ranking": [1, [3, 0], 2]})
    assert item.responses == ("b", "d", "a", "c")
    assert item.ranks == (0, 1, 1, 2)
    layout = lay_out([item])
    named = [(layout.texts.responses[a], layout.texts.responses[b]) for a, b in zip(*layout.pairs[:2], strict=True)]
    assert named == [("b", "d"), ("b", "a"), ("b", "c"), ("d", "c"), ("a", "c")]
    assert len(layout.ties.first) == 1
    assert ranking_of({"prompt": "p", "chosen": "a", "rejected": "b", "tie": True}).ranks == (0, 0)


def test_equal_texts_are_scored_once_and_pairs_of_a_prompt_are_one_cluster():
    first = ranking_of({"prompt": "p", "responses": ["a", "b", "c"], "ranking": [0, 1, 2]})
    second = ranking_of({"prompt": "p", "responses": ["a", "b", "c"], "ranking": [2, 1, 0]})
    other = ranking_of({"prompt": "q", "chosen": "a", "rejected": "b"})
    layout = lay_out([first, second, other])
    assert len(layout.texts.responses) == 5
    assert layout.pairs.cluster.tolist() == [0] * 6 + [1]
    scores = np.array([ord(text[0]) for text in layout.texts.responses], dtype=float)
    assert layout.pairs.margins(scores).tolist() == [-1, -2, -1, 1, 2, 1, -1]


def test_texts_that_differ_in_a_column_are_not_the_same():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    layout = lay_out([ranking_of({**pair, "answer": 1}), ranking_of({**pair, "answer": 2})])
    assert layout.texts.columns["answer"] == [1, 1, 2, 2]
    assert layout.texts.columns["finish_reason"] == ["eos"] * 4


def test_texts_that_ended_otherwise_are_not_the_same():
    record = {"prompt": "p", "responses": ["a", "b"], "ranking": [0, 1]}
    reasons = (["eos", "length"], ["length", "length"])
    layout = lay_out([ranking_of({**record, "finish_reasons": pair}) for pair in reasons])
    assert layout.texts.responses == ["a", "b", "a"]
    assert layout.texts.columns["finish_reason"] == ["eos", "length", "length"]
    assert [rows.tolist() for rows in layout.rows] == [[0, 1], [2, 1]]
