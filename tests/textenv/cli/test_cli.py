"""The command line: help is there, each command works on small data, errors are one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import pandas
import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import textenv
from tests.shell import run
from textenv import registry
from textenv.cli import COMMANDS, Command, main
from textenv.cli.common import show
from textenv.data.records import write_jsonl
from textenv.pages.terminal import shorten
from textenv.stats import Mean


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
    assert "command must be one of the above, got 'trian'" in printed.err
    for arguments, got in ((("feedback", "import"), "'import'"), (("feedback",), "''"), (("feedback", "--k"), "'--k'")):
        code, printed = run(capsys, *arguments)
        assert code == 2
        assert f"the command of feedback must be one of demo, create, serve, arena, export, got {got}" in printed.err
    assert run(capsys, "feedback", "--help")[0] == 0


def test_envs_lists_every_id(capsys):
    code, printed = run(capsys, "envs", "--json")
    assert code == 0
    ids = {json.loads(line)["id"] for line in printed.out.splitlines()}
    assert {"textenv/Micro-v0", "textenv/Assistant-v0", "textenv/Text-v0"} <= ids


def test_envs_tells_what_an_id_is_made_of_and_a_question_mark_where_only_loading_tells(capsys):
    registry.clear_cache()
    code, printed = run(capsys, "envs")
    text = " ".join(printed.out.split())
    assert code == 0
    assert "textenv/Assistant-v0 Embedded world" in text
    assert "vocabulary 190, prompt + response ≤ 19 + 24 tokens, β 0.2" in text
    assert "prompts assistant-train, reference assistant-sft, reward model assistant-rm" in text
    assert "vocabulary ?, prompt + response ≤ 4 + 4 tokens" in text
    assert "? only loading the reference tells its vocabulary: --load" in text
    assert "prompts yours, reference yours, reward model yours" in text
    loaded = " ".join(run(capsys, "envs", "--load")[1].out.split())
    assert "vocabulary 8, prompt" in loaded
    assert loaded.count("a turn ends at <eos>") >= 2


@pytest.fixture
def experiment(tmp_path, model_folder):
    (tmp_path / "p.jsonl").write_text('{"prompt": "what is the sky ?"}\n')
    (tmp_path / "exp.yaml").write_text(
        "environments:\n"
        f"  cli/Mine-v0: {{prompts: ./p.jsonl, reference: {model_folder}, reward_model: micro-gold,\n"
        "                max_prompt_tokens: 7, max_new_tokens: 5, description: 'mine [own]'}\n"
        "  cli/Gone-v0: {prompts: ./p.jsonl, reference: org/gone, reward_model: micro-gold,\n"
        "                max_prompt_tokens: 7, max_new_tokens: 5}\n"
    )
    yield tmp_path / "exp.yaml"
    for env_id in ("cli/Mine-v0", "cli/Gone-v0"):
        gymnasium.registry.pop(env_id, None)
        registry.ids._descriptions.pop(env_id, None)


def test_envs_and_check_take_an_experiment_file(capsys, experiment):
    code, printed = run(capsys, "envs", "--experiment", experiment)
    assert code == 0
    text = " ".join(printed.out.split())
    assert "cli/Mine-v0 mine [own] vocabulary 12, prompt + response ≤ 7 + 5 tokens, β 0.05; prompts p.jsonl" in text
    assert "cli/Gone-v0 vocabulary ?" in text
    code, printed = run(capsys, "check", "cli/Mine-v0", "--experiment", experiment, "--option", "kl_coef=0.3")
    assert code == 0, printed.out
    assert "cli/Mine-v0: all checks passed" in printed.out
    assert "FAILED" not in printed.out
    assert "a turn ends at <eos>" in printed.out


def test_check_takes_options_as_json_or_text_and_exits_with_one_on_a_failure(capsys, text_options):
    options = [f"--option={name}={json.dumps(value)}" for name, value in text_options.items() if name != "reward_model"]
    arguments = ["check", "textenv/Text-v0", *options, "--option", "reward_model=colour", "--option", "obs_mode=tokens"]
    assert run(capsys, *arguments)[0] == 0
    textenv.register_reward_model("batchy", lambda prompts, completions: [float(len(prompts))] * len(prompts))
    code, printed = run(capsys, *arguments, "--option", "reward_model=batchy")
    assert code == 1
    assert "FAILED play" in " ".join(printed.out.split())
    assert "textenv/Text-v0: 4 of 16 checks failed" in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "textenv/Micr-v0"], r"got 'textenv/Micr-v0'. Did you mean 'textenv/Micro-v0'?"),
        (["check", "no_such_module:textenv/Micro-v0"], "No module named 'no_such_module'"),
        (
            ["check", "textenv/Micro-v0", "--option", "kl_coef"],
            "option must be NAME=VALUE, got 'kl_coef'",
        ),
        (["envs", "--experiment", "/no/exp.yaml"], "must be a YAML file, got '/no/exp.yaml'"),
        (["evaluate", "--model", "micro-reference", "--env-id", "textenv/Micr-v0"], "Micr"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_two(capsys, arguments, message):
    code, printed = run(capsys, *arguments)
    assert code == 2
    assert message in printed.err
    assert "Traceback" not in printed.err


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
    code, printed = run(capsys, *ppo, "--total-episodes", 48, "--resume", "--json")
    assert code == 0, printed.err
    assert json.loads(printed.out)["episodes"] == 48
    answer = ["evaluate", "--model", tmp_path / "ppo", *env, "--best-of", 2, "--output", tmp_path / "answers.jsonl"]
    code, printed = run(capsys, *answer)
    assert code == 0, printed.err
    assert re.search(r"^rm score +-?[\d.]+ ± [\d.]+$", printed.out, re.MULTILINE)
    assert max(map(len, printed.out.splitlines())) <= 80
    assert json.loads(run(capsys, *answer, "--json")[1].out)["rm_score"].keys() == {"mean", "ci95"}
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("kind", ["csv", "json", "parquet", "folder"])
def test_sft_and_prompts_read_every_kind_of_file(capsys, tmp_path, model_folder, kind):
    rows = [{"prompt": "what is the sky ?", "completion": "the sky is blue"}] * 4
    table, path = pandas.DataFrame(rows), tmp_path / f"d.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "folder":
        path.mkdir()
        table.to_parquet(path / "train.parquet")
    else:
        getattr(table, f"to_{kind}")(path, index=False)
    code, printed = run(capsys, "sft", "--model", model_folder, "--data", path, "--output", tmp_path / "sft", "--json")
    assert code == 0, printed.err
    assert json.loads(printed.out)["tokens"] == 4 * 5  # "the sky is blue" and the ending token
    env = ["--env-id", "textenv/Text-v0", "--prompts", path, "--reference", model_folder, "--max-prompt-tokens", 8]
    answer = [
        "evaluate",
        "--model",
        model_folder,
        *env,
        "--reward-model",
        "micro-gold",
        "--max-new-tokens",
        4,
        "--json",
    ]
    code, printed = run(capsys, *answer)
    assert code == 0, printed.err
    assert json.loads(printed.out)["episodes"] == 4


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("ppo", [], "clipped surrogate"),
        ("rloo", ["--group-size", 2], "leave-one-out"),
        ("grpo", ["--group-size", 8, "--no-normalize-std"], "Group-relative"),
        ("reinforce", ["--value-coef", 0.5], "value function as its baseline"),
        ("online-dpo", ["--group-size", 2, "--no-soft-labels"], "pairs of the policy's own responses"),
    ],
)
def test_each_learner_is_a_command_that_trains_resumes_and_knows_its_own_checkpoints(
    capsys, tmp_path, model_folder, name, flags, says
):
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "what is the sky ?"}, {"prompt": "the grass is"}])
    env = ["--env-id", "textenv/Text-v0", "--prompts", tmp_path / "p.jsonl", "--reference", model_folder]
    env += ["--reward-model", "micro-gold", "--max-prompt-tokens", 8, "--max-new-tokens", 6]
    options = ["--output", tmp_path / "out", *env, "--num-envs", 16, "--batch-size", 16]
    assert run(capsys, name, *options, *flags, "--total-episodes", 16)[0] == 0
    state = json.loads((tmp_path / "out" / "state.json").read_text())
    set_to = dict(zip(flags[::2], flags[1::2], strict=False))
    assert state["config"]["group_size"] == set_to.get("--group-size", 1)
    assert state["config"].get("value_coef", 0.1) == set_to.get("--value-coef", 0.1)
    assert state["config"].get("normalize_std", False) is False
    code, printed = run(capsys, name, *options, *flags, "--total-episodes", 32, "--resume")
    assert code == 0, printed.err
    assert re.search(r"^episodes +32$", printed.out, re.MULTILINE)
    other = "rloo" if name == "grpo" else "grpo"
    code, printed = run(capsys, other, *options, "--total-episodes", 48, "--resume")
    assert code == 2
    assert "it was written by " in printed.err
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert says in capsys.readouterr().out


def test_one_command_line_starts_continues_and_prolongs_a_run(capsys, tmp_path):
    """As a job that is put back into the queue gives it; the preset's rate falls over the longer run."""
    ppo = ["ppo", "--env-id", "textenv/Micro-v0", "--num-envs", 8, "--batch-size", 8, "--output", tmp_path / "run"]
    code, printed = run(capsys, *ppo, "--total-episodes", 8, "--resume")
    assert code == 0, printed.err
    assert "PPO, preset micro" in printed.err
    code, printed = run(capsys, *ppo, "--total-episodes", 16, "--resume")
    assert code == 0, printed.err
    assert "PPO, continued" in printed.err
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "run/curves.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([7e-4, 7e-4 / 2])
    code, printed = run(capsys, *ppo, "--total-episodes", 16, "--learning-rate", 1e-2, "--resume")
    assert code == 2
    assert "must be resumed with the learning_rate it started with, 0.0007, got 0.01" in printed.err


def test_a_training_shows_texts_and_what_the_objective_could_be(capsys, tmp_path):
    """The estimate of the optimum draws nothing of what the training draws. On Micro it is 0.50 (docs/worlds.md)."""
    ppo = ["ppo", "--env-id", "textenv/Micro-v0", "--num-envs", 8, "--batch-size", 8, "--total-episodes", 24]
    code, printed = run(capsys, *ppo, "--output", tmp_path / "run", "--optimum-samples", 2000, "--sample-every", 3)
    assert code == 0, printed.err
    assert re.search(r"objective \(reference 0\.\d+, optimum ≈ 0\.(49|5)\d*\)", printed.err)
    tables = re.findall(r"^update (\d+)\nprompt +response +objective +score +KL *$", printed.err, re.MULTILINE)
    assert tables == ["1", "3"]
    code, printed = run(capsys, *ppo, "--output", tmp_path / "plain")
    assert code == 0
    assert "objective (began at " in printed.err
    first, second = ((tmp_path / name / "policy/model.safetensors").read_bytes() for name in ("run", "plain"))
    assert first == second
    free = [*ppo, "--output", tmp_path / "free", "--kl-coef", 0, "--optimum-samples", 8]
    code, printed = run(capsys, *free)
    assert code == 2
    assert "optimum_samples must be 0 without a KL penalty, got 8. Raise kl_coef." in printed.err
    assert not (tmp_path / "free").exists()
    for flags, message in (
        (["--optimum-samples", 1], "optimum_samples must be"),
        (["--optimum-samples", 8, "--kl-target", 1.0], "must be 0 with a kl_target"),
    ):
        code, printed = run(capsys, *ppo, "--output", tmp_path / "wrong", *flags)
        assert code == 2
        assert message in printed.err
        assert not (tmp_path / "wrong").exists()


def test_the_texts_of_a_model_do_not_control_the_terminal():
    assert shorten("a\x1b[2J b\n\nc") == "a␛[2J b c"
    assert shorten("x" * 100 + "y" * 100, 20) == f"{'x' * 10} … {'y' * 10}"


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


def test_a_finished_model_is_not_trained_over(capsys, tmp_path, model_folder):
    write_jsonl(
        tmp_path / "r.jsonl", [{"prompt": "the grass is", "responses": ["green", "red"], "ranking": [0, 1]}] * 4
    )
    reward = ["reward", "--model", model_folder, "--data", tmp_path / "r.jsonl", "--output", tmp_path / "rm"]
    assert run(capsys, *reward)[0] == 0
    weights = (tmp_path / "rm" / "model.safetensors").read_bytes()
    for flags in ([], ["--resume"]):
        code, printed = run(capsys, *reward, *flags, "--learning-rate", 1e-2)
        assert code == 2
        assert "must hold no finished model" in printed.err
    assert (tmp_path / "rm" / "model.safetensors").read_bytes() == weights


def test_a_callable_is_found_in_the_folder_where_the_command_is_called(tmp_path):
    """As the installed command does it, whose path does not start with that folder."""
    (tmp_path / "my_rules.py").write_text(
        "def short(prompts, completions):\n    return [-len(c) for c in completions]\n"
    )
    write_jsonl(tmp_path / "d.jsonl", [{"prompt": f"p{i}", "chosen": "a", "rejected": "bb"} for i in range(12)])
    command = Path(sys.executable).with_name("textenv")
    done = subprocess.run(
        [command, "rm-bench", "my_rules:short", "--data", "d.jsonl"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "my_rules:short" in done.stdout


def test_what_the_system_refuses_is_one_line(capsys, tmp_path, model_folder):
    write_jsonl(
        tmp_path / "r.jsonl", [{"prompt": "the grass is", "responses": ["green", "red"], "ranking": [0, 1]}] * 4
    )
    (tmp_path / "file").write_text("")
    code, printed = run(
        capsys, "reward", "--model", model_folder, "--data", tmp_path / "r.jsonl", "--output", tmp_path / "file" / "rm"
    )
    assert code == 2
    assert str(tmp_path / "file") in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("command", "says"),
    [("reward", "with --resume continues"), ("demo", "The same command continues"), ("envs", "stopped.")],
)
def test_ctrl_c_says_how_to_go_on_where_that_is_possible(capsys, monkeypatch, command, says):
    def stop(self, name, arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Command, "load", stop)
    code, printed = run(capsys, command)
    assert code == 130
    assert says in printed.err
    assert ("--resume" in printed.err) is (command == "reward")


def test_figures_have_four_digits_in_a_table_and_all_of_them_in_json(capsys):
    figures = {"kl": 0.123456789, "tokens": 123456.7, "episodes": 32.0, "gold": Mean(-1.23456, 0.0123), "none": None}
    show(figures, as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        "kl        0.1235",
        "tokens    123,457",
        "episodes  32",
        "gold      -1.235 ± 0.012",
        "none      –",
    ]
    show(figures, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["kl"] == 0.123456789
    assert printed["gold"] == {"mean": -1.23456, "ci95": 0.0123}


def test_a_command_imports_only_its_own_file():
    code = (
        "import sys\n"
        "from textenv.cli import main\n"
        "assert 'rich' not in sys.modules\n"
        "assert main(['envs']) == 0\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "transformers", "datasets", "scipy", "matplotlib", "stable_baselines3"}
    assert {name for name in loaded if name.startswith("textenv.cli.")} == {"textenv.cli.envs"}


def test_the_version_is_printed(capsys):
    assert run(capsys, "--version") == (0, (f"textenv {textenv.__version__}\n", ""))


@pytest.mark.parametrize("arguments", [["envs"], ["reward", "--help"]])
def test_a_reader_that_has_seen_enough_is_no_error(arguments):
    """As after ``| head``: one command has all its output in a buffer, the other cannot write it all."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "textenv", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
