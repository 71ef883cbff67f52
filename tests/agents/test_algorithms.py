"""The table of algorithms: a new one is one file and one line; importing one imports no other."""

import subprocess
import sys
from pathlib import Path

import pytest

import agents
from agents.algorithms import ALGORITHMS, LEARNERS, algorithm, check_plan, summary
from agents.core.job import Algorithm
from agents.experiments.run import Cell, run_experiment
from textenv.cli import COMMANDS, Command, main
from textenv.registry.experiment import AgentPlan

MADE_UP = '''
"""A made-up algorithm, for a test."""

from agents.ppo import PPOConfig as MadeUpConfig
from agents.core.checkpoint import CheckpointedLearner
from agents.ppo import PPO


class MadeUp(CheckpointedLearner):
    config_type = MadeUpConfig
    advantages = PPO.advantages
    loss = PPO.loss
'''


def run_python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_name_leads_to_an_algorithm(name):
    assert issubclass(algorithm(name), Algorithm)
    assert summary(name)


def test_a_new_algorithm_is_one_file_and_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "made_up.py").write_text(MADE_UP.lstrip())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(ALGORITHMS, "made-up", "made_up:MadeUp")
    assert summary("made-up") == "A made-up algorithm, for a test."
    assert agents.MadeUp.config_type is agents.MadeUpConfig
    options = {"batch_size": 16, "num_envs": 8}
    plan = AgentPlan(name="new", algorithm="made-up", options=options)
    (result,) = run_experiment([Cell("textenv/Micro-v0", plan, 1, 32, {})], tmp_path / "out")
    assert len(result["curve"]) == 2
    with pytest.raises(ValueError, match="an option must be one that made-up has, got 'clip'"):
        check_plan(AgentPlan(name="new", algorithm="made-up", options={"clip": 1}))
    monkeypatch.setitem(LEARNERS, "made-up", "made_up:MadeUp")
    monkeypatch.setitem(COMMANDS, "made-up", Command("learner:learner_command", summary("made-up")))
    with pytest.raises(SystemExit):
        main(["made-up", "--help"])
    assert "--clip-range" in capsys.readouterr().out


def test_every_learner_is_a_command_with_a_line_of_help(capsys):
    main(["--help"])
    printed = capsys.readouterr().out
    for name in LEARNERS:
        assert name in COMMANDS
        assert f"  {name:<16} {summary(name)}\n" in printed


COMMANDS_LOADED = """
import os, sys
import scipy.stats  # slow to import, and not asked about: each command starts from here
import torch.distributed.tensor
import transformers.conversion_mapping
import transformers.integrations.flash_attention
from textenv.cli import COMMANDS

for name in sys.argv[1:]:
    if os.fork() == 0:
        COMMANDS[name].load(name)
        print(name, *(m for m in sys.modules if m.startswith("agents.") or m == "stable_baselines3"), flush=True)
        os._exit(0)
    os.wait()
"""


def test_the_command_of_a_learner_imports_no_other_algorithm():
    lines = run_python(COMMANDS_LOADED, *LEARNERS).splitlines()
    loaded = {name: set(modules) for name, *modules in map(str.split, lines)}
    assert loaded.keys() == set(LEARNERS)
    for name, modules in loaded.items():
        others = {target.partition(":")[0] for other, target in ALGORITHMS.items() if other != name}
        unwanted = {*others, "stable_baselines3"} | ({"agents.core.group"} if name in ("ppo", "reinforce") else set())
        assert ALGORITHMS[name].partition(":")[0] in modules
        assert not modules & unwanted


def test_importing_agents_loads_neither_torch_nor_transformers():
    code = "import sys, agents; dir(agents); print(*{'torch', 'transformers', 'gymnasium'} & set(sys.modules))"
    assert not {"torch", "transformers"} & set(run_python(code).split())


def test_every_public_name_can_be_imported_from_agents():
    assert set(agents.__all__) <= set(dir(agents))
    for name in agents.__all__:
        assert getattr(agents, name).__name__ == name
    for name in LEARNERS:
        kind = algorithm(name)
        assert {kind.__name__, kind.config_type.__name__} <= set(agents.__all__)
    with pytest.raises(AttributeError, match="PPOO"):
        agents.PPOO  # noqa: B018


def test_what_ppo_does_is_readable_in_under_600_lines_of_agents():
    """What it imports to act and learn. Answering by tokens, logs, checkpoints and experiments are other files."""
    code = "import sys, agents.ppo; print(*(m for m in sys.modules if m.startswith('agents.')))"
    beside = {"agents.algorithms", "agents.core", "agents.core.agent", "agents.core.checkpoint", "agents.core.job"}
    beside |= {"agents.core.kept", "agents.presets"}
    needed = {name for name in run_python(code).split() if not name.startswith("agents.logs")} - beside
    assert needed == {"agents.ppo"} | {
        f"agents.core.{name}" for name in ("actor", "config", "learner", "losses", "returns", "rollout")
    }
    files = [Path(agents.__path__[0]).parent / (name.replace(".", "/") + ".py") for name in needed]
    assert sum(len(file.read_text("utf-8").splitlines()) for file in files) < 600
