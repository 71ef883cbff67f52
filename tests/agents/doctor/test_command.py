"""``textenv doctor``: its output, its exit codes, and what it says to bad input; and the functions behind it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from agents.doctor import Diagnosis, Finding, assert_healthy, diagnose, examine
from agents.doctor.checks import CHECKS, checks_table
from agents.doctor.finding import Check
from tests.conftest import encoder_folder, tiny_model
from textenv.cli import main
from textenv.cli.doctor import show_diagnosis
from textenv.data.records import write_jsonl

HERE = {"PYTHONPATH": str(Path(__file__).parents[3])}

DOCS = Path(__file__).parents[3] / "docs" / "doctor.md"


def run(capsys, *arguments):
    code = main(["doctor", *map(str, arguments)])
    return code, capsys.readouterr()


def test_a_healthy_model_exits_with_0_and_its_notes(capsys, monkeypatch, model_folder):
    monkeypatch.setenv("COLUMNS", "80")
    code, printed = run(capsys, "--model", model_folder)
    assert code == 0
    assert "note  model: pad token" in printed.out
    assert "0 errors, 0 warnings" in printed.out
    assert "not given: demonstrations, preferences, reward model, environment" in " ".join(printed.out.split())
    assert max(map(len, printed.out.splitlines())) <= 80


def test_an_error_exits_with_1_and_stands_first(capsys, tmp_path):
    write_jsonl(
        tmp_path / "data.jsonl", [{"prompt": "the sky", "completion": ""}, {"prompt": "red", "completion": "a"}]
    )
    write_jsonl(tmp_path / "held.jsonl", [{"prompt": "red"}])
    code, printed = run(capsys, "--data", tmp_path / "data.jsonl", "--held-out", tmp_path / "held.jsonl", "--json")
    assert code == 1
    found = json.loads(printed.out)
    assert [(row["level"], row["check"]) for row in found] == [
        ("error", "demonstrations: leakage"),
        ("warning", "demonstrations: empty completions"),
    ]
    assert set(found[0]) == {"check", "level", "what", "why", "remedy"}


def test_data_that_does_not_load_exits_with_1_and_json(capsys, tmp_path):
    (tmp_path / "data.jsonl").write_text("nonsense\n")
    code, printed = run(capsys, "--data", tmp_path / "data.jsonl", "--json")
    assert code == 1
    assert [row["check"] for row in json.loads(printed.out)] == ["data: loading"]
    code, printed = run(capsys, "--data", tmp_path / "gone.jsonl", "--json")
    assert code == 2
    assert not printed.out


def test_text_in_brackets_is_shown_as_it_is():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    finding = Finding("model: x", "error", "got [red]text[/red] and [/]", "since [bold]", "do [i]")
    show_diagnosis(Diagnosis([finding], ("model: x",), {"model: y": "no [/b]"}, ()), console)
    text = console.export_text()
    console.file.close()
    for part in ("got [red]text[/red] and [/]", "since [bold]", "do [i]", "no [/b]"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a part of a set-up must be named"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--reward-model", "no-such-model"], "no-such-model"),
        (["--data", "/no/data.jsonl"], "/no/data.jsonl"),
        (["--env-id", "textenv/Micr-v0"], "Did you mean 'textenv/Micro-v0'?"),
        (["--model", "micro-reference", "--held-out", "/no/held.jsonl"], "/no/held.jsonl"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, message):
    code, printed = run(capsys, *arguments)
    assert code == 2
    assert message in printed.err
    assert printed.err.startswith("textenv doctor: ")
    assert len(printed.err.splitlines()) == 1


def without_eos(folder: Path) -> Path:
    tiny_model().save_pretrained(folder)
    core = Tokenizer(models.WordLevel({"red": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(folder)
    return folder


def test_a_folder_that_cannot_be_loaded_is_a_finding_and_the_rest_goes_on(tmp_path):
    write_jsonl(tmp_path / "data.jsonl", [{"prompt": "red", "completion": "red"}])
    diagnosis = diagnose(model=str(without_eos(tmp_path / "lm")), data=[tmp_path / "data.jsonl"])
    [finding] = diagnosis.findings
    assert (finding.check, finding.level) == ("model: loading", "error")
    assert "must have an EOS token" in finding.what
    assert "demonstrations: duplicates" in diagnosis.ran
    assert diagnosis.skipped["demonstrations: endings"] == "no model was given"


def test_an_encoder_is_no_language_model(tmp_path):
    folder = encoder_folder("roberta", tmp_path / "encoder")
    [finding] = examine(model=str(folder))
    assert finding.check == "model: loading"
    assert "lm_head" in finding.what
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the missing head is drawn at random
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    errors = {finding.check: finding.what for finding in examine(model=str(folder)) if finding.level == "error"}
    assert "from those before it alone" in errors["model: cache"]


def test_a_broken_reward_model_folder_is_a_finding(tmp_path):
    (tmp_path / "rm").mkdir()
    [finding] = examine(reward_model=str(tmp_path / "rm"))
    assert (finding.check, finding.level) == ("reward model: loading", "error")


def test_a_check_that_crashes_is_an_error_of_its_own(monkeypatch, model_folder):
    def crash(part):
        """Never."""
        yield from []
        raise ZeroDivisionError("by design")

    monkeypatch.setitem(CHECKS["model"], "crash", Check(crash, "", ""))
    diagnosis = diagnose(model=str(model_folder))
    assert diagnosis.findings[0][:3] == ("model: crash", "error", "the check broke off: ZeroDivisionError: by design")
    assert "model: sampler" in diagnosis.ran


def test_model_reward_model_and_data_make_an_environment(tmp_path, model_folder):
    records = [{"prompt": prompt, "chosen": "the sky", "rejected": "not red"} for prompt in ("what is", "the grass")]
    write_jsonl(tmp_path / "data.jsonl", records)
    options = {"model": str(model_folder), "reward_model": {"rule": "length", "score": 1.0}}
    diagnosis = diagnose(**options, data=[tmp_path / "data.jsonl"])
    assert {"environment: reward", "environment: cost", "reward model: prompt", "model: joint tokens"} <= {
        *diagnosis.ran
    }
    assert "reward model: prompt" in [finding.check for finding in diagnosis.findings if finding.level == "warning"]


def test_findings_of_several_files_name_theirs(tmp_path):
    for name in ("one", "two"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "red", "completion": "" if name == "two" else "blue"}])
    [finding] = examine(data=[tmp_path / "one.jsonl", tmp_path / "two.jsonl"])
    assert finding.what.startswith(str(tmp_path / "two.jsonl"))


def test_a_model_and_a_callable_in_memory_are_examined():
    diagnosis = diagnose(model=tiny_model(), reward_model=lambda prompts, completions: [1.0] * len(prompts))
    assert "reward model: prompt" in [finding.check for finding in diagnosis.findings]
    assert diagnosis.absent == ("demonstrations", "preferences", "environment")


def test_a_test_of_ones_own_fails_with_errors_and_warnings(tmp_path, model_folder):
    assert_healthy(model=str(model_folder))
    write_jsonl(tmp_path / "data.jsonl", [{"prompt": "red", "completion": ""}])
    with pytest.raises(AssertionError, match=r"warning: demonstrations: empty completions: 1 of 1 .*Drop these"):
        assert_healthy(data=[tmp_path / "data.jsonl"])


def test_the_fixture_fails_a_test_with_the_findings_alone(model_folder, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n' * 2)
    (tmp_path / "test_it.py").write_text(
        f"def test_well(healthy):\n    healthy(model={str(model_folder)!r})\n\n"
        "def test_ill(healthy):\n    healthy(data=['data.jsonl'])\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "agents.doctor.pytest_plugin", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | HERE)
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "data.jsonl" in done.stdout
    assert "pytest_plugin.py" not in done.stdout


def test_importing_the_doctor_loads_neither_torch_nor_transformers():
    code = "import sys, agents.doctor; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("part", list(CHECKS))
def test_the_documents_list_every_check(part):
    assert checks_table(part) in DOCS.read_text("utf-8")
