"""What people said, as data that training reads."""

import json

import pytest

from reward_models.feedback.export import consensus, export, pairs_of, records
from reward_models.feedback.project import Annotation, Item, Response
from reward_models.feedback.queue import Queue
from reward_models.preferences import load_rankings
from textenv.data.datasets import read_records


def said(item, annotator, ranking, action="rank"):
    return Annotation(item, annotator, action, ranking, {}, {}, "", (0, 1, 2), 1.0, 0.0)


def item(number=0, texts=("a", "b", "c"), reason=""):
    return Item(number, "p", tuple(Response(text, "m", {}, reason) for text in texts), "cats", None)


def test_a_record_per_annotator_and_item():
    annotations = [said(0, "Ann", ((2,), (0, 1))), said(0, "Bob", ((0,), (1,), (2,))), said(1, "Ann", (), "skip")]
    first, second = records([item(), item(1)], annotations, "annotator")
    assert first == {
        "prompt": "p",
        "responses": ["a", "b", "c"],
        "ranking": [2, [0, 1]],
        "models": ["m", "m", "m"],
        "category": "cats",
        "annotator": "Ann",
    }
    assert second["ranking"] == [0, 1, 2]
    (ranking, _) = load_rankings([first, second])
    assert (ranking.responses, ranking.ranks, ranking.category) == (("c", "a", "b"), (0, 1, 1), "cats")


def test_endings_are_there_where_they_are_known():
    (record,) = records([item(reason="eos")], [said(0, "Ann", ((0,), (1,), (2,)))], "annotator")
    assert record["finish_reasons"] == ["eos"] * 3


def test_responses_that_are_all_the_same_teach_nothing():
    assert list(records([item(texts=("a", "a", "a"))], [said(0, "Ann", ((0,), (1,), (2,)))], "annotator")) == []


def test_the_consensus_of_three_by_hand():
    a_first, b_first = ((0,), (1,), (2,)), ((1,), (0,), (2,))
    votes = [said(0, name, ranking) for name, ranking in (("A", a_first), ("B", b_first), ("C", a_first))]
    assert consensus(votes) == [[0], [1], [2]]  # 2 : 1 for a over b, all for both over c
    assert consensus(votes[:2]) == [[0, 1], [2]]  # 1 : 1
    assert consensus([said(0, "A", ((2, 1), (0,)))]) == [[2, 1], [0]]
    (record,) = records([item()], votes, "consensus")
    assert (record["ranking"], record["annotators"]) == ([0, 1, 2], 3)


def test_pairs_leave_ties_and_empty_texts_out():
    record = {"prompt": "p", "responses": ["a", "b", " ", "d"], "ranking": [3, [0, 1], 2], "annotator": "Ann"}
    found = [(pair["chosen"], pair["rejected"], pair["annotator"]) for pair in pairs_of(record)]
    assert found == [("d", "a", "Ann"), ("d", "b", "Ann")]


@pytest.fixture
def ranked(make_project, clock):
    """Two annotators on two items of three responses, with a skip and a flag."""
    project = make_project(items=2, k=3, needed=2, guidelines="Be **kind**.")
    queue = Queue(project, clock=clock)
    for number, name in enumerate(("Ann", "Bob"), start=1):
        with project.write() as database:
            database.execute("INSERT INTO sessions VALUES (?, 'annotator', NULL, 0)", (name,))
        queue.join(name, name)
        while lease := queue.next(number, name):
            skip = (name, lease.item.id) == ("Bob", 2)
            answer = (
                {"action": "skip", "ranking": []} if skip else {"ranking": [[0], [1], [2]], "flags": {"2": "harmful"}}
            )
            queue.submit(lease.item.id, number, name, {**answer, "request": f"request-{name}-{lease.item.id}"})
    return project


def test_the_folder_has_rankings_pairs_raw_rows_and_a_card(ranked, tmp_path):
    counts = export(ranked, tmp_path / "out")
    assert counts == {"rankings": 3, "pairs": 9, "raw": 4}
    assert len(load_rankings(tmp_path / "out" / "rankings.jsonl")) == 3
    assert len(load_rankings(tmp_path / "out" / "pairs.jsonl")) == 9
    raw = list(read_records(tmp_path / "out" / "raw.jsonl").values())
    assert [row["action"] for row in raw] == ["rank", "rank", "rank", "skip"]
    assert raw[0]["flags"] == {str(raw[0]["shown"][2]): "harmful"}
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "# Rankings of 2 prompts by 2 annotators",
        "`model 0`",
        "Skipped: 1. Flagged responses: 3.",
        "Be **kind**.",
    ):
        assert part in card
    assert "Krippendorff's α over pairs:" in card
    assert "± 0.0" not in card
    assert export(ranked, tmp_path / "out", by="consensus")["rankings"] == 2


def test_the_card_counts_the_prompts_that_were_ranked(make_project, clock, tmp_path):
    """One of four; and one ranking has no interval."""
    project = make_project(items=4, k=3)
    queue = Queue(project, clock=clock)
    with project.write() as database:
        database.execute("INSERT INTO sessions VALUES ('Ann', 'annotator', NULL, 0)")
    queue.join("Ann", "Ann")
    item = queue.next(1, "Ann").item.id
    queue.submit(item, 1, "Ann", {"ranking": [[0], [1], [2]], "request": "request-one"})
    export(project, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# Rankings of 1 prompts by 1 annotators" in card
    # the first of three, which is the best once in three by chance
    assert "than by chance by 66.7 percentage points; 1 that are all alike give no interval." in card


def test_a_folder_with_files_of_others_and_a_project_without_answers_are_refused(ranked, make_project, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match=r"thesis\.txt"):
        export(ranked, tmp_path / "mine")
    with pytest.raises(ValueError, match="must have rankings to export, got none in"):
        export(make_project(name="empty.db"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_json_of_the_raw_rows_is_standard(ranked):
    json.dumps(ranked.history(), allow_nan=False)
