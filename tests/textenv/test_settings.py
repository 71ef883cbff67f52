"""Ranges of settings: what each config refuses, and how it says so."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from annotated_types import Ge, Lt

from agents.demo.run import DemoConfig
from agents.grpo import GRPOConfig
from agents.ppo import PPOConfig
from agents.reinforce import ReinforceConfig
from agents.rloo import RLOOConfig
from agents.sft import SFTConfig
from reward_models.benchmark.suites import BenchmarkConfig
from reward_models.training.trainer import RewardConfig
from textenv.config import TaskConfig
from textenv.settings import Fraction, Positive, PositiveInt, check_value, fits

TASK = {"prompts": ["p"], "reference": "r", "reward_model": "m", "max_prompt_tokens": 4, "max_new_tokens": 4}
CONFIGS = {
    TaskConfig: TASK,
    PPOConfig: {},
    RLOOConfig: {},
    GRPOConfig: {},
    ReinforceConfig: {},
    SFTConfig: {},
    RewardConfig: {},
    BenchmarkConfig: {},
    DemoConfig: {},
}


def fields(kinds):
    for config, given in CONFIGS.items():
        for field in dataclasses.fields(config):
            value = given.get(field.name, field.default)
            if type(value) in kinds:
                yield pytest.param(config, field.name, id=f"{config.__name__}.{field.name}")


def refused(config, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be ") as caught:
        config(**{**CONFIGS[config], name: value})
    assert f"got {value!r}." in str(caught.value)


@pytest.mark.parametrize(("config", "name"), list(fields((int, float))))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", [1], -1], ids=repr)
def test_no_number_of_any_config_takes_what_is_none_or_lies_below_its_range(config, name, value):
    refused(config, name, value)


@pytest.mark.parametrize(("config", "name"), list(fields((int,))))
def test_no_count_of_any_config_takes_a_fraction(config, name):
    refused(config, name, 1.5)


@pytest.mark.parametrize(("config", "name"), list(fields((bool,))))
def test_no_switch_of_any_config_takes_a_number(config, name):
    refused(config, name, 1)


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (PPOConfig, "clip_range", 0),
        (PPOConfig, "value_clip_range", 0.0),
        (PPOConfig, "dual_clip", 1.0),
        (PPOConfig, "critic_warmup", -1),
        (PPOConfig, "value_function", "reward model"),
        (PPOConfig, "micro_batch_size", 0),
        (PPOConfig, "lr_decay_episodes", 0),
        (PPOConfig, "kl_target", -0.1),
        (PPOConfig, "gamma", 1.01),
        (PPOConfig, "max_grad_norm", 0),
        (SFTConfig, "max_grad_norm", 0),
        (RLOOConfig, "group_size", 1),
        (SFTConfig, "max_length", 1),
        (SFTConfig, "warmup_ratio", 1.0),
        (SFTConfig, "adam_beta2", 1.0),
        (SFTConfig, "adam_eps", 0),
        (PPOConfig, "adam_beta1", 1.0),
        (PPOConfig, "weight_decay", -0.01),
        (PPOConfig, "lr_schedule", "step"),
        (SFTConfig, "lr_schedule", "step"),
        (RewardConfig, "label_smoothing", 0.5),
        (RewardConfig, "early_stopping_patience", 0),
        (RewardConfig, "loss", "hinge"),
        (BenchmarkConfig, "gold_temperature", 0.0),
        (BenchmarkConfig, "responses", 1),
        (DemoConfig, "eval_split", "train"),
        (TaskConfig, "temperature", 0),
        (TaskConfig, "missing_eos_penalty", -1.0),
        (TaskConfig, "stop_tokens", "?"),
        (TaskConfig, "stop_tokens", [1]),
        (TaskConfig, "obs_mode", "text"),
        (TaskConfig, "reward_model", len),
    ],
)
def test_a_value_outside_its_range_is_refused(config, name, value):
    refused(config, name, value)


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (PPOConfig, {"learning_rate": 0, "entropy_coef": 0.0, "micro_batch_size": 1, "gamma": 1, "lam": 0}),
        (PPOConfig, {"batch_size": np.int64(8), "clip_range": np.float32(0.2), "value_clip_range": None}),
        (SFTConfig, {"max_grad_norm": None, "warmup_ratio": 0, "max_length": 2}),
        (TaskConfig, {"kl_coef": 0, "stop_tokens": ("?",), "reward_model": {"rule": "length"}}),
    ],
)
def test_the_ends_of_a_range_are_in_it(config, values):
    assert config(**{**CONFIGS[config], **values})


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (
            Annotated[float, Ge(0), "Use 0 to switch the KL off."],
            -0.1,
            "x must be 0 or more, got -0.1. Use 0 to switch the KL off.",
        ),
        (Positive, -1, "x must be above 0, got -1. Raise it."),
        (PositiveInt | None, 0, "x must be 1 or more, got 0. Raise it."),
        (PositiveInt | None, "a", "x must be a whole number or None, got 'a'."),
        (Fraction, 2, "x must be between 0 and 1, got 2. Lower it."),
        (Annotated[float, Ge(0), Lt(1)], 1, "x must be at least 0 and below 1, got 1. Lower it."),
        (Annotated[int, Lt(3)], 3, "x must be below 3, got 3. Lower it."),
        (Literal["a", "b"], "c", "x must be one of 'a', 'b', got 'c'."),
        (Literal[1], True, "x must be one of 1, got True."),
        (float, 10**400, f"x must be a finite number, got {10**400}."),
        (str | Mapping[str, Any], 3, "x must be a string or an object, got 3."),
        (tuple[str, ...], ["a", 1], "x must be a list, each item a string, got ['a', 1]."),
        (Path, 3, "x must be a path, got 3."),
    ],
)
def test_an_error_gives_the_rule_the_value_and_the_remedy(hint, value, message):
    with pytest.raises(ValueError) as caught:
        check_value("x", value, hint)
    assert str(caught.value) == message


def test_a_member_of_a_union_is_enough():
    hint = Annotated[int, Ge(2)] | Literal["all"] | None
    assert [fits(value, hint) for value in (2, "all", None, 1, "some")] == [True, True, True, False, False]
