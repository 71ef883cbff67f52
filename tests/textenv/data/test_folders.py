"""Result folders: nobody's files are removed, and a kill between any two steps leaves a whole folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from textenv.data.folders import check_replaceable, check_writable, collection_folder, recover, replace_folder


def write(path, text, name="part/a.txt"):
    with replace_folder(path) as folder:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def test_a_result_replaces_an_earlier_one_and_leaves_nothing_beside_it(tmp_path):
    write(tmp_path / "out", "old", name="other.txt")
    write(tmp_path / "out", "new")
    assert (tmp_path / "out/part/a.txt").read_text() == "new"
    assert not (tmp_path / "out/other.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("place", ["thesis.tex", "part/thesis.tex", "notes/thesis.tex"])
@pytest.mark.parametrize("ours", [True, False])
def test_a_folder_with_files_of_others_is_refused_by_name(tmp_path, place, ours):
    out = tmp_path / "out"
    if ours:
        write(out, "old")
    (out / place).parent.mkdir(parents=True, exist_ok=True)
    (out / place).write_text("years of work")
    with pytest.raises(ValueError, match=place.split("/")[0]):
        write(out, "new")
    assert (out / place).read_text() == "years of work"
    assert not ours or (out / "part/a.txt").read_text() == "old"


def test_results_that_come_one_by_one_and_whole_results_never_share_a_folder(tmp_path):
    write(tmp_path / "model", "weights")
    with pytest.raises(ValueError, match=r"earlier results of the same command, got .*model' with other files"):
        collection_folder(tmp_path / "model")
    assert (tmp_path / "model/part/a.txt").read_text() == "weights"
    write(tmp_path / "model", "new weights")  # it is still replaced as before
    for name in ("a.json", "b.json"):
        (collection_folder(tmp_path / "reports") / name).write_text("report")
    with pytest.raises(ValueError, match=r"an earlier result of ours, got .*reports' with 'a\.json' in it"):
        write(tmp_path / "reports", "weights")
    assert [path.name for path in sorted((tmp_path / "reports").glob("[ab].json"))] == ["a.json", "b.json"]


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    write(tmp_path / "out", "old")

    def fail():
        with replace_folder(tmp_path / "out") as folder:
            (folder / "half.txt").write_text("half")
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        fail()
    assert (tmp_path / "out/part/a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("step", [1, 2])
def test_a_kill_between_two_renames_loses_nothing(tmp_path, monkeypatch, step):
    out = tmp_path / "out"
    write(out, "old")
    rename, calls = Path.rename, []

    def killed(self, target):
        calls.append(self)
        if len(calls) == step:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write(out, "new")
    monkeypatch.undo()
    recover(out)
    assert (out / "part/a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_while_the_old_folder_is_removed_keeps_the_new_one(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, "old")
    monkeypatch.setattr(Path, "unlink", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(out, "new")
    monkeypatch.undo()
    recover(out)
    assert (out / "part/a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="output must be a folder, got the file"):
        check_replaceable(tmp_path / "out")


def test_a_half_written_folder_of_a_process_that_is_gone_is_cleared_at_the_next_start(tmp_path):
    code = (
        "import os, sys; from textenv.data.folders import replace_folder\n"
        "with replace_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'half.txt').write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")]).returncode == 9
    (tmp_path / ".out.new-thesis-1").mkdir()  # a name like ours, without our marker
    assert len(list(tmp_path.iterdir())) == 2
    check_replaceable(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [".out.new-thesis-1"]


def test_a_folder_whose_process_was_killed_before_it_wrote_anything_is_cleared_too(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in ("empty", "foreign"):
        (tmp_path / f".out.new-{ended.pid}-{name}").mkdir()
    (tmp_path / f".out.new-{ended.pid}-foreign" / "thesis.txt").write_text("mine")
    check_replaceable(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [f".out.new-{ended.pid}-foreign"]


def test_a_folder_that_another_save_is_writing_is_left_alone(tmp_path):
    with replace_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("a")
        check_replaceable(tmp_path / "out")
        assert (folder / "a.txt").is_file()


def test_a_probe_that_a_killed_process_left_behind_is_removed_by_the_next_one(tmp_path, monkeypatch):
    """Killed between making the probe and removing it: as if its removal never ran."""
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryDirectory.cleanup", lambda self: self._finalizer.detach())
        check_writable(tmp_path / "out")
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "mine").mkdir()
    check_writable(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
