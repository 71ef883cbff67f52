"""On a CUDA device all works as on the CPU: scores, log-probabilities, training, checkpoints, commands."""

import gymnasium
import numpy as np
import pytest
import torch

import textenv
from agents.ppo import PPO, PPOConfig
from agents.presets import preset
from agents.sft import SFTConfig, train_sft
from reward_models.training.start import start_reward_model
from reward_models.training.trainer import RewardConfig, train_reward_model
from textenv.cli import main
from textenv.tasks import assistant

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def make(device, num_envs=32, **options):
    return gymnasium.make_vec("textenv/Assistant-v0", num_envs=num_envs, device=device, **options).unwrapped


def settings(**changed):
    return PPOConfig(**{**preset("assistant", "ppo", 256), "batch_size": 32, "seed": 1, **changed})


def test_rewards_of_the_same_responses_are_those_of_the_cpu():
    rng = np.random.default_rng(0)
    ends = textenv.language_model("assistant-sft").ending_ids
    words = np.setdiff1d(np.arange(190), ends)
    lengths = rng.integers(1, 25, 32)
    responses = rng.choice(words, (32, 24))
    responses[np.arange(32), lengths - 1] = np.where(lengths < 24, ends[0], responses[:, -1])
    logprobs = -rng.random((32, 24)).astype(np.float32)
    seen = []
    for device in ("cpu", DEVICE):
        env = make(device)
        env.reset(seed=3)
        _, rewards, _, _, infos = env.play(responses, lengths, logprobs)
        seen.append((rewards, infos.get("final_info", infos)["kl"]))
    np.testing.assert_allclose(seen[0][0], seen[1][0], atol=1e-3)
    np.testing.assert_allclose(seen[0][1], seen[1][1], atol=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_the_policy_starts_at_the_reference_and_the_first_ratios_are_one(dtype, tolerance):
    agent = PPO(make(DEVICE, dtype=dtype), settings(learning_rate=0.0, epochs=1, minibatches=1))
    agent.learn(32)
    (log,) = agent.history
    assert abs(log["kl"]) < tolerance * log["response_tokens"]
    assert log["approx_kl"] == pytest.approx(0.0, abs=tolerance**2)
    assert agent.policy.model.device.type == torch.device(DEVICE).type


def test_ppo_learns_saves_and_goes_on_here_and_on_the_cpu(tmp_path):
    agent = PPO(make(DEVICE), settings())
    agent.learn(128)
    agent.save(tmp_path / "ppo")
    for device in (DEVICE, "cpu"):
        other = PPO.load(tmp_path / "ppo", make(device))
        other.learn(32)
        assert other.episodes == 160
        assert np.isfinite([value for log in other.history for value in log.values()]).all()


def test_supervised_training_lowers_its_losses():
    records = assistant.sample_corpus(128, 0, source="demonstrations")
    tuned = train_sft("assistant-sft", records, SFTConfig(learning_rate=1e-3, epochs=3), device=DEVICE)
    assert tuned.model.model.device.type == torch.device(DEVICE).type
    assert tuned.history[-1]["loss"] < tuned.history[0]["loss"]
    rankings = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "go away ."} for row in records]
    start = start_reward_model("assistant-sft", DEVICE)
    trained = train_reward_model(start, rankings, RewardConfig(learning_rate=1e-3, epochs=2))
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]


def test_commands_take_the_device(tmp_path, capsys):
    small = ["--total-episodes", "32", "--batch-size", "16", "--num-envs", "16", "--device", DEVICE]
    assert main(["ppo", "--output", str(tmp_path / "ppo"), *small]) == 0, capsys.readouterr().err
    answer = ["evaluate", "--model", str(tmp_path / "ppo"), "--device", DEVICE, "--dtype", "bfloat16"]
    assert main(answer) == 0, capsys.readouterr().err
    assert textenv.reward_model("assistant-rm", DEVICE)(["user: hi assistant:"], ["hello"])
