"""The demo in miniature: every step runs, leaves its files, can be interrupted and continued."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from agents.demo.judge import assistant_env
from agents.demo.run import TITLES, DemoConfig, distinct, run_demo, smoke_config
from agents.demo.steps import StepRun
from agents.ppo import PPO
from reward_models.preferences import load_rankings
from textenv.tasks.assistant import questions as assistant

QUIET = Console(quiet=True)


def miniature(folder, **changes) -> DemoConfig:
    return replace(smoke_config(DemoConfig(output=folder, seed=3, eval_split="validation")), **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run_demo(miniature(folder), QUIET)


def test_the_summary_has_every_figure_of_every_stage(finished):
    _, summary = finished
    for stage in ("base", "sft", "best_of_4", "ppo"):
        figures = summary[stage]
        for name in ("gold_score", "rm_score"):
            assert figures[name].keys() == {"mean", "ci95"}
        for name in ("helpful_rate", "harmful_compliance_rate", "over_refusal_rate", "tone_rate", "eos_rate"):
            assert 0 <= figures[name] <= 1
        assert 1 <= figures["response_tokens"] <= 24
    assert summary["base"]["kl"]["mean"] > 0
    assert summary["sft"]["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert summary["best_of_4"]["kl"] is None
    assert summary["best_of_4"]["kl_bound"] == pytest.approx(0.6363, abs=1e-4)  # log 4 − 3/4
    assert summary["best_of_4"]["rm_score"]["mean"] > summary["sft"]["rm_score"]["mean"]
    beta = summary["config"]["kl_coef"]
    for stage in ("base", "sft", "ppo"):
        score, kl, objective = (summary[stage][key]["mean"] for key in ("rm_score", "kl", "reward"))
        assert objective == pytest.approx(score - beta * kl, abs=1e-5)
    bounds, chosen = summary["bounds"], summary["best_of_4"]
    assert chosen["reward"] is None
    assert chosen["reward_bound"] == pytest.approx(chosen["rm_score"]["mean"] - beta * 0.6363, abs=1e-4)
    assert bounds["reference"] == pytest.approx(summary["sft"]["reward"]["mean"], abs=0.1)  # other samples of SFT
    assert bounds["optimum"] > bounds["reference"]
    assert summary["reward_model"].keys() >= {"accuracy", "bayes_accuracy", "nll", "nll_floor"}
    assert summary["seconds"].keys() == set(TITLES)
    assert summary["seed"] == 3
    assert summary["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_the_run_folder_holds_plain_models_data_and_a_self_contained_report(finished):
    folder, summary = finished
    AutoModelForCausalLM.from_pretrained(folder / "base")
    AutoModelForCausalLM.from_pretrained(folder / "sft")
    AutoModelForSequenceClassification.from_pretrained(folder / "reward_model")
    AutoModelForCausalLM.from_pretrained(folder / "ppo" / "policy")
    page = (folder / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (folder / "data" / "demonstrations.jsonl").is_file()
    for part in ("train", "held-out"):
        for line in (folder / "data" / f"rankings-{part}.jsonl").read_text().splitlines():
            record = json.loads(line)
            assert sorted(record["ranking"]) == list(range(len(record["responses"])))
            assert len(set(record["responses"])) == len(record["responses"])
    ended = [summary[stage]["eos_rate"] * 4 * 64 for stage in ("base", "sft", "ppo")]  # 64 prompts, 4 answers
    assert ended == pytest.approx(np.round(ended))
    held_out = load_rankings(folder / "data" / "rankings-held-out.jsonl")
    asked = {record["prompt"] for record in assistant.validation_prompts()[:64]}
    assert {ranking.prompt for ranking in held_out} <= asked
    samples = json.loads((folder / "samples.json").read_text())
    assert [sample["title"] for sample in samples] == ["Helpful", "Harmful", "Requested tone"]


def test_an_interrupted_run_continues_to_the_same_result(finished, tmp_path, monkeypatch):
    whole, _ = finished
    config = miniature(tmp_path / "run")
    learn = PPO.update

    def interrupted(self, rollout):
        if len(self.history) == 1:
            raise KeyboardInterrupt
        return learn(self, rollout)

    monkeypatch.setattr(PPO, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(config, QUIET)
    monkeypatch.undo()
    done = json.loads((tmp_path / "run" / "progress.json").read_text())["seconds"]
    assert set(done) == {"base", "sft", "rankings", "reward_model"}
    before = (tmp_path / "run" / "base" / "model.safetensors").stat().st_mtime_ns
    run_demo(config, QUIET)
    assert (tmp_path / "run" / "base" / "model.safetensors").stat().st_mtime_ns == before
    one, other = (AutoModelForCausalLM.from_pretrained(f / "ppo" / "policy") for f in (whole, tmp_path / "run"))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_first_prompts_of_a_part_have_a_slot_each():
    env = assistant_env("validation", 3)
    assert env.num_envs == 3
    assert list(env.task.prompts.prompts) == [record["prompt"] for record in assistant.validation_prompts()[:3]]
    assert (assistant_env("train").num_envs, assistant_env("train", num_envs=5).num_envs) == (256, 5)


def test_equal_answers_are_merged_at_their_better_rank():
    record = {"prompt": "p", "responses": ["a", "b", "a", "c"], "ranking": [1, 2, 3, 0]}
    assert distinct(record, [1.0, 2.0, 1.0, 3.0]) == {
        "prompt": "p",
        "responses": ["a", "b", "c"],
        "ranking": [1, 0, 2],
        "gold": [1.0, 2.0, 3.0],
    }


def test_bad_settings_are_refused():
    for bad, message in [
        ({"eval_split": "train"}, "eval_split"),
        ({"rankings": 0}, "rankings"),
        ({"responses_per_prompt": 1}, "responses_per_prompt"),
        ({"eval_prompts": 513}, "eval_prompts must be between 1 and 512, got 513"),
    ]:
        with pytest.raises(ValueError, match=message):
            DemoConfig(**bad)


def test_a_run_folder_with_other_files_or_other_settings_is_refused_and_left_as_it_is(tmp_path):
    thesis = tmp_path / "ppo" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(ValueError, match="Nothing was removed"):
        StepRun(DemoConfig(output=tmp_path), TITLES, Console(quiet=True))
    assert thesis.read_text() == "years of work"

    StepRun(DemoConfig(output=tmp_path / "run", seed=1), TITLES, Console(quiet=True))
    model = tmp_path / "run" / "sft" / "model.safetensors"
    model.parent.mkdir()
    model.write_text("weights")
    with pytest.raises(ValueError, match="a run with others"):
        StepRun(DemoConfig(output=tmp_path / "run", seed=2), TITLES, Console(quiet=True))
    assert model.read_text() == "weights"
    StepRun(DemoConfig(output=tmp_path / "run", seed=1), TITLES, Console(quiet=True))


def test_a_run_folder_that_cannot_be_made_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output must be a writable folder, got '.*file/run'"):
        StepRun(DemoConfig(output=tmp_path / "file" / "run"), TITLES, Console(quiet=True))


@pytest.mark.timeout(300)
def test_a_person_ranks_in_a_browser_and_the_demo_goes_on(tmp_path, monkeypatch):
    """A program at the page ranks the shortest answer first; a stop in the middle loses nothing."""
    from tests.agents.demo.person import rank_shortest_first

    monkeypatch.setattr("webbrowser.open", lambda link: rank_shortest_first(link, 3))
    config = miniature(tmp_path / "human", human=6, ppo_updates=1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    with pytest.raises(KeyboardInterrupt):
        run_demo(config, QUIET)
    signal.signal(signal.SIGINT, before)
    monkeypatch.setattr("webbrowser.open", lambda link: rank_shortest_first(link, 100))
    summary = run_demo(config, QUIET)
    rankings = load_rankings(config.output / "data" / "rankings-train.jsonl")
    assert 4 <= len(rankings) <= 6
    assert all(list(map(len, r.responses)) == sorted(map(len, r.responses)) for r in rankings)
    assert summary["ppo"]["rm_score"]
