"""Supervised training in two processes equals that in one, in float64, for each of the trainers."""

import pytest
import torch

from agents.dpo import DPOConfig, train_dpo
from agents.sft import SFTConfig, train_sft
from reward_models import RewardConfig, train_reward_model
from tests.agents.test_dpo import RANKINGS
from tests.agents.test_sft import RECORDS
from tests.conftest import tiny_model
from tests.processes import results

SETTINGS = {"epochs": 3, "batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 3e-3, "logging_steps": 1}
"""Windows of 4 and 1 of five examples: unequal lengths, and once a process without any. Six updates."""
FIVE = [*RANKINGS, RANKINGS[0]._replace(prompt="the grass is not the sky")]
STRICT = [ranking._replace(margin=0.0, ranks=()) for ranking in FIVE]


def in_float64():
    model = tiny_model()
    model.model.double()
    return model


TRAININGS = {
    "sft": lambda: train_sft(in_float64(), RECORDS[:5], SFTConfig(**SETTINGS)),
    "reward": lambda: train_reward_model(in_float64(), FIVE, RewardConfig(**SETTINGS)),
    "reward, listwise": lambda: train_reward_model(in_float64(), STRICT, RewardConfig(**SETTINGS, loss="listwise")),
    "dpo": lambda: train_dpo(in_float64(), FIVE, DPOConfig(**SETTINGS)),
    "ipo": lambda: train_dpo(in_float64(), STRICT, DPOConfig(**SETTINGS, loss="ipo")),
}


def outcome(name):
    result = TRAININGS[name]()
    model = result.model.model
    assert {weight.dtype for weight in model.parameters()} == {torch.float64}
    history = [[entry[key] for key in ("loss", "grad_norm")] for entry in result.history]
    return {name: weight.detach() for name, weight in model.named_parameters()}, history


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_equal_one(name):
    expected, history = outcome(name)
    first, second = results(lambda: outcome(name))
    for key, weight in expected.items():
        assert torch.equal(first[0][key], second[0][key])
        torch.testing.assert_close(first[0][key], weight, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    assert len(history) == 6
    for found, one in zip(first[1], history, strict=True):
        assert found == pytest.approx(one, rel=1e-6)
