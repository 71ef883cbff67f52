"""The examples run, and reach what they say."""

import importlib.util
import sys
from pathlib import Path

import pytest

import textenv

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
    assert example.train(example.Args(updates=15)) <= 0.18  # within 12 % of the optimum in its 30


def test_torchrl_collects_the_rewards_of_the_reference():
    pytest.importorskip("torchrl", reason="needs torchrl: pip install torchrl")
    rewards = load("torchrl_env").episode_rewards(1000)
    assert len(rewards) > 200
    # J of the reference itself, by enumeration of the exact world; four standard errors.
    assert rewards.mean() == pytest.approx(0.1147, abs=4 * float(rewards.std()) / len(rewards) ** 0.5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_trl_trains_on_our_rewards_and_we_evaluate_its_policy(tmp_path, name):
    pytest.importorskip("trl", reason="needs trl: make test-trl")
    example = load("trl_trainers")
    before = example.answers(textenv.fresh_language_model("assistant-sft"))
    after = example.answers(example.train(name, tmp_path / "trl", 40))
    assert after.rm_scores.mean() > before.rm_scores.mean() + 0.3
    error = (after.rewards - before.rewards).std(ddof=1) / len(after.rewards) ** 0.5
    assert (after.rewards - before.rewards).mean() > 4 * error
    assert before.kl.mean() == pytest.approx(0.0, abs=1e-3)
    assert 0.05 < after.kl.mean() < 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_rllib_trains_a_language_model_towards_the_optimum():
    pytest.importorskip("ray.rllib", reason="needs RLlib: make test-rllib")
    assert load("rllib_ppo").regret_ratio(20) < 0.5
