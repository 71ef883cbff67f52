"""Presets: the worlds included here keep their own settings, everything else gets those for a pretrained model."""

import json
from pathlib import Path

import pytest

from agents.algorithms import LEARNERS, algorithm
from agents.core.job import Job
from agents.ppo import PPO, PPOConfig
from agents.presets import PRESETS, WORLDS, preset
from textenv.cli import main


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_a_config_of_every_learner(name, learner):
    config = algorithm(learner).config_type(**preset(name, learner, total_episodes=512))
    if name == "pretrained":
        assert (config.learning_rate, config.lr_decay_episodes) == (1e-5, None)
    else:
        assert config.learning_rate >= 3e-4
        assert config.lr_decay_episodes == 512


RECORDED = json.loads((Path(__file__).parents[2] / "benchmarks/results/agents.json").read_text("utf-8"))["cells"]


@pytest.mark.parametrize("env_id", WORLDS)
@pytest.mark.parametrize("learner", LEARNERS)
def test_a_preset_is_what_the_published_figures_were_made_with(env_id, learner):
    """The table of the docs has these records behind it; an agent by another name differs in other settings."""
    runs = [cell["settings"] for cell in RECORDED]
    runs = [run for run in runs if (run["env_id"], run["agent"].lower().replace(" ", "-")) == (env_id, learner)]
    assert len(runs) == 3, "three seeds"
    config = algorithm(learner).config_type
    for run in runs:
        assert config(**preset(WORLDS[env_id], learner, run["total_episodes"])) == config(**run["options"])


def test_an_unknown_preset_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"one of pretrained, micro, assistant, got 'asistant'\. Did you mean 'assis"):
        preset("asistant", "ppo", total_episodes=1)


@pytest.mark.parametrize(
    ("flags", "rate", "chosen"),
    [
        ([], "0.0003", "assistant"),
        (["--env-id", "textenv/Micro-v0"], "0.0007", "micro"),
        (["--env_id=textenv/Micro-v0"], "0.0007", "micro"),
        (["--env-id", "textenv/Text-v0"], "1e-05", "pretrained"),
        (["--reference", "org/model"], "1e-05", "pretrained"),
        (["--reference", "org/model", "--preset", "micro"], "0.0007", "micro"),
    ],
)
def test_flags_start_from_the_preset_of_the_id_unless_the_reference_is_the_users(capsys, flags, rate, chosen):
    with pytest.raises(SystemExit):
        main(["ppo", *flags, "--help"])
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"have presets with more. (default: {rate})" in printed
    assert f"(default: {chosen})" in printed


def test_the_first_line_says_what_learns_on_what_and_how(capsys, tmp_path):
    small = ["--total-episodes", "16", "--batch-size", "8", "--num-envs", "8"]
    arguments = ["ppo", "--env-id", "textenv/Micro-v0", "--output", str(tmp_path / "out"), *small]
    assert main(arguments) == 0
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("PPO, preset micro: a copy of micro-reference (")
    assert "learns on 6 prompts from the reward of micro-gold minus 0.3 per nat of KL; 2 updates of 8 episodes" in line
    assert line.endswith("learning rate 0.0007")
    config = json.loads((tmp_path / "out" / "state.json").read_text())["config"]
    assert (config["learning_rate"], config["lr_decay_episodes"], config["batch_size"]) == (7e-4, 16, 8)


@pytest.mark.parametrize(
    ("options", "rate"), [({}, 7e-4), ({"preset": "pretrained"}, 1e-5), ({"learning_rate": 1e-2}, 1e-2)]
)
def test_experiments_start_from_the_preset_of_the_id_too(tmp_path, options, rate):
    options = {"batch_size": 8, **options}
    PPO.check(options)
    trained = PPO.train(Job("textenv/Micro-v0", options, 0, 8, tmp_path / "out"))
    assert trained.agent.config.learning_rate == rate
    assert WORLDS["textenv/Micro-v0"] == "micro"


def test_an_experiment_with_an_unknown_preset_is_refused_before_it_starts():
    with pytest.raises(ValueError, match="preset must be one of"):
        PPO.check({"preset": "mine"})
    assert PPOConfig().learning_rate == 1e-5
