"""A person in the place of the demo's simulated annotators."""

from rich.console import Console

from agents.demo.human import people_rank
from reward_models.feedback.project import NewItem, Project, Response
from reward_models.feedback.queue import Queue
from tests.agents.demo.person import rank_shortest_first

PROMPTS, ANSWERS, REASONS = ("p", "q"), (("a", "bb"), ("cc", "d")), (("eos", "eos"), ("eos", "eos"))


def test_it_waits_for_every_prompt_also_when_two_names_answered_one(tmp_path, monkeypatch):
    with Project.create(tmp_path / "human.db", "ranking", {"prompts": 2}) as project:
        responses = [[Response(text, "sft", finish_reason="eos") for text in own] for own in ANSWERS]
        project.add_items([NewItem(f"prompt {i}", PROMPTS[i], responses[i]) for i in range(2)])
        queue = Queue(project)
        for number, fields in enumerate(({"action": "skip"}, {"ranking": [[0], [1]]}), start=1):
            with project.write() as database:
                database.execute("INSERT INTO sessions VALUES (?, 'annotator', NULL, 0)", (f"session {number}",))
            queue.join(f"session {number}", f"Person {number}")
            queue.next(number, f"session {number}")
            queue.submit(1, number, f"session {number}", {"request": f"request-of-{number}", **fields})
    monkeypatch.setattr("webbrowser.open", lambda link: rank_shortest_first(link, 2))
    rankings = people_rank(tmp_path / "human.db", PROMPTS, ANSWERS, REASONS, Console(quiet=True), lambda *_: None)
    assert [ranking["prompt"] for ranking in rankings] == ["p", "q"]
