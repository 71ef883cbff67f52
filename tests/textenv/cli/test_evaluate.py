"""``textenv evaluate``: how far a model has come, and several models on the same prompts."""

import json
import re

import pandas
import pytest

import textenv
from tests.conftest import tiny_model
from tests.shell import run
from textenv import registry


def test_evaluate_says_how_far_a_model_has_come(capsys):
    reference = ["evaluate", "--model", "micro-reference", "--env-id", "textenv/Micro-v0", "--json"]
    code, printed = run(capsys, *reference, "--optimum-samples", 200)
    found = json.loads(printed.out)
    assert code == 0
    assert found["optimum_ci95"][0] < found["optimum"] < found["optimum_ci95"][1]
    way = found["optimum"] - found["reference_reward"]["mean"]
    assert found["share_of_the_way"] == pytest.approx(
        (found["reward"]["mean"] - found["reference_reward"]["mean"]) / way
    )
    _, printed = run(capsys, *reference, "--best-of", 4)
    found = json.loads(printed.out)
    assert found["reward"] == found["rm_score"]  # the KL of chosen answers is unknown: none is charged
    assert "kl" not in found


def test_several_models_answer_the_same_prompts_and_are_compared(capsys, tmp_path):
    names = ["micro-reference", str(tmp_path / "ppo"), str(tmp_path / "ppo" / "policy")]
    env = ["--env-id", "textenv/Micro-v0"]
    small = ["--total-episodes", 16, "--num-envs", 8, "--batch-size", 8]
    assert run(capsys, "ppo", *env, "--output", names[1], *small)[0] == 0
    compare = ["evaluate", *names, *env, "--output", tmp_path / "a.jsonl", "--page", tmp_path / "page"]
    code, printed = run(capsys, *compare, "--page-prompts", 2, "--json")
    assert code == 0, printed.err
    found, lines = json.loads(printed.out), pandas.read_json(tmp_path / "a.jsonl", lines=True)
    assert list(found) == names
    assert lines.model.tolist() == [name for name in names for _ in range(6)]
    rewards = lines.rewards.to_numpy().reshape(3, 6)
    assert [found[name]["reward"]["mean"] for name in names] == pytest.approx(rewards.mean(1).tolist())
    for name in names[1:]:  # one policy under two names
        assert found[name]["gain"]["mean"] == pytest.approx((rewards[1] - rewards[0]).mean())
    assert "gain" not in found[names[0]]
    page = (tmp_path / "page" / "report.html").read_text("utf-8")
    assert page.count("<article>") == 2
    assert "micro-reference: no value and advantage" in page
    assert f"{names[1]}: no value" not in page
    code, printed = run(capsys, "evaluate", "--model", *names, *env)  # the first by its flag
    assert code == 0, printed.err
    assert re.search(r"^gain +(– +)?-?[\d.]+ ± ", printed.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "models must be one or several different ones, got []"),
        (["micro-reference", "micro-reference"], "Name each once"),
        (["micro-reference", "assistant-sft"], "of 8 tokens, got 190 in 'assistant-sft'"),
        (["micro-reference", "a", "--sampler-url", "http://127.0.0.1:1"], "a server holds one model, got 2"),
        (["micro-reference", "--page", "/proc/out"], "output must be"),
        (["micro-reference", "--page-prompts", "0"], "page_prompts must be"),
        (["micro-reference", "gone"], "got 'gone'"),
    ],
)
def test_models_that_cannot_be_compared_are_one_line(capsys, arguments, says):
    code, printed = run(capsys, "evaluate", *arguments, "--env-id", "textenv/Micro-v0")
    assert code == 2
    assert says in printed.err
    assert (printed.err.count("\n"), printed.out) == (1, "")


def test_another_vocabulary_is_refused_before_any_model_answers(capsys, monkeypatch):
    textenv.register_language_model("cli-twelve", tiny_model)
    assert registry.vocabulary_size("cli-twelve") is None  # only loading it tells
    monkeypatch.setattr("textenv.cli.answers.evaluate.evaluate_agent", None)
    code, printed = run(capsys, "evaluate", "micro-reference", "cli-twelve", "--env-id", "textenv/Micro-v0")
    assert code == 2
    assert "must have the reference's vocabulary of 8 tokens, got 12 in 'cli-twelve'" in printed.err


def test_a_page_takes_the_place_of_an_earlier_one_and_of_nothing_else(capsys, tmp_path):
    command = ["evaluate", "micro-reference", "--env-id", "textenv/Micro-v0", "--page", tmp_path, "--seed"]
    page = tmp_path / "report.html"
    page.write_text("mine")
    code, printed = run(capsys, *command, 1)
    assert code == 2
    assert f"page must be a folder without a report of others, got '{tmp_path}' with report.html" in printed.err
    assert page.read_text() == "mine"
    page.unlink()
    for seed in (1, 2):
        code, printed = run(capsys, *command, seed)
        assert code == 0, printed.err
        assert f"seed {seed}" in page.read_text("utf-8")
