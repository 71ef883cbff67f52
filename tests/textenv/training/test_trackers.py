"""What reaches TensorBoard, read back by TensorBoard itself; what a missing package says."""

import html
import json
import re
import sys
import types

import accelerate.tracking
import pytest

from agents import PPO, PPOConfig
from agents.sft import SFTConfig, train_sft
from reward_models.training.trainer import RewardConfig, train_reward_model
from tests.conftest import tiny_model
from textenv.cli import main
from textenv.data.records import write_jsonl
from textenv.training.trackers import Report, as_text, check_trackers, tracking


@pytest.fixture
def read():
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def scalars(folder):
        events = EventAccumulator(str(folder)).Reload()
        return {
            tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
        }  # fmt: skip

    return scalars


def test_a_learner_reports_every_figure_of_every_update_and_a_resumed_run_takes_up_after_its_checkpoint(
    make_vector, tmp_path, read
):
    run, config = tmp_path / "my-ppo", PPOConfig(batch_size=8, learning_rate=1e-3)
    options = {"every": 2, "report_to": ["tensorboard"]}

    class PowerCutError(Exception):
        pass

    def power_cut(done, total, figures):
        if done == 3:
            raise PowerCutError

    agent = PPO(make_vector(8).unwrapped, config)
    with pytest.raises(PowerCutError):
        agent.learn_with_checkpoints(40, run, **options, advance=power_cut)
    agent = PPO.load(run, make_vector(8).unwrapped)
    agent.learn_with_checkpoints(40, run, **options)
    found = read(tmp_path / "tensorboard" / "my-ppo")
    assert found.keys() == agent.history[0].keys()
    for name, points in found.items():
        assert [step for step, _ in points] == [1, 2, 3, 4, 5]
        assert [value for _, value in points] == pytest.approx([log[name] for log in agent.history], rel=1e-6)
    assert {path.name for path in tmp_path.iterdir()} == {"my-ppo", "tensorboard"}


def test_supervised_training_reports_its_history_held_out_figures_included(tmp_path, read):
    records = [{"prompt": "the sky is", "completion": "blue"}] * 6
    config = SFTConfig(epochs=2, batch_size=2, logging_steps=1)
    sft = train_sft(tiny_model(), records, config, tmp_path / "sft", eval_records=records, report_to=["tensorboard"])
    found = read(tmp_path / "tensorboard" / "sft")
    assert [value for _, value in found["loss"]] == pytest.approx([log["loss"] for log in sft.history if "loss" in log])
    assert [step for step, _ in found["eval_nll"]] == [3, 6]
    rankings = [{"prompt": "the grass is", "responses": ["green", "red", "blue"], "ranking": [0, 2, 1]}] * 6
    reward = train_reward_model(
        tiny_model(), rankings, RewardConfig(batch_size=2), tmp_path / "rm", report_to=["tensorboard"]
    )
    found = read(tmp_path / "tensorboard" / "rm")
    assert [step for step, _ in found["loss"]] == [log["step"] for log in reward.history]


def test_the_commands_take_trackers(tmp_path, model_folder, read, capsys):
    write_jsonl(tmp_path / "d.jsonl", [{"prompt": "the sky is", "completion": "blue"}] * 4)
    arguments = ["sft", "--model", model_folder, "--data", tmp_path / "d.jsonl", "--output", tmp_path / "sft"]
    assert main([*map(str, arguments), "--report-to", "tensorboard"]) == 0, capsys.readouterr().err
    assert "loss" in read(tmp_path / "tensorboard" / "sft")
    options = ["--env-id", "textenv/Micro-v0", "--num-envs", "8", "--batch-size", "8", "--total-episodes", "16"]
    arguments = ["rloo", "--output", str(tmp_path / "rloo"), *options, "--report-to", "tensorboard"]
    assert main(arguments) == 0, capsys.readouterr().err
    assert len(read(tmp_path / "tensorboard" / "rloo")["reward"]) == 2


EXPERIMENT = """
agents:
  mine: {algorithm: reinforce, batch_size: 8, num_envs: 8, learning_rate: 1e-3, preset: pretrained}
  theirs: {algorithm: sb3-a2c, num_envs: 8}
run: {environments: [textenv/Micro-v0], agents: [mine, theirs], seeds: [1], total_episodes: 16, output: results}
"""


def test_an_experiment_reports_the_curves_of_every_training(tmp_path, read, monkeypatch):
    (tmp_path / "experiment.yaml").write_text(EXPERIMENT)
    names = []
    monkeypatch.setattr(
        "agents.core.checkpoint.tracking", lambda *a, name, **k: (names.append(name), tracking(*a, **k))[1]
    )
    assert main(["run", str(tmp_path / "experiment.yaml"), "--report-to", "tensorboard"]) == 0
    for agent in ("mine", "theirs"):
        folder = tmp_path / "results" / "textenv-Micro-v0" / agent / "seed-1"
        curve = json.loads((folder / "result.json").read_text())["curve"]
        found = read(folder / "tensorboard" / "checkpoint")["reward"]
        assert [value for _, value in found] == pytest.approx([log["reward"] for log in curve], rel=1e-6)
        assert [step for step, _ in found] == list(range(1, len(curve) + 1))
    assert names == ["textenv/Micro-v0, mine, seed 1"]


@pytest.mark.parametrize(
    ("name", "remedy"), [("tensorboard", "'textenv[trackers]'"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_missing_package_is_named_with_the_remedy_before_any_work(tmp_path, monkeypatch, capsys, name, remedy):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    arguments = ["ppo", "--output", str(tmp_path / "run"), "--env-id", "textenv/Micro-v0", "--report-to", name]
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert f"got '{name}' without it. Install it: pip install {remedy}." in printed
    assert not (tmp_path / "run").exists()


def test_without_trackers_nothing_is_written_and_a_report_needs_a_name(tmp_path):
    with tracking((), None, {}) as report:
        report({"loss": 1.0}, 1)
    assert not list(tmp_path.iterdir())
    pytest.importorskip("tensorboard")
    with pytest.raises(ValueError, match="report_to needs an output folder"), tracking(["tensorboard"], None, {}):
        pass


def test_a_table_of_texts_goes_to_each_tracker_in_its_own_form(monkeypatch):
    sent = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def log(self, values, step):
            sent.append((self.name, values, step))

        def log_table(self, name, columns, data, step):
            sent.append((self.name, {name: (columns, data)}, step))

    trackio = types.SimpleNamespace(Table=lambda dataframe: dataframe.to_dict("records"))
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    rows = [{"response": "a | <b>\nnew", "reward": 0.123456}, {"response": "", "reward": -1.0}]
    Report([Fake("tensorboard"), Fake("wandb"), Fake("trackio")]).table("samples", rows, 3)
    text = "| response | reward |\n| --- | --- |\n| a &#124; &#60;b&#62;<br>new | 0.1235 |\n|  | -1 |"
    assert sent == [
        ("tensorboard", {"samples": text}, 3),
        ("wandb", {"samples": (["response", "reward"], [["a | <b>\nnew", 0.123456], ["", -1.0]])}, 3),
        ("trackio", {"samples": rows}, 3),
    ]


def test_the_texts_of_some_updates_reach_tensorboard(make_vector, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    agent = PPO(make_vector(8).unwrapped, PPOConfig(batch_size=8))
    agent.learn_with_checkpoints(32, tmp_path / "run", sample_every=2, report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard" / "run")).Reload()
    texts = events.Tensors("samples/text_summary")
    assert [event.step for event in texts] == [1, 2, 4]
    written = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    for event in texts:
        (table,) = event.tensor_proto.string_val
        shown = table.decode().splitlines()[2:]
        of_update = [row for row in written if row["update"] == event.step]
        assert len(shown) == len(of_update) == 4
        assert all(row["response"] in html.unescape(line) for row, line in zip(of_update, shown, strict=True))


def test_what_a_model_writes_is_text_in_a_table_and_no_markup():
    text = "**b** ![x](http://e/x.png) `a < b`\n# é_1"
    shown = as_text(text)
    assert not set("*![]()`<#_") & set(re.sub(r"&#\d+;|<br>", "", shown))
    assert html.unescape(shown) == text.replace("\n", "<br>")


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])
    with tracking(["wandb"], tmp_path / "run", {"learning_rate": 0.1, "clip": None}) as report:
        report({"loss": 1.0}, 1)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"loss" in file.read_bytes()
    assert b"learning_rate" in file.read_bytes()
