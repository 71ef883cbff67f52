"""The run in miniature, on the small assistant: every step leaves its files, and can be interrupted and continued."""

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import textenv
from agents.core.agent import LanguageModelAgent
from agents.demo.report import summary_table
from agents.ppo import PPO, PPOConfig
from agents.rlhf import measure
from agents.rlhf.measure import distinct, perplexity, warnings
from agents.rlhf.run import TITLES, RLHFConfig, run_rlhf, train_demonstrations, train_rewards
from agents.sft import SFTConfig
from reward_models.scorers.transformer import load_reward_model
from reward_models.training.trainer import RewardConfig
from tests.hub_server import HubServer
from textenv.data.records import write_jsonl
from textenv.evaluation import Evaluation, evaluate
from textenv.tasks import assistant
from textenv.vector import make_vec

QUIET = Console(quiet=True)
POLITE = '{"rule": "regex", "pattern": "please|thank"}'


@pytest.fixture(scope="module")
def preferences(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    texts = [prompt.text for prompt in assistant.prompts("train")[:120]]
    answers = [(f"you can fix it with a cloth .{' please' * (i % 2)}", "no .") for i in range(len(texts))]
    write_jsonl(path, assistant.sample_rankings(texts, answers, 0))
    return str(path)


def miniature(data, folder, **changes) -> RLHFConfig:
    config = RLHFConfig(
        model="assistant-sft",
        preferences=data,
        output=folder,
        judge=POLITE,
        seed=3,
        demonstrations=16,
        max_prompt_tokens=24,
        max_new_tokens=24,
        ppo_updates=2,
        eval_samples=1,
        optimum_samples=4,
        sft=SFTConfig(learning_rate=1e-4, batch_size=8),
        reward=RewardConfig(learning_rate=1e-2, freeze_trunk=True, epochs=2),
        ppo=PPOConfig(batch_size=16, epochs=1, minibatches=2, learning_rate=1e-3, lora_rank=4),
    )
    return replace(config, **changes)


def prompts_of(path) -> set[str]:
    return {json.loads(line)["prompt"] for line in path.read_text("utf-8").splitlines()}


def answers_of(folder) -> list[dict]:
    """The answers that the page shows, each with its prompt."""
    samples = json.loads((folder / "samples.json").read_text())
    return [answer | {"prompt": sample["prompt"]} for sample in samples for answer in sample["answers"]]


def polite(answers) -> list[float]:
    """What the judge says of answers."""
    return [float("please" in answer["text"] or "thank" in answer["text"]) for answer in answers]


@pytest.fixture(scope="module")
def finished(preferences, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run_rlhf(miniature(preferences, folder), QUIET)


def test_the_summary_has_every_figure_of_every_stage(finished):
    _, summary = finished
    assert summary["seconds"].keys() == set(TITLES)
    for stage in ("base", "sft", "ppo"):
        figures = summary[stage]
        for name in ("reward", "rm_score", "gold_score", "kl", "response_tokens"):
            assert figures[name].keys() == {"mean", "ci95"}
        assert 1 < figures["perplexity"] < 1_000
        assert 0 < figures["distinct_1"] < figures["distinct_2"] <= 1
        score, kl, objective = (figures[key]["mean"] for key in ("rm_score", "kl", "reward"))
        assert objective == pytest.approx(score - 0.1 * kl, abs=1e-5)
    assert summary["sft"]["kl"]["mean"] == pytest.approx(0, abs=1e-5)
    assert summary["ppo"]["kl"]["mean"] != 0
    assert summary["reward_model"]["accuracy"] > 0.5
    assert set(summary["gains"]) == {"rm_scores", "gold"}
    bounds = summary["bounds"]
    assert bounds["reference"] == pytest.approx(summary["sft"]["reward"]["mean"], abs=0.5)  # other samples of SFT
    assert bounds["optimum"] > bounds["reference"]
    json.dumps(summary)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(summary_table(summary))
    text = console.export_text()
    assert "PPO" in text
    assert "Bayes" not in text


def test_the_folder_holds_plain_models_and_a_page_of_this_kind_of_run(finished):
    folder, _ = finished
    for name in ("sft", "ppo/policy"):
        AutoModelForCausalLM.from_pretrained(folder / name)
    for name in ("sft", "reward_model", "ppo/policy"):
        card = (folder / name / "README.md").read_text("utf-8")
        assert "learning_rate" in card
        assert ("accuracy" if name == "reward_model" else "gold_score") in card
        assert str(folder) not in card
    page = (folder / "report.html").read_text("utf-8")
    assert "optimum ≥" in page or "optimum ≈" in page
    for text in ("Judge&#39;s score", "Perplexity under SFT", "Distinct pairs of words", "model: assistant-sft"):
        assert text in page
    for text in ("Bayes", "Gold", "gold", "Best of", "Over-optimisation:"):
        assert text not in page.replace("gold_", "").partition("<details>")[0]
    samples = json.loads((folder / "samples.json").read_text())
    assert [answer["stage"] for answer in samples[0]["answers"]] == ["base", "sft", "ppo"]


def test_no_prompt_is_trained_and_measured_on(finished):
    folder, _ = finished
    parts = {
        name: prompts_of(folder / "data" / f"prompts-{name}.jsonl") for name in ("train", "validation", "held-out")
    }
    assert sum(map(len, parts.values())) == len(set().union(*parts.values()))
    demonstrations = prompts_of(folder / "data" / "demonstrations.jsonl")
    assert demonstrations <= parts["train"]


def test_an_interrupted_run_continues_to_the_same_result(finished, preferences, tmp_path, monkeypatch):
    whole, _ = finished
    config, learn = miniature(preferences, tmp_path / "run"), PPO.update

    def stopped(self, rollout):
        if self.episodes >= 16:
            raise KeyboardInterrupt
        return learn(self, rollout)

    monkeypatch.setattr(PPO, "update", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_rlhf(config, QUIET)
    assert not (config.output / "summary.json").exists()
    monkeypatch.setattr(PPO, "update", learn)
    run_rlhf(config, QUIET)
    before, after = (json.loads((folder / "samples.json").read_text()) for folder in (whole, config.output))
    assert before == after


def test_the_judge_and_the_reward_model_can_change_places(finished, preferences, tmp_path):
    config = miniature(preferences, tmp_path / "run", optimise="judge", ppo_updates=1)
    summary = run_rlhf(config, QUIET)
    answers = answers_of(config.output)
    assert [answer["rm_score"] for answer in answers] == polite(answers)
    judge, prompts = load_reward_model(config.output / "reward_model"), [answer["prompt"] for answer in answers]
    scores = judge(prompts, [answer["text"] for answer in answers])
    assert [answer["gold"] * summary["gold_unit"] for answer in answers] == pytest.approx(scores, abs=1e-4)
    assert {f"PPO maximises: {POLITE}", "judge: the reward model of the comparisons"} <= set(summary["facts"])


def test_the_judge_is_only_measured(finished):
    folder, summary = finished
    answers = answers_of(folder)
    assert [answer["gold"] * summary["gold_unit"] for answer in answers] == pytest.approx(polite(answers))
    assert {answer["rm_score"] for answer in answers} - {0.0, 1.0}
    assert {"PPO maximises: the reward model of the comparisons", f"judge: {POLITE}"} <= set(summary["facts"])


def test_what_cannot_work_is_said_before_the_work(preferences, tmp_path):
    textenv.register_reward_model("speechless", lambda prompts, completions: ["good"])
    wrong = {
        "judge": ("nobody", "nobody"),
        "model": ("no-one", "no-one"),
        "preferences": (str(tmp_path / "none.jsonl"), "none.jsonl"),
        "max_new_tokens": (40, r"context of 'assistant-sft' \(48\), got 64. Lower one"),
        "max_prompt_tokens": (1, "Raise max_prompt_tokens"),
    }
    for name, (value, message) in wrong.items():
        with pytest.raises(ValueError, match=message):
            run_rlhf(miniature(preferences, tmp_path / "run", **{name: value}), QUIET)
    with pytest.raises(ValueError, match="must return finite scores"):
        run_rlhf(miniature(preferences, tmp_path / "run", judge="speechless"), QUIET)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="held_out"):
        miniature(preferences, tmp_path, held_out=1.0)


def test_every_part_of_the_data_serves_its_purpose_alone(finished, preferences):
    folder, summary = finished
    held_out = [json.loads(line) for line in (folder / "data" / "rankings-held-out.jsonl").read_text().splitlines()]
    samples = json.loads((folder / "samples.json").read_text())
    assert {sample["prompt"] for sample in samples} <= {record["prompt"] for record in held_out}
    played, trained_on = (
        {json.loads(line)["prompt"] for line in (folder / file).read_text().splitlines()}
        for file in ("ppo/samples.jsonl", "data/prompts-train.jsonl")
    )
    assert played
    assert played <= trained_on
    model = load_reward_model(folder / "reward_model")
    margins = []
    for record in held_out:
        scores = dict(enumerate(model([record["prompt"]] * len(record["responses"]), record["responses"])))
        best, worst = (index[0] for index in record["ranking"])
        margins.append(scores[best] - scores[worst])
    assert summary["reward_model"]["accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))
    calibration = json.loads((folder / "calibration.json").read_text())
    assert calibration["margin"] == pytest.approx((np.array(margins) * model.score_unit).tolist(), abs=1e-4)
    [logged] = {log["eval_pairs"] for log in json.loads((folder / "history.json").read_text())["reward_model"]
                if "eval_pairs" in log}  # fmt: skip
    assert logged == len((folder / "data" / "rankings-validation.jsonl").read_text().splitlines())


def test_every_step_has_the_seed_of_the_run_and_says_so_on_its_card(finished, preferences, monkeypatch):
    folder, _ = finished
    seeds = []

    def trained(model, data, settings, *args, **options):
        seeds.append(settings.seed)
        return SimpleNamespace(history=[])

    run = SimpleNamespace(config=miniature(preferences, folder), folder=folder)
    monkeypatch.setattr("agents.rlhf.run.train_sft", trained)
    monkeypatch.setattr("agents.rlhf.run.train_reward_model", trained)
    train_demonstrations(run, None)
    train_rewards(run, None)
    seeds.append(json.loads((folder / "ppo" / "state.json").read_text())["config"]["seed"])
    assert seeds == [3, 3, 3]
    for model in ("sft", "reward_model", "ppo/policy"):
        assert "| seed | 3 |" in (folder / model / "README.md").read_text()


def test_gains_are_those_of_ppo_over_sft_and_gold_is_in_units_of_sft(finished):
    _, summary = finished
    for gain, key, unit in (("rm_scores", "rm_score", 1.0), ("gold", "gold_score", summary["gold_unit"])):
        change = summary["ppo"][key]["mean"] - summary["sft"][key]["mean"]
        assert summary["gains"][gain]["mean"] == pytest.approx(change * unit, abs=1e-5)


def test_the_judge_is_measured_in_units_of_sft_and_stages_draw_with_seeds_of_their_own(
    finished, preferences, monkeypatch
):
    """A judge that says 0 or 1 of the pretrained model, 0 or 4 of SFT, 2 of PPO."""
    folder, _ = finished
    seeds, gold = [], iter(([0.0, 1.0], [0.0, 4.0], [2.0, 2.0]))
    zeros = dict.fromkeys(("rewards", "rm_scores", "kl"), np.zeros(2))
    texts = {"responses": ["a", "b"], "finish_reasons": ["eos"] * 2, "lengths": np.ones(2)}
    monkeypatch.setattr(measure, "LanguageModelAgent", lambda model, task, seed: seeds.append(seed))
    monkeypatch.setattr(measure, "evaluate", lambda *_: evaluation(gold=np.array(next(gold)), **zeros, **texts))
    for name in ("perplexity", "write_json", "side_by_side"):
        monkeypatch.setattr(measure, name, lambda *_: 1.0)
    env = SimpleNamespace(task=None)
    summary = measure.evaluate_stages(folder, env, miniature(preferences, folder, optimum_samples=0), lambda *_: None)
    assert summary["gold_unit"] == pytest.approx(8**0.5)  # of 0 and 4, unbiased
    assert summary["ppo"]["gold_score"]["mean"] == pytest.approx(2 / 8**0.5)
    assert len(set(seeds)) == len(seeds) == 3


def test_tied_pairs_are_no_part_of_the_calibration(finished, tmp_path):
    folder, _ = finished
    (tmp_path / "reward_model").symlink_to(folder / "reward_model")
    (tmp_path / "data").mkdir()
    record = {"prompt": "user: hi assistant:", "responses": ["yes .", "no ."]}
    write_jsonl(tmp_path / "data" / "rankings-held-out.jsonl", [record | {"ranking": r} for r in ([1, 0], [[0, 1]])])
    measure.measure_reward_model(tmp_path)
    assert len(json.loads((tmp_path / "calibration.json").read_text())["margin"]) == 1


def evaluation(**columns) -> Evaluation:
    return Evaluation(**{**dict.fromkeys(Evaluation._fields), **columns})


def test_stages_are_summed_up_by_hand(monkeypatch):
    monkeypatch.setattr(measure, "perplexity", lambda repeats: 7.0)
    one, two = (
        evaluation(responses=["a a", "b"], finish_reasons=["eos", "length"], rewards=np.array(rewards), gold=np.ones(2),
                   rm_scores=np.zeros(2), kl=np.zeros(2), lengths=np.array([3, 1]))
        for rewards in ([1.0, 3.0], [2.0, 4.0])
    )  # fmt: skip
    summed = measure.stage_summary([one, two], unit=2.0)
    assert summed["eos_rate"] == 0.5
    assert summed["reward"]["mean"] == 2.5
    assert summed["gold_score"]["mean"] == 0.5
    assert summed["response_tokens"]["mean"] == 2.0
    assert summed["distinct_1"] == 2 / 6
    stages = {"base": [one], "sft": [one], "ppo": [two]}
    assert measure.gain(stages, "rewards").mean == 1.0


def test_the_command_trains_a_model_and_comparisons_of_the_hub(preferences, tmp_path):
    hub = HubServer()
    textenv.language_model("assistant-sft").save_pretrained(tmp_path / "model")
    hub.add("some-org/small", tmp_path / "model")
    hub.files["datasets/some-org/pairs"] = {"train.jsonl": Path(preferences).read_bytes()}
    texts = {"model": "some-org/small", "preferences": "some-org/pairs", "judge": POLITE, "output": tmp_path / "run"}
    sizes = {"demonstrations": 16, "max-prompt-tokens": 24, "max-new-tokens": 4, "ppo-updates": 1, "eval-samples": 1}
    sizes |= {"ppo.batch-size": 16, "ppo.epochs": 1, "ppo.minibatches": 1, "reward.epochs": 1}
    options = [word for name, value in {**texts, **sizes}.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "textenv", "rlhf", *options]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert {Path(path).name for path in hub.sent} >= {"model.safetensors", "tokenizer.json", "train.jsonl"}
    assert len(hub.sent) == len(set(hub.sent))
    assert json.loads((tmp_path / "run/summary.json").read_text())["ppo"]["response_tokens"]["mean"] <= 4


def test_another_seed_trains_another_sft_model(finished, preferences, tmp_path):
    folder, _ = finished
    run_rlhf(miniature(preferences, tmp_path / "run", seed=4, ppo_updates=1), QUIET)
    first, second = (AutoModelForCausalLM.from_pretrained(f / "sft") for f in (folder, tmp_path / "run"))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_perplexity_is_that_of_the_reference_by_the_chain_rule():
    """Of the tokens of another model, some with an ending and some cut off."""
    env = make_vec("textenv/Assistant-v0", 2, max_new_tokens=9)
    policy = textenv.fresh_language_model("assistant-sft")
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(0.7)
    found = evaluate(LanguageModelAgent(policy, env.task, seed=3), env, prompt_ids=[5, 1, 2])
    assert set(found.finish_reasons) == {"eos", "length"}
    nll = 0.0
    for index, row, length in zip((5, 1, 2), found.response_ids, found.lengths, strict=True):
        head, tail = env.task.prompts.ids[index], row[:length].tolist()
        logprobs = env.reference.model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        nll -= sum(logprobs[len(head) + i - 1, token].item() for i, token in enumerate(tail))
    assert perplexity([found]) == pytest.approx(math.exp(nll / found.lengths.sum()), rel=1e-4)


def test_distinct_n_counts_by_hand():
    texts = ["a b a b", "a", "", "b a c"]  # words a b a b a b a c; pairs ab ba ab | ba ac
    assert distinct(texts, 1) == 3 / 8
    assert distinct(texts, 2) == 3 / 5
    assert distinct([""], 2) == 0


@pytest.mark.parametrize(
    ("score", "judge", "warned"),
    [(0.5, -0.5, True), (0.5, 0.5, False), (0.5, -0.1, False), (-0.5, -0.5, False), (0.1, -0.5, False)],
)
def test_over_optimisation_is_named_where_both_changes_are_clear(score, judge, warned):
    summary = summary_of(score=score, judge=judge)
    assert [warning.split(":")[0] for warning in warnings(summary)] == ["Over-optimisation"] * warned


@pytest.mark.parametrize(("before", "after", "warned"), [(0.9, 0.61, False), (0.9, 0.59, True), (0.4, 0.3, False)])
def test_replies_that_are_all_alike_are_named_though_the_judge_is_content(before, after, warned):
    found = warnings(summary_of(score=0.5, judge=0.5, before=before, after=after))
    assert len(found) == warned
    assert not warned or "from 90% under SFT to 59%" in found[0]


def summary_of(*, score, judge, before=0.9, after=0.9):
    """What the warnings look at."""
    gains = {"rm_scores": {"mean": score, "ci95": 0.2}, "gold": {"mean": judge, "ci95": 0.2}}
    return {"gains": gains, "sft": {"distinct_2": before}, "ppo": {"distinct_2": after}}
