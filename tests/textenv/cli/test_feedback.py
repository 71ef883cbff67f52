"""The feedback commands on small files, without a browser."""

import json
import sys
from pathlib import Path

import pytest

import textenv
from reward_models.feedback.project import Project
from reward_models.feedback.queue import EVERYONE, Queue
from reward_models.preferences import load_rankings
from textenv.cli import feedback, main
from textenv.data.records import write_jsonl
from textenv.tasks import assistant

PROMPTS = [record["prompt"] for record in assistant.train_prompts()[:6]]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    textenv.registry.clear_cache()  # each command is a process of its own: no prompts of an earlier one
    write_jsonl("prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    pairs = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad", "category": "c"} for i in range(3)]
    write_jsonl("pairs.jsonl", pairs)
    Path("rules.md").write_text("# Be fair")
    return tmp_path


def register_twin():
    """The shipped model under another name."""
    sources = textenv.registry.registered_sources("language model")
    textenv.register_language_model("assistant-twin", sources["assistant-sft"])


def run(capsys, *arguments):
    code = main(["feedback", *map(str, arguments)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed


def answer_all(path, best=0):
    """One annotator ranks everything, the response at place ``best`` first."""
    with Project(path) as project:
        queue = Queue(project)
        with project.write() as database:
            database.execute("INSERT INTO sessions VALUES ('ann', 'annotator', NULL, 0)")
        queue.join("ann", "Ann")
        while lease := queue.next(1, "ann"):
            order = sorted(range(len(lease.shown)), key=lambda i: lease.shown[i] != best)
            fields = {"ranking": [[i] for i in order], "request": f"request-{lease.item.id}"}
            queue.submit(lease.item.id, 1, "ann", fields)


CREATE = ["create", "p.db", "--prompts", "prompts.jsonl", "--model", "assistant-sft", "--max-new-tokens", "24"]


def test_create_samples_and_goes_on_where_it_stopped(capsys, folder):
    printed = run(capsys, *CREATE, "--k", "3", "--guidelines", "rules.md", "--checks", "pairs.jsonl")
    assert "9 items in p.db. Rank them: textenv feedback serve p.db" in printed.out
    with Project("p.db") as project:
        items = project.items()
        assert project.guidelines == "# Be fair"
    assert [item.prompt for item in items[:6]] == PROMPTS
    assert {response.model for item in items[:6] for response in item.responses} == {"assistant-sft"}
    assert all(item.known == ((0,), (1,)) for item in items[6:])
    run(capsys, *CREATE, "--k", "3")
    with Project("p.db") as project:
        assert project.items() == items


def test_a_prompt_that_is_too_long_is_named_by_its_line_if_it_is_asked_at_all(capsys, folder):
    write_jsonl("long.jsonl", [{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[1]}, {"prompt": f"{PROMPTS[2]} " * 20}])
    create = ["create", "long.db", "--prompts", "long.jsonl", "--model", "assistant-sft", "--k", "2"]
    assert main(["feedback", *create, "--max-new-tokens", "8"]) == 2
    assert ": long.jsonl, line 3: a prompt and max_new_tokens must fit the context of" in capsys.readouterr().err
    run(capsys, *create, "--max-new-tokens", "8", "--limit", "2")  # into the same file, which has no items yet
    with Project("long.db") as project:
        assert project.settings["max_new_tokens"] == 8
        assert [item.prompt for item in project.items()] == PROMPTS[:2]


def test_create_imports_preferences_in_any_layout(capsys, folder):
    write_jsonl("shp.jsonl", [{"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 0}])
    run(capsys, "create", "p.db", "--data", "shp.jsonl", "--format", "shp")
    with Project("p.db") as project:
        (item,) = project.items()
    assert (item.prompt, sorted(r.text for r in item.responses), item.known) == ("h", ["a", "b"], None)


def test_other_settings_need_another_file(capsys, folder):
    run(capsys, *CREATE)
    assert main(["feedback", *CREATE, "--temperature", "0.5"]) == 2
    assert "which has 1.0. Name another file." in capsys.readouterr().err


def test_other_records_behind_the_same_path_need_another_file(capsys, folder):
    for command in (CREATE, ["create", "d.db", "--data", "pairs.jsonl"]):
        run(capsys, *command)
    write_jsonl("prompts.jsonl", [{"prompt": PROMPTS[0]}])
    write_jsonl("pairs.jsonl", [{"prompt": "other", "chosen": "good", "rejected": "bad"}])
    textenv.registry.clear_cache()  # as in another process
    for command in (CREATE, ["create", "d.db", "--data", "pairs.jsonl"]):
        assert main(["feedback", *command]) == 2
        assert "got records" in capsys.readouterr().err


def test_what_people_said_is_exported_for_reward(capsys, folder):
    run(capsys, *CREATE, "--overlap", "0")
    answer_all("p.db")
    printed = run(capsys, "export", "p.db", "--output", "out", "--json")
    with Project("p.db") as project:
        texts = [sum(bool(response.text.strip()) for response in item.responses) for item in project.items()]
    pairs = sum(count * (count - 1) // 2 for count in texts)  # those with an empty response are left out
    assert json.loads(printed.out) == {"rankings": 6, "pairs": pairs, "raw": 6, "data": "out/rankings.jsonl"}
    assert len(load_rankings("out/rankings.jsonl")) == 6
    output = ["--output", "rm", "--epochs", "1"]
    assert main(["reward", "--model", "assistant-sft", "--data", "out/rankings.jsonl", *output]) == 0


def test_a_reward_model_judges_an_arena_without_people(capsys, folder):
    textenv.register_language_model(
        "assistant-twin", textenv.registry.registered_sources("language model")["assistant-sft"]
    )
    models = ["arena", "assistant-sft", "assistant-twin", "--prompts", "prompts.jsonl", "--max-new-tokens", "24"]
    printed = run(capsys, *models, "--project", "a.db", "--judge", "assistant-gold", "--json")
    found = json.loads(printed.out)
    (match,) = found["matches"]
    assert (match["first"], match["second"]) == ("assistant-sft", "assistant-twin")
    assert match["wins"] + match["ties"] + match["losses"] == 6
    assert [rating["battles"] for rating in found["ratings"]] == [6, 6]
    table = run(capsys, *models, "--project", "a.db", "--judge", "assistant-gold").out
    assert "assistant-sft : assistant-twin" in table
    assert "Bradley–Terry" in table


def test_an_arena_with_people_ends_with_their_verdict(capsys, folder, monkeypatch):
    textenv.register_language_model(
        "assistant-twin", textenv.registry.registered_sources("language model")["assistant-sft"]
    )

    def people(project, app, host, port, *, open_browser):
        answer_all(project.path, best=1)  # the second model wins
        raise KeyboardInterrupt

    monkeypatch.setattr(feedback, "_run", people)
    models = ["assistant-sft", "assistant-twin", "--prompts", "prompts.jsonl", "--max-new-tokens", "24"]
    assert main(["feedback", "arena", *models, "--project", "a.db", "--json"]) == 130
    (match,) = json.loads(capsys.readouterr().out)["matches"]
    assert match["losses"] + match["ties"] == 6
    assert match["losses"] >= 4


def test_the_most_uncertain_items_are_asked_first(capsys, folder, monkeypatch):
    textenv.register_reward_model("long", lambda prompts, completions: [len(text) for text in completions])
    textenv.register_reward_model("short", lambda prompts, completions: [-len(text) for text in completions])
    records = [
        {"prompt": "same", "chosen": "ab", "rejected": "cd"},
        {"prompt": "differ", "chosen": "abc", "rejected": "d"},
    ]
    write_jsonl("two.jsonl", records)
    run(capsys, "create", "p.db", "--data", "two.jsonl")
    monkeypatch.setattr(feedback, "_run", lambda *args, **kwargs: None)
    run(capsys, "serve", "p.db", "--order", "uncertain", "--reward-model", "long", "short", "--guidelines", "rules.md")
    with Project("p.db") as project:
        rows = project.rows("SELECT prompt FROM items WHERE needed < ? ORDER BY priority DESC, id", EVERYONE)
        assert [json.loads(row["prompt"]) for row in rows] == ["differ", "same"]
        assert project.guidelines == "# Be fair"


def test_the_demo_makes_its_project_from_nothing_and_goes_on(capsys, folder, monkeypatch):
    monkeypatch.setattr(feedback, "_run", lambda *args, **kwargs: None)
    for _ in range(2):
        run(capsys, "demo", "--output", "d", "--prompts", "4", "--k", "2")
    with Project("d/demo.db") as project:
        assert project.count() == 4
        assert "helpful" in project.guidelines


def test_a_missing_extra_is_named_before_any_work(capsys, folder, monkeypatch):
    for name in list(sys.modules):
        if name.startswith(("reward_models.feedback.web", "textenv.cli.feedback")):
            monkeypatch.delitem(sys.modules, name)
        if name.partition(".")[0] == "starlette":
            monkeypatch.setitem(sys.modules, name, None)
    for command in (["feedback", "export", "p.db", "--output", "out"], ["demo", "--human", "3", "--output", "out"]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "none named starlette. Install them: pip install 'textenv[feedback]'." in said
    assert not Path("out").exists()
