"""The examples run, and reach what they say."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_single_file_ppo_runs(capsys):
    example = load("cleanrl_ppo")
    ratio = example.train(example.Args(num_envs=32, minibatch_size=64, updates=5))
    assert ratio < 0.95
    assert "update 5: score" in capsys.readouterr().out


@pytest.mark.slow
def test_the_single_file_ppo_comes_near_the_optimum():
    example = load("cleanrl_ppo")
    assert example.train(example.Args()) <= 0.12


def test_torchrl_collects_the_rewards_of_the_reference():
    pytest.importorskip("torchrl", reason="needs torchrl: pip install torchrl")
    rewards = load("torchrl_env").episode_rewards(1000)
    assert len(rewards) > 200
    # J of the reference itself, by enumeration of the exact world; four standard errors.
    assert rewards.mean() == pytest.approx(0.1147, abs=4 * float(rewards.std()) / len(rewards) ** 0.5)
