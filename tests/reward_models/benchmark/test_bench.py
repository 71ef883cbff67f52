"""Several models on one suite: what is finished is on disk, whatever becomes of the others."""

import json

import pytest

import textenv
from reward_models.benchmark.bench import run_all
from tests.reward_models.benchmark.models import CONFIG, length

RECORDS = [{"prompt": "x" * (1 + i), "chosen": "a" * (2 + i), "rejected": "b"} for i in range(12)]


@pytest.fixture
def failing():
    """What to call with an error for the model "fails" to raise it."""
    textenv.register_reward_model("finishes", length)

    def register(error):
        def fails(prompts, completions, **columns):
            raise error

        textenv.register_reward_model("fails", fails)

    return register


@pytest.mark.parametrize("error", [RuntimeError("out of order"), KeyboardInterrupt()])
def test_a_model_that_fails_leaves_the_reports_of_those_before_it(failing, error, tmp_path):
    failing(error)
    with pytest.raises(type(error)):
        run_all(["finishes", "fails"], RECORDS, tmp_path / "out", CONFIG, compare_to_first=True)
    assert json.loads((tmp_path / "out" / "finishes.json").read_text())["model"] == "finishes"
    assert "finishes" in (tmp_path / "out" / "table.md").read_text()
    assert "finishes" in (tmp_path / "out" / "report.html").read_text()


def test_an_output_that_is_no_folder_is_refused_before_anything_is_scored(failing, tmp_path):
    failing(AssertionError("scored"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output must be a folder, got the file"):
        run_all(["fails"], RECORDS, tmp_path / "file", CONFIG)
