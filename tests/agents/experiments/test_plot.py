"""Pictures of curves: which runs are found in a folder, under which names, and what is drawn of them."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from agents.dpo import DPOConfig, train_dpo
from agents.experiments.bounds import with_bounds
from agents.experiments.plot import compare_curves, read_runs
from agents.experiments.run import Cell, run_experiment
from agents.sft import SFTConfig, train_sft
from reward_models import RewardConfig, TransformerRewardModel, train_reward_model
from tests.agents.test_dpo import RANKINGS
from tests.agents.test_sft import RECORDS
from tests.conftest import tiny_model
from textenv.cli import main
from textenv.data.records import write_json, write_jsonl
from textenv.registry.experiment import AgentPlan


def curve(slope, gold=False):
    logs = []
    for update in range(1, 31):
        log = {"episodes": 8.0 * update, "reward": slope * update, "rm_score": 2 * slope * update, "kl": 0.1 * update}
        logs.append(log | {"response_tokens": 9.0, "eos_rate": 1.0} | ({"gold_score": 1.0} if gold else {}))
    return logs


@pytest.fixture
def learners(tmp_path):
    for name, slope in {"ppo": 1.0, "rloo": 2.0}.items():
        write_jsonl(tmp_path / name / "curves.jsonl", curve(slope))
    return [tmp_path / "ppo", tmp_path / "rloo"]


def test_the_objective_is_the_first_panel_and_only_what_is_known_is_drawn(learners):
    figure = compare_curves(read_runs(learners))
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.axison]
    assert titles[0] == "objective (score − β KL)"
    assert titles[1:] == [
        "reward-model score",
        "KL from the reference, nats",
        "response length, tokens",
        "share of responses that end",
    ]
    ppo, rloo = figure.axes[0].get_lines()
    assert (ppo.get_label(), rloo.get_label()) == ("ppo", "rloo")
    middle = np.interp(120.0, *ppo.get_data()), np.interp(120.0, *rloo.get_data())
    assert middle == pytest.approx((15.0, 30.0), rel=1e-3)  # update 15 of slopes 1 and 2


BOUNDS = {"reference": 1.5, "optimum": 40.0, "low": 39.0, "high": 41.0, "unclear_prompts": 0.0}


@pytest.mark.parametrize("other", ["the same", "another", "none"])
def test_reference_and_optimum_are_drawn_where_the_runs_agree_on_them(learners, other):
    same = other == "the same"
    write_json(learners[0] / "bounds.json", BOUNDS)
    if other != "none":
        write_json(learners[1] / "bounds.json", BOUNDS if same else {**BOUNDS, "optimum": 41.0})
    figure = compare_curves(read_runs(learners))
    objective, *others = figure.axes
    levels = [line.get_ydata()[0] for line in objective.get_lines()[2:]]
    assert levels == ([1.5, 40.0] if same else [])
    assert [text.get_text() for text in objective.texts] == (["reference", "optimum ≈ 40.00"] if same else [])
    assert not any(axes.texts for axes in others)


def test_an_experiment_has_the_bounds_of_its_environment(tmp_path):
    plan = AgentPlan(name="a", algorithm="rloo", options={"batch_size": 8, "num_envs": 8})
    results = run_experiment([Cell("textenv/Micro-v0", plan, 1, 16, {})], tmp_path)
    ((run,),) = read_runs([tmp_path]).values()
    assert run["bounds"] is None
    (result,) = with_bounds(results, tmp_path)
    ((run,),) = read_runs([tmp_path]).values()
    assert run["bounds"] == result["bounds"]
    assert compare_curves(read_runs([tmp_path])).axes[0].texts


@pytest.mark.parametrize(("options", "drawn"), [({"prompts": "assistant-test"}, True), ({"kl_coef": 5.0}, False)])
def test_bounds_of_another_objective_are_not_those_of_the_training(tmp_path, options, drawn):
    """Other prompts have nearly the same ones, another β has not."""
    plan = AgentPlan(name="a", algorithm="rloo", options={"batch_size": 8, "num_envs": 8})
    cell = Cell("textenv/Assistant-v0", plan, 1, 16, options)
    settings = {"prompts": "assistant-train", "kl_coef": 0.2}
    content = {"settings": cell.settings, "curve": curve(1.0)}
    content["settings"] |= {"environment": settings, "evaluated": {**settings, **options}}
    write_json(tmp_path / "result.json", content)
    world = json.dumps(["textenv/Assistant-v0", content["settings"]["evaluated"]], sort_keys=True)
    key = f"textenv/Assistant-v0 {hashlib.sha256(world.encode()).hexdigest()[:16]}"
    write_json(tmp_path / "bounds.json", {key: BOUNDS})
    ((run,),) = read_runs([tmp_path]).values()
    assert run["bounds"] == (BOUNDS if drawn else None)


def test_seeds_of_an_agent_are_one_line_with_a_band_and_a_cell_that_runs_is_read_from_its_checkpoint(tmp_path):
    for seed, slope in enumerate([1.0, 3.0]):
        folder = tmp_path / "out" / "env" / "a" / f"seed-{seed}"
        settings = {"agent": "a", "env_id": "textenv/Micro-v0"}
        if seed:
            write_jsonl(folder / "checkpoint" / "curves.jsonl", curve(slope, gold=True))
            write_json(folder / "cell.json", {"settings": settings})
        else:
            write_json(folder / "result.json", {"settings": settings, "curve": curve(slope, gold=True)})
    write_json(tmp_path / "out" / "env" / "reference" / "result.json", {"settings": settings, "curve": []})
    runs = read_runs([tmp_path / "out"])
    assert {name: len(group) for name, group in runs.items()} == {"out: a in textenv/Micro-v0": 2}
    axes = compare_curves(runs).axes[0]
    assert np.interp(120.0, *axes.get_lines()[0].get_data()) == pytest.approx(30.0, rel=1e-3)  # of 15 and 45
    (band,) = axes.collections
    assert band.get_datalim(axes.transData).ymax == pytest.approx(3 * 29, rel=0.02)  # the last five updates' mean is 28


def test_supervised_trainings_leave_curves_that_are_drawn_by_steps(tmp_path):
    often = {"batch_size": 1, "epochs": 2, "logging_steps": 1}
    start = TransformerRewardModel.from_language_model(tiny_model())
    held_out = {"eval_rankings": RANKINGS}
    results = [
        train_sft(tiny_model(), RECORDS, SFTConfig(**often), tmp_path / "sft", eval_records=RECORDS),
        train_dpo(tiny_model(), RANKINGS, DPOConfig(**often), tmp_path / "dpo", **held_out),
        train_reward_model(start, RANKINGS, RewardConfig(**often), tmp_path / "rm", **held_out),
    ]
    folders = [tmp_path / name for name in ("sft", "dpo", "rm")]
    for folder, result in zip(folders, results, strict=True):
        assert [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()] == result.history
        assert "eval_" in (folder / "curves.jsonl").read_text()
    figure = compare_curves(read_runs(folders))
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.axison}
    assert list(panels) == [
        "training loss",
        "held-out NLL",
        "held-out NLL in a ranking",
        "held-out accuracy in a ranking",
    ]
    assert {axes.get_xlabel() for axes in panels.values()} == {"steps"}
    sft, dpo, rm = panels["training loss"].get_lines()
    assert (sft.get_label(), dpo.get_label(), rm.get_label()) == ("sft", "dpo", "rm")
    assert sft.get_xdata()[-1] == results[0].metrics["steps"]
    assert [line.get_label() for line in panels["held-out accuracy in a ranking"].get_lines()] == ["dpo", "rm"]


def test_a_folder_of_folders_and_a_line_that_is_being_written(tmp_path):
    write_jsonl(tmp_path / "demo" / "ppo" / "curves.jsonl", curve(1.0))
    with (tmp_path / "demo" / "ppo" / "curves.jsonl").open("a") as file:
        file.write('{"episodes": 2')
    ((name, (run,)),) = read_runs([tmp_path / "demo"]).items()
    assert (name, len(run["curve"])) == ("demo/ppo", 30)


def test_folders_of_the_same_name_are_told_apart(tmp_path):
    folders = [tmp_path / part / "ppo" for part in ("a", "b")]
    for folder in folders:
        write_jsonl(folder / "curves.jsonl", curve(1.0))
    assert list(read_runs(folders)) == list(map(str, folders))


def test_the_command_writes_a_picture(learners, tmp_path, capsys):
    output = tmp_path / "new" / "curves.png"
    assert main(["plot", *map(str, learners), "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    with Image.open(output) as picture:
        width, height = picture.size
    assert width > height > 500
    assert main(["plot", str(learners[0]), "--output", str(tmp_path / "a.svg")]) == 0
    assert "objective" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "runs must name at least one folder"),
        (["{tmp}/empty"], "a run must be a folder with curves.jsonl"),
        (["{tmp}/short"], "a curve must have two updates or more, got fewer in short"),
        (["{tmp}/short", "--output", "a.pdf"], "output must end in .png or .svg"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    write_jsonl(tmp_path / "short" / "curves.jsonl", curve(1.0)[:1])
    assert main(["plot", *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_runs_of_the_command_line_are_found(tmp_path, capsys):
    options = ["--env-id", "textenv/Micro-v0", "--num-envs", "8", "--batch-size", "8", "--minibatches", "1"]
    arguments = ["ppo", "--output", str(tmp_path / "run"), *options, "--total-episodes", "24", "--keep-last", "2"]
    assert main([*arguments, "--save-every", "1", "--keep-best", "reward", "--sample-every", "2"]) == 0, (
        capsys.readouterr()
    )
    assert len(json.loads((tmp_path / "run" / "state.json").read_text())["history"]) == 3
    assert (tmp_path / "run" / "checkpoints" / "2" / "policy").is_dir()
    assert (tmp_path / "run" / "best" / "config.json").is_file()
    assert main(["plot", str(tmp_path / "run"), "--output", str(tmp_path / "curves.png")]) == 0
