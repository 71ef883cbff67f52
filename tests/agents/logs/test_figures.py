"""What is logged of an update, worked out by hand, and the alarms about it."""

import json
import logging
import math

import numpy as np
import pytest
import torch

import textenv
from agents import GRPO, PPO, RLOO, Reinforce
from agents.core.rollout import Stream
from agents.logs.alarms import alarms
from agents.logs.figures import MEASURED, add_figures, rollout_log, update_log
from tests.conftest import WORDS, tiny_model
from textenv.lm import Sampled, packing

EOS, RED = (WORDS.index(word) for word in ("<eos>", "red"))
LEARNERS = [PPO, RLOO, GRPO, Reinforce]


@pytest.fixture
def learner(make_vector):
    def make(kind=PPO, policy=None, env_options=(), **config):
        settings = {"batch_size": 16, "learning_rate": 3e-3, "epochs": 1, "minibatches": 1, **config}
        return kind(make_vector(16, **dict(env_options)).unwrapped, kind.config_type(**settings), policy)

    return make


def test_lengths_and_the_standard_error_of_the_kl_are_those_of_the_episodes(make_vector):
    textenv.register_reward_model("zero", lambda prompts, completions: [0.0] * len(prompts))
    env = make_vector(3, reward_model="zero").unwrapped
    ids = torch.tensor([[RED, EOS, EOS, EOS, EOS, EOS], [RED, RED, EOS, EOS, EOS, EOS], [RED] * 6])
    played = Sampled(ids, torch.tensor([2, 3, 6]), torch.zeros(3, 6), torch.zeros(3, 6))
    rollout = Stream(env, 0).collect(3, lambda observation: played)
    kl = torch.tensor([[1.0, 0, 0, 0, 0, 0], [1.0, 1.0, 0, 0, 0, 0], [1.0, 1.0, 4.0, 0, 0, 0]])
    log = rollout_log(rollout._replace(kl_per_token=kl))
    assert (log["shortest_response"], log["longest_response"]) == (2.0, 6.0)
    assert log["kl"] == 3.0  # of 1, 2 and 6, whose sample variance is (4 + 1 + 9) / 2 = 7
    assert log["kl_se"] == pytest.approx(math.sqrt(7 / 3))
    one = Stream(make_vector(1, reward_model="zero").unwrapped, 0).collect(
        1, lambda observation: Sampled(*(x[:1] for x in played))
    )
    assert "kl_se" not in rollout_log(one)


def test_an_update_logs_means_of_its_steps_the_extremes_of_all_and_the_first_deviation():
    step: dict[str, float] = {}
    add_figures(step, {"loss": torch.tensor(1.0), "ratio_max": 1.0, "ratio_min": 0.98, "update_tokens": 6})
    add_figures(step, {"loss": torch.tensor(2.0), "ratio_max": 1.01, "ratio_min": 1.0, "update_tokens": 4})
    assert step == {"loss": 3.0, "ratio_max": 1.01, "ratio_min": 0.98, "update_tokens": 10}
    later = {"loss": 5.0, "ratio_max": 1.7, "ratio_min": 0.99, "update_tokens": 10, "update_positions": 14}
    log = update_log([{**step, "update_positions": 11}, later])
    assert log == {
        "loss": 4.0,
        "ratio_max": 1.7,
        "ratio_min": 0.98,
        "first_ratio_deviation": pytest.approx(0.02),
        "update_tokens": 20,
        "padding_share": pytest.approx(5 / 25),
    }


@pytest.mark.parametrize("kind", LEARNERS)
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_one_halved_and_one_doubled_old_probability_are_the_extreme_ratios(learner, kind, micro_batch_size):
    agent = learner(kind, tiny_model(seed=5), learning_rate=0.0, micro_batch_size=micro_batch_size)
    rollout = agent.collect()
    assert agent.update(rollout)["first_ratio_deviation"] < 1e-5
    logprobs = rollout.logprobs.clone()
    logprobs[0, 0] -= math.log(2)  # was half as likely, so the ratio is 2
    logprobs[1, 0] += math.log(4)
    logprobs[~rollout.tokens.response_mask] = 99.0  # padding is no token
    log = agent.update(rollout._replace(logprobs=logprobs))
    assert log["ratio_max"] == pytest.approx(2.0, rel=1e-4)
    assert log["ratio_min"] == pytest.approx(0.25, rel=1e-4)
    assert log["first_ratio_deviation"] == pytest.approx(1.0, rel=1e-4)


def test_ratios_move_with_later_steps_and_the_first_deviation_does_not(learner):
    log = learner(epochs=4, minibatches=2, learning_rate=1e-2).learn(16).history[0]
    assert log["ratio_max"] > 1.01
    assert log["ratio_min"] < 0.99
    assert log["first_ratio_deviation"] < 1e-4


def test_packed_passes_have_no_padding(learner):
    assert learner(epochs=2).learn(16).history[0]["padding_share"] == 0.0


def test_passes_in_bfloat16_are_packed_whatever_their_padding_and_logged_so(learner, monkeypatch):
    monkeypatch.setattr(packing, "WORTH_IT", 1.0)
    assert learner().learn(16).history[0]["padding_share"] > 0
    assert learner(env_options={"dtype": "bfloat16"}).learn(16).history[0]["padding_share"] == 0.0


def test_padding_is_counted_over_every_pass_and_less_with_micro_batches_of_similar_length(learner, monkeypatch):
    monkeypatch.setattr(packing, "can_pack", lambda model: False)
    shares = []
    for size in (None, 2):
        agent = learner(micro_batch_size=size, epochs=2)
        rollout = agent.collect()
        lengths = np.sort(rollout.tokens.total_lengths.numpy())
        parts = lengths.reshape(-1, size or 16)
        real, passed = lengths.sum(), sum(len(part) * part.max() for part in parts)
        log = agent.update(rollout)
        assert log["update_tokens"] == 2 * real
        assert log["padding_share"] == pytest.approx(1 - real / passed)
        shares.append(log["padding_share"])
    assert shares[1] < shares[0]


def test_the_entropy_is_logged_where_the_bonus_computes_it_anyway(learner):
    assert "entropy" not in learner().learn(16).history[0]
    agent = learner(entropy_coef=0.01, micro_batch_size=3)
    rollout = agent.collect()
    with torch.no_grad():
        entropy = agent.actor.evaluate(rollout.tokens, agent.task, entropy=True).entropy
    mean = float(entropy.sum() / rollout.tokens.response_lengths.sum())
    assert agent.update(rollout)["entropy"] == pytest.approx(mean, rel=1e-5)


def test_speed_is_tokens_over_seconds_and_memory_is_known(learner):
    (log,) = learner(epochs=2).learn(16).history
    sampled = 16 * log["response_tokens"]
    assert log["rollout_tokens_per_second"] == pytest.approx(sampled / log["rollout_seconds"])
    assert log["update_tokens_per_second"] == pytest.approx(log["update_tokens"] / log["update_seconds"])
    assert 50 < log["memory_mb"] < 1e6
    assert set(log) >= set(MEASURED) - {"cuda_memory_mb"}
    assert all(type(value) is float for value in log.values())
    assert json.loads(json.dumps(log)) == log


# Alarms


HEALTHY = {"kl": 0.5, "kl_se": 0.1, "first_ratio_deviation": 1e-6, "eos_rate": 0.9}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"kl": -0.5, "kl_se": 0.1}, "alarm_kl"),
        ({"kl": -0.3, "kl_se": 0.1}, None),  # 3 standard errors
        ({"kl": -5e-4, "kl_se": 1e-8}, None),  # rounding
        ({"kl": -0.5}, "alarm_kl"),
        ({"first_ratio_deviation": 0.01}, "alarm_ratio"),
        ({"first_ratio_deviation": math.nan}, "alarm_ratio"),
        ({"first_ratio_deviation": 1e-4}, None),
        ({"eos_rate": 0.0}, "alarm_eos"),
        ({"eos_rate": 0.01}, None),
    ],
)
def test_what_no_healthy_run_has_is_marked_in_the_log(learner, change, name):
    task = learner().task.config
    assert alarms({**HEALTHY, **change}, [], task) == ({} if name is None else {name: 1.0})


def test_a_single_episode_has_no_standard_error_and_raises_no_alarm_about_its_kl(learner):
    log = {key: value for key, value in {**HEALTHY, "kl": -9.0}.items() if key != "kl_se"}
    assert alarms(log, [], learner().task.config) == {}


def test_bfloat16_may_be_further_off(learner):
    rough = {**HEALTHY, "first_ratio_deviation": 0.1, "kl": -0.1, "kl_se": 1e-3}
    assert alarms(rough, [], learner(env_options={"dtype": "bfloat16"}).task.config) == {}
    assert set(alarms(rough, [], learner().task.config)) == {"alarm_ratio", "alarm_kl"}


def test_responses_that_cannot_end_are_no_alarm(learner):
    task = learner(env_options={"min_new_tokens": 6, "max_new_tokens": 6}).task.config
    assert alarms({**HEALTHY, "eos_rate": 0.0}, [], task) == {}


@pytest.mark.parametrize(
    ("dropout", "expected", "cause"), [(True, "alarm_ratio", "dropout"), (False, "alarm_eos", "max_new_tokens")]
)
def test_an_alarm_names_its_causes_once_and_marks_every_update(learner, caplog, monkeypatch, dropout, expected, cause):
    """Dropout that is on in the pass that trains; a bias that makes the ending token impossible."""
    agent = learner(policy=tiny_model(seed=5))
    evaluate, model = agent.actor.evaluate, agent.policy.model

    def with_dropout(*arguments, **options):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        model.train()
        new = evaluate(*arguments, **options)
        model.eval()
        return new

    if dropout:
        monkeypatch.setattr(agent.actor, "evaluate", with_dropout)
    else:
        model.lm_head.bias = torch.nn.Parameter(-1e4 * (torch.arange(len(WORDS)) == EOS), requires_grad=False)
    with caplog.at_level(logging.WARNING):
        agent.learn(3 * 16)
    assert [expected in log for log in agent.history] == [True] * 3
    (message,) = [record.getMessage() for record in caplog.records if cause in record.getMessage()]
    assert message.startswith("ALARM, update 1: ")


def test_a_healthy_run_raises_no_alarm(learner, caplog):
    with caplog.at_level(logging.WARNING):
        agent = learner(PPO, epochs=2, minibatches=2).learn(5 * 16)
    assert not caplog.records
    assert not [name for log in agent.history for name in log if name.startswith("alarm")]
