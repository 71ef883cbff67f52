"""What a result says of the command that made it."""

import json

import pytest

from benchmarks import record


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["runs/a", "runs/b-1", "--seeds", "4", "5"], "runs/a runs/b-1 --seeds 4 5"),
        (["--data", "/somewhere/of/mine/pairs.jsonl.gz"], "--data pairs.jsonl.gz"),
        (["--data", "../elsewhere/pairs.jsonl"], "--data pairs.jsonl"),
        (["--agents", "Online DPO"], "--agents 'Online DPO'"),
    ],
)
def test_a_command_can_be_given_again_and_names_no_folder_of_the_machine(tmp_path, monkeypatch, arguments, command):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["ran", *arguments])
    path = record.write_result("some.speed", {"figures": 1})
    assert path == tmp_path / "some_speed.json"
    assert json.loads(path.read_text())["command"] == f"python -m benchmarks.some.speed {command}"


def test_runs_of_other_machines_stay_when_a_benchmark_is_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    (tmp_path / "speed.json").write_text(json.dumps({"cells": 1, "other_runs": {"intel": {"cells": 2}}}))
    made = json.loads(record.write_result("speed", {"cells": 3}).read_text())
    assert (made["cells"], made["other_runs"]) == (3, {"intel": {"cells": 2}})
