"""Learners whose responses a server draws: what they learn from, how the server gets their weights, what is logged."""

import json
import logging

import gymnasium
import pytest
import torch

from agents import PPO, RLOO
from agents.logs.alarms import SAMPLER_GAP
from tests.completions import CompletionServer
from tests.conftest import tiny_model
from textenv.lm import load_language_model, sample_responses
from textenv.tasks.exact import exact_world
from textenv.vector import make_vec


@pytest.fixture
def server(model_folder):
    with CompletionServer(load_language_model(model_folder)) as running:
        yield running
        running.shutdown()


@pytest.fixture
def learner(make_vector, server):
    def make(kind=PPO, policy=None, **config):
        settings = {"batch_size": 16, "learning_rate": 1e-2, "epochs": 1, "minibatches": 1, "sampler_url": server.url}
        return kind(make_vector(8).unwrapped, kind.config_type(**{**settings, **config}), policy)

    return make


@pytest.mark.parametrize("value_function", ["head", "trunk"])
def test_a_learner_gets_the_log_probabilities_and_values_that_it_would_have_sampled(learner, server, value_function):
    agent = learner(value_function=value_function)
    torch.nn.init.normal_(list(agent.actor.value_head.parameters())[-2])  # it starts at zero
    rollout = agent.collect()
    seeds = [body["seed"] for body in server.asked("/v1/completions")]
    assert len(set(seeds)) == 16
    tokens = rollout.tokens
    for row in range(16):
        prompt = tokens.prompt_ids[row, 7 - int(tokens.prompt_lengths[row]) :].tolist()
        ids = tokens.response_ids[row, : int(tokens.response_lengths[row])].tolist()
        assert any(body["prompt"] == prompt for body in server.asked("/v1/completions"))
        how = {"rule": agent.task.rule, "pad_id": 0, "max_new_tokens": 6}
        found = [
            sample_responses(
                agent.policy.model,
                tokens.prompt_ids[row : row + 1],
                tokens.prompt_lengths[row : row + 1],
                **how,
                generator=torch.Generator().manual_seed(body["seed"]),
                value_head=agent.actor.value_head if value_function == "head" else None,
            )
            for body in server.asked("/v1/completions")
            if body["prompt"] == prompt
        ]
        [same, *_] = [one for one in found if one.response_ids[0, : len(ids)].tolist() == ids]
        torch.testing.assert_close(rollout.logprobs[row], same.logprobs[0], atol=1e-5, rtol=0)
        if value_function == "head":
            torch.testing.assert_close(rollout.values[row], same.values[0], atol=1e-5, rtol=0)
    assert bool((rollout.values[tokens.response_mask] != 0).all())
    assert bool((rollout.values[~tokens.response_mask] == 0).all())


def test_a_learner_on_a_server_that_is_kept_up_to_date_has_no_gap_and_first_ratios_of_one(learner, server, tmp_path):
    agent = learner(sampler_update="sglang-disk", sampler_folder=str(tmp_path / "weights"))
    agent.learn_with_checkpoints(48, tmp_path / "run")
    curves = [json.loads(line) for line in (tmp_path / "run" / "curves.jsonl").read_text().splitlines()]
    assert len(curves) == len(agent.history) == 3
    for log in curves:
        assert 0 < log["sampler_gap"] <= log["sampler_gap_max"] < 1e-5
        assert log["first_ratio_deviation"] < 1e-5
        assert not [name for name in log if name.startswith("alarm")]
    folders = [body["model_path"] for body in server.asked("/update_weights_from_disk")]
    assert len(set(folders)) == 3
    assert [str(folder) for folder in (tmp_path / "weights").iterdir()] == folders[-1:]  # the others are gone
    again = PPO.load(tmp_path / "run", agent.env)
    assert again.learn(16).history[-1]["sampler_gap"] < 1e-5


def test_a_server_that_keeps_its_weights_falls_behind_and_that_raises_an_alarm_once(learner, caplog):
    agent = learner(learning_rate=0.1)
    with caplog.at_level(logging.WARNING):
        agent.learn(64)
    gaps = [log["sampler_gap"] for log in agent.history]
    assert gaps[0] < 1e-5  # both are the reference
    assert min(gaps[1:]) > SAMPLER_GAP
    assert [log.get("alarm_sampler") for log in agent.history] == [None, 1.0, 1.0, 1.0]
    assert all(log["first_ratio_deviation"] < 1e-4 for log in agent.history)  # which alone would show nothing
    [said] = [record.getMessage() for record in caplog.records if "server's log-probabilities" in record.getMessage()]
    assert "update 2" in said
    assert "sampler_update" in said


def test_adapters_get_a_new_name_for_every_batch_and_the_old_one_is_taken_off(learner, server):
    agent = learner(RLOO, lora_rank=2, sampler_update="vllm-lora", learning_rate=0.1)
    agent.learn(48)
    assert max(log["sampler_gap_max"] for log in agent.history) < 1e-5
    names = [body["lora_name"] for body in server.asked("/v1/load_lora_adapter")]
    assert len(set(names)) == 3
    assert [body["lora_name"] for body in server.asked("/v1/unload_lora_adapter")] == names[:-1]
    assert list(server.named) == names[-1:]
    assert [body["model"] for body in server.asked("/v1/completions")] == [name for name in names for _ in range(16)]
    moved = [weight.abs().max() for name, weight in agent.policy.model.named_parameters() if "lora_B" in name]
    assert max(moved) > 0.1


def test_a_server_of_whole_weights_gets_the_adapters_in_them(learner, server):
    agent = learner(RLOO, lora_rank=2, sampler_update="sglang-disk", learning_rate=0.1)
    assert max(log["sampler_gap_max"] for log in agent.learn(32).history) < 1e-4  # W + BA in one sum or in two
    assert len(server.asked("/update_weights_from_disk")) == 2


def test_a_policy_without_adapters_has_none_to_load(learner):
    agent = learner(sampler_update="vllm-lora")
    with pytest.raises(ValueError, match=r"'vllm-lora' needs a policy with adapters, got .*Set lora_rank"):
        agent.learn(16)


def test_weights_that_the_server_cannot_load_end_the_run(learner, server, monkeypatch):
    monkeypatch.setattr(server, "reply", lambda path, body: {"success": False, "message": "no such folder"})
    agent = learner(sampler_update="sglang-disk")
    with pytest.raises(ValueError, match=r"must load the weights in '.*', got '.*no such folder.*sampler_folder"):
        agent.learn(16)


CALLED = []


def hook(folder):
    CALLED.append(load_language_model(folder))
    return "mine" if len(CALLED) < 3 else 3


def test_a_callable_of_ones_own_gets_the_folder_and_says_which_model_to_ask_for(learner, server, monkeypatch):
    CALLED.clear()
    monkeypatch.setattr(server, "named", type("Latest", (), {"__getitem__": lambda self, name: CALLED[-1]})())
    agent = learner(RLOO, sampler_update=f"{__name__}:hook")
    assert max(log["sampler_gap_max"] for log in agent.learn(32).history) < 1e-5
    assert {body["model"] for body in server.asked("/v1/completions")} == {"mine"}
    with pytest.raises(ValueError, match=r"must return the name of the model to ask for, or None .*, got 3"):
        agent.learn(16)


def test_ppo_learns_on_micro_from_the_responses_of_a_server():
    """The objective is enumerated: nothing of it is estimated."""
    env = make_vec("textenv/Micro-v0", 128, max_new_tokens=3)
    world = exact_world(gymnasium.make("textenv/Micro-v0", max_new_tokens=3))
    with CompletionServer(env.task.reference) as server:
        config = {"batch_size": 128, "learning_rate": 3e-3, "sampler_url": server.url, "sampler_update": "sglang-disk"}
        agent = PPO(env, PPO.config_type(**config)).learn(3 * 128)
        server.shutdown()
    assert max(log["sampler_gap_max"] for log in agent.history) < 1e-5
    models = env.task.reference.model, agent.policy.model
    reference, learned = (float(world.objective(world.sequence_logprobs(model))) for model in models)
    assert learned > reference + 0.02


def test_a_run_without_a_server_logs_no_gap(learner):
    assert not [name for name in learner(sampler_url=None).learn(16).history[0] if name.startswith("sampler")]


def test_one_wrong_answer_stops_the_batch(learner, server):
    server.answer = lambda completion: {"choices": [{**completion["choices"][0], "logprobs": None}]}
    with pytest.raises(ValueError, match="a response of the sampler must have a finite log-probability of each token"):
        learner(policy=tiny_model(seed=5)).learn(16)
