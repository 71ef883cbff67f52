"""Supervised training with weights shared out over processes (FSDP2) equals that of one process."""

import contextlib
import copy

import pytest
import torch
from torch.distributed.tensor import DTensor

import textenv
from agents.dpo import DPOConfig, train_dpo
from agents.sft import SFTConfig, summed_nll, train_sft
from reward_models import RewardConfig, train_reward_model
from reward_models.preferences import Ranking
from tests.agents.test_dpo import RANKINGS
from tests.agents.test_sft import RECORDS
from tests.conftest import tiny_model
from tests.processes import in_processes
from tests.sharded import in_shares, shared_out
from textenv.lm import Responses, load_language_model
from textenv.training.batches import Ragged
from textenv.training.memory.sharding import shard
from textenv.training.processes import is_main

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


def test_processes_that_start_with_other_weights_go_on_with_those_of_the_first():
    def work():
        model = tiny_model()
        if not is_main():
            with torch.no_grad():
                for weight in model.model.parameters():
                    weight.mul_(2)
        return weights(train_sft(model, RECORDS[:5], SFTConfig(**SETTINGS)))

    first, second = shared_out(work)
    assert torch.equal(first, second)
    assert torch.equal(first, shared_out(lambda: weights(sft()))[0])


def test_rows_of_one_length_in_one_process_and_of_many_in_the_other_meet_in_as_many_passes():
    """What one process alone would look at, be it padding or groups of similar length, is no reason for a pass."""

    def work():
        model = tiny_model().model
        shares = shard(model, [model])
        lengths = [5, 5, 5] if is_main() else [1, 9, 3]
        prompts, responses = Ragged([[1, 2]] * 3), Ragged([[3] * size for size in lengths])
        index = torch.arange(3)
        batch = Responses(*prompts.padded(index, left=True), *responses.padded(index))
        with shares.scattered():
            shares(lambda: summed_nll(model, batch)).backward()
        return sum(lengths)

    assert shared_out(work) == [15, 13]


def test_responses_of_one_length_in_one_process_and_of_many_in_the_other_train_a_reward_model(monkeypatch):
    monkeypatch.setattr(textenv.lm.batch, "_FULL", 1)  # a pass of few tokens is split like one of many
    alike = Ranking("the", ("sky is blue", "red is green"))
    mixed = Ranking("the", ("sky", "sky is blue the grass is green the sky is not red is the sky blue"))
    config = RewardConfig(batch_size=2, epochs=3, learning_rate=1e-3, normalize=False)

    def work():
        return weights(train_reward_model(tiny_model(), [alike, mixed], config))

    first, second = shared_out(work)
    assert torch.equal(first, second)
    assert ((first - work()).abs() > 1e-4).float().mean() < 0.01


def test_a_reward_model_of_which_a_part_is_frozen_is_refused():
    def work():
        with contextlib.redirect_stderr(None):
            train_reward_model(tiny_model(), RANKINGS, RewardConfig(freeze_embeddings=True))

    _, errors = in_processes(in_shares(work))
    assert all("must train all weights, got" in error and "freeze_…" in error for error in errors), errors
