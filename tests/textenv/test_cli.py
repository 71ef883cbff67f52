"""The command line: help is there, each command works on small data, errors are one line."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from textenv.cli import COMMANDS, main
from textenv.data import write_jsonl


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr()


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_explains_itself(capsys, name):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: textenv {name}" in capsys.readouterr().out


def test_no_command_or_an_unknown_one_prints_the_usage(capsys):
    assert run(capsys, "--help")[0] == 0
    assert run(capsys)[0] == 2
    code, printed = run(capsys, "trian")
    assert code == 2
    assert "'trian'" in printed.err


def test_envs_lists_every_id(capsys):
    code, printed = run(capsys, "envs", "--as-json")
    assert code == 0
    ids = {json.loads(line)["id"] for line in printed.out.splitlines()}
    assert {"textenv/Micro-v0", "textenv/Assistant-v0", "textenv/Text-v0"} <= ids


def test_sft_reward_ppo_and_evaluate_work_on_files(capsys, tmp_path, model_folder):
    demonstrations = [{"prompt": "what is the sky ?", "completion": "the sky is blue"}] * 8
    rankings = [{"prompt": "the grass is", "responses": ["green", "red", "blue"], "ranking": [0, 2, 1]}] * 8
    prompts = [{"prompt": "what is the sky ?"}, {"prompt": "the grass is"}]
    for name, records in {"d": demonstrations, "r": rankings, "p": prompts}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", records)
    code, printed = run(
        capsys, "sft", "--model", model_folder, "--data", tmp_path / "d.jsonl", "--output", tmp_path / "sft"
    )
    assert code == 0, printed.err
    AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    code, printed = run(
        capsys, "reward", "--model", tmp_path / "sft", "--data", tmp_path / "r.jsonl", "--output", tmp_path / "rm"
    )
    assert code == 0, printed.err
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    env = ["--env-id", "textenv/Text-v0", "--prompts", tmp_path / "p.jsonl", "--reference", tmp_path / "sft"]
    env += ["--reward-model", tmp_path / "rm", "--max-prompt-tokens", 8, "--max-new-tokens", 6]
    ppo = ["ppo", "--output", tmp_path / "ppo", *env, "--num-envs", 16, "--batch-size", 16]
    assert run(capsys, *ppo, "--total-episodes", 32)[0] == 0
    code, printed = run(capsys, *ppo, "--total-episodes", 48)
    assert code == 2
    assert "--resume" in printed.err
    code, printed = run(capsys, *ppo, "--total-episodes", 48, "--resume")
    assert code == 0, printed.err
    assert json.loads(printed.out)["episodes"] == 48
    code, printed = run(
        capsys, "evaluate", "--model", tmp_path / "ppo", *env, "--best-of", 2, "--output", tmp_path / "answers.jsonl"
    )
    assert code == 0, printed.err
    assert json.loads(printed.out)["rm_score"].keys() == {"mean", "ci95"}
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"prompt": "a",', "line 1: not valid JSON"), ("[1]", "line 1: must be a JSON object"), ("", "at least one")],
)
def test_malformed_data_is_one_line_that_names_file_line_and_reason(capsys, tmp_path, model_folder, line, message):
    (tmp_path / "d.jsonl").write_text(line + "\n")
    code, printed = run(
        capsys, "sft", "--model", model_folder, "--data", tmp_path / "d.jsonl", "--output", tmp_path / "out"
    )
    assert code == 2
    assert message in printed.err
    assert "d.jsonl" in printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()
