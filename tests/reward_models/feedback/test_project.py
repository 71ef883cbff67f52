"""The project file: what it keeps, what it refuses, how it grows."""

import json
import sqlite3

import pytest

from reward_models.feedback import schema as module
from reward_models.feedback.project import NewItem, Project, Response
from reward_models.feedback.queue import Queue


def test_items_come_back_as_they_were_added(tmp_path):
    chat = [{"role": "user", "content": "¿qué? \U0001f600"}]
    with Project.create(tmp_path / "p.db", "ranking", {"seed": 3}, guidelines="# Rules") as project:
        responses = [Response("a", "m", {"temperature": 0.7}, "eos"), Response("b")]
        project.add_items([NewItem("one", chat, responses, "cats"), NewItem("two", "x", responses, known=[[1], [0]])])
    with Project(tmp_path / "p.db") as project:
        first, second = project.items()
        assert first.prompt == chat
        assert first.responses == tuple(responses)
        assert (first.category, first.known) == ("cats", None)
        assert second.known == ((1,), (0,))
        assert (project.kind, project.settings, project.guidelines) == ("ranking", {"seed": 3}, "# Rules")
        assert project.item(99) is None


def test_making_a_project_again_goes_on_and_adds_nothing_twice(make_project):
    again = [make_project(items=3) for _ in range(2)][1]
    assert again.count() == 3


def test_other_settings_or_another_kind_are_refused(make_project):
    make_project(temperature=0.5)
    with pytest.raises(ValueError, match=r"got temperature 0.7 for .* which has 0.5. Name another file"):
        make_project(temperature=0.7)
    with pytest.raises(ValueError, match="got kind 'arena'"):
        make_project(kind="arena", temperature=0.5)


def test_it_is_written_so_that_a_power_cut_loses_nothing(make_project):
    project = make_project()
    assert project.rows("PRAGMA journal_mode")[0][0] == "wal"
    assert project.rows("PRAGMA synchronous")[0][0] == 2  # FULL


def test_annotations_cannot_be_changed_or_removed(make_project):
    project = make_project()
    with project.write() as database:
        database.execute("INSERT INTO annotators VALUES (1, 'Ann', 0)")
        database.execute(
            "INSERT INTO annotations VALUES (NULL, 1, 1, 'skip', '[]', '{}', '{}', '', '[0]', 1, 0, 'request-1')"
        )
    for change in ("UPDATE annotations SET comment = 'x'", "DELETE FROM annotations"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"), project.write() as database:
            database.execute(change)
    assert len(project.history()) == 1


def test_a_failed_step_leaves_nothing_of_itself(make_project):
    project = make_project(items=1)
    with pytest.raises(sqlite3.IntegrityError), project.write() as database:
        database.execute("DELETE FROM responses") and database.execute("INSERT INTO responses VALUES (9, 0, '', 1, '')")
    assert len(project.items()[0].responses) == 4


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "must be an existing file"),
        (b"", "is empty. Make it"),
        (b"no database, just text that is long enough to be one" * 40, "must be a whole SQLite file"),
    ],
)
def test_what_is_no_project_is_refused_by_name(tmp_path, content, says):
    path = tmp_path / "p.db"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        Project(path)
    assert content is None or path.read_bytes()[: len(content)] == content or not content


def test_another_programs_database_is_left_alone(tmp_path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE precious (x)")
    before = path.read_bytes()
    for how in (lambda: Project(path), lambda: Project.create(path, "ranking", {})):
        with pytest.raises(ValueError, match="got another database"):
            how()
    assert path.read_bytes() == before


def test_a_damaged_file_is_named(tmp_path, make_project):
    project = make_project(items=200)
    project.close()
    path = tmp_path / "project.db"
    data = bytearray(path.read_bytes())
    data[8192:16384] = b"\xff" * 8192
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"whole SQLite file, got .*project.db.*Restore a copy"):
        Project(path)


def test_an_older_schema_is_brought_up_to_date_and_a_newer_one_refused(tmp_path, make_project, monkeypatch):
    make_project(items=2).close()
    monkeypatch.setattr(
        module, "MIGRATIONS", (*module.MIGRATIONS, "ALTER TABLE items ADD COLUMN note TEXT DEFAULT 'n'")
    )
    with Project(tmp_path / "project.db") as project:
        assert [row["note"] for row in project.rows("SELECT note FROM items")] == ["n", "n"]
        assert project.rows("PRAGMA user_version")[0][0] == len(module.MIGRATIONS)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"schema version 1 or less, got 2 .* Update textenv"):
        Project(tmp_path / "project.db")


def test_a_migration_that_fails_changes_nothing(tmp_path, make_project, monkeypatch):
    make_project(items=2).close()
    broken = "ALTER TABLE items ADD COLUMN note TEXT; CREATE TABLE items (x)"
    monkeypatch.setattr(module, "MIGRATIONS", (*module.MIGRATIONS, broken))
    with pytest.raises(ValueError, match="already exists"):
        Project(tmp_path / "project.db")
    monkeypatch.undo()
    with Project(tmp_path / "project.db") as project:
        assert "note" not in {row["name"] for row in project.rows("PRAGMA table_info(items)")}


def test_a_full_disk_is_said_and_loses_nothing(make_project):
    project = make_project(items=2)
    pages = project.rows("PRAGMA page_count")[0][0]
    project.rows(f"PRAGMA max_page_count={pages}")
    items = [NewItem(f"more {i}", "x" * 4000, [Response("y" * 4000), Response("z")]) for i in range(50)]
    with pytest.raises(OSError, match=r"full.*Free some space"):
        project.add_items(items)
    assert project.count() == 2


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"must be a file that can be written, got .*file/p.db"):
        Project.create(tmp_path / "file" / "p.db", "ranking", {})


def test_the_history_has_corrections_and_undone_answers_too(make_project, clock):
    project = make_project(items=1, k=2)
    queue = Queue(project, clock=clock)
    with project.write() as database:
        database.execute("INSERT INTO sessions VALUES ('s', 'annotator', NULL, 0)")
    queue.join("s", "Ann")
    for number, ranking in enumerate(([[0], [1]], [[1], [0]])):
        queue.next(1, "s") if number == 0 else queue.open(1, 1, "s")
        queue.submit(1, 1, "s", {"ranking": ranking, "request": f"request-{number}", "comment": "why"})
    queue.undo(1, "s")
    history = project.history()
    assert [(row["action"], row["stands"]) for row in history] == [("rank", False), ("rank", False), ("undo", False)]
    assert [row["annotator"] for row in history] == ["Ann"] * 3
    assert history[0]["comment"] == "why"
    assert json.dumps(history)
    assert project.annotations() == []
