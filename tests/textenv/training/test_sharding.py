"""Supervised training with weights shared out over processes (FSDP2) equals that of one process."""

import contextlib
import copy

import pytest
import torch
from torch.distributed.tensor import DTensor

from agents.dpo import DPOConfig, train_dpo
from agents.sft import SFTConfig, train_sft
from reward_models import RewardConfig, train_reward_model
from tests.agents.test_dpo import RANKINGS
from tests.agents.test_sft import RECORDS
from tests.conftest import tiny_model
from tests.processes import in_processes
from tests.sharded import in_shares, shared_out
from textenv.lm import load_language_model

SETTINGS = {"epochs": 2, "batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 3e-3, "logging_steps": 1}


def sft(folder=None, **options):
    return train_sft(tiny_model(), RECORDS[:5], SFTConfig(**SETTINGS), folder, eval_records=RECORDS[:2], **options)


def dpo(folder=None, **options):
    return train_dpo(tiny_model(), RANKINGS, DPOConfig(**SETTINGS), folder, eval_rankings=RANKINGS[:2], **options)


def reward(folder=None, **options):
    config = RewardConfig(**SETTINGS, early_stopping_patience=1)
    return train_reward_model(tiny_model(), RANKINGS, config, folder, eval_rankings=RANKINGS[:2], **options)


TRAININGS = {"sft": sft, "dpo": dpo, "reward": reward}


def weights(result):
    return torch.cat([weight.detach().flatten() for weight in result.model.model.parameters()])


def numbers(history):
    return [value for entry in history for value in entry.values()]


@pytest.mark.parametrize("name", TRAININGS)
def test_processes_with_a_part_of_the_weights_each_equal_one(name):
    """Windows of 4 and 1: rows of unequal length in each process, and one process without any."""

    def work():
        result = TRAININGS[name]()
        assert not any(isinstance(weight, DTensor) for weight in result.model.model.parameters())
        copy.deepcopy(result.model.model)  # an ordinary model
        return weights(result), result.history

    one = TRAININGS[name]()
    first, second = shared_out(work)
    assert torch.equal(first[0], second[0])
    assert numbers(first[1]) == pytest.approx(numbers(one.history), rel=2e-3, abs=1e-5)
    # Adam makes steps of rounding errors where a gradient is 0: few weights, and by little.
    assert ((first[0] - weights(one)).abs() > 1e-4).float().mean() < 0.01


@pytest.mark.parametrize("name", TRAININGS)
def test_a_resumed_run_in_shares_equals_one_that_never_stopped(tmp_path, name):
    def stop(step, *_):
        if step == 2:
            raise KeyboardInterrupt

    def begin():
        with pytest.raises(KeyboardInterrupt):
            TRAININGS[name](tmp_path, on_progress=stop)

    straight = shared_out(lambda: weights(TRAININGS[name]()))[0]
    shared_out(begin)
    resumed = shared_out(lambda: weights(TRAININGS[name](tmp_path, resume=True)))[0]
    assert torch.equal(straight, resumed)


def test_what_sft_saves_is_the_whole_model(tmp_path):
    trained = shared_out(lambda: weights(sft(tmp_path)))[0]
    saved = load_language_model(tmp_path).model
    assert torch.equal(torch.cat([weight.detach().flatten() for weight in saved.parameters()]), trained)


def test_a_reward_model_of_which_a_part_is_frozen_is_refused():
    def work():
        with contextlib.redirect_stderr(None):
            train_reward_model(tiny_model(), RANKINGS, RewardConfig(freeze_embeddings=True))

    _, errors = in_processes(in_shares(work))
    assert all("must train all weights, got" in error and "freeze_…" in error for error in errors), errors
