"""Answers token by token, against plain transformers and the definition of the advantage."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu
from transformers import AutoModelForCausalLM

from agents import PPO, RLOO, PPOConfig, Reinforce, ReinforceConfig, RLOOConfig
from agents.comparison.tokens import saved_critic, token_figures
from agents.core.agent import LanguageModelAgent
from tests.conftest import word_tokenizer
from textenv.evaluation import evaluate
from textenv.lm import load_language_model

BETA = 0.1
FAST = {"batch_size": 8, "learning_rate": 3e-3, "value_learning_rate": 3e-2}


def trained(env, folder, algorithm=PPO, config=PPOConfig, **options):
    """A checkpoint whose policy and values have moved."""
    agent = algorithm(env, config(**FAST, **options))
    agent.learn(24)
    agent.save(folder)
    return agent


def figures(env, folder, rows):
    policy = load_language_model(folder / "policy")
    found = evaluate(LanguageModelAgent(policy, env.task, seed=1), env, prompt_ids=[3, 2, 1, 0])
    critic = saved_critic(folder, policy, env.task)
    return found, token_figures(found, np.array(rows), env.task, critic)


@torch.no_grad()
def plain_values(folder, prompt, tokens):
    """The saved head on the hidden states that transformers itself gives for one row."""
    model = AutoModelForCausalLM.from_pretrained(folder / "policy").eval()
    ids = torch.tensor([word_tokenizer()(prompt).input_ids + tokens])
    hidden = model(ids, output_hidden_states=True).hidden_states[-1][0, -len(tokens) - 1 : -1]
    head = {name.removeprefix("value_head."): w for name, w in load_file(folder / "value.safetensors").items()}
    inner = gelu(hidden @ head["features.weight"].T + head["features.bias"])
    return (inner @ head["output.linear.weight"].T + head["output.linear.bias"]).squeeze(1)


@pytest.mark.parametrize("per_token_kl", [True, False])
def test_with_lambda_one_value_plus_advantage_is_what_the_rest_of_the_answer_earned(
    make_vector, tmp_path, per_token_kl
):
    env = make_vector(4).unwrapped
    trained(env, tmp_path / "run", per_token_kl=per_token_kl)
    found, tokens = figures(env, tmp_path / "run", [3, 1])
    for row, answer in zip([3, 1], tokens, strict=True):
        length = found.lengths[row]
        assert len(answer.pieces) == len(answer.kl) == len(answer.values) == len(answer.advantages) == length
        assert answer.kl == pytest.approx(found.kl_per_token[row, :length].tolist())
        assert sum(answer.kl) == pytest.approx(found.kl[row], abs=1e-5)
        ids = found.response_ids[row, :length].tolist()
        own = plain_values(tmp_path / "run", found.prompts[row], ids)
        assert answer.values == pytest.approx(own.tolist(), abs=1e-5)
        assert max(map(abs, answer.values)) > 1e-3
        for t in range(length):
            charged = sum(answer.kl[t:]) if per_token_kl else sum(answer.kl)
            rest = found.rm_scores[row] - BETA * charged
            assert answer.values[t] + answer.advantages[t] == pytest.approx(rest, abs=1e-5)


def test_with_lambda_zero_the_advantage_is_the_error_of_one_step(make_vector, tmp_path):
    env = make_vector(4).unwrapped
    trained(env, tmp_path / "run", gamma=0.9, lam=0.0)
    found, tokens = figures(env, tmp_path / "run", [0])
    answer, length = tokens[0], found.lengths[0]
    after = [*answer.values[1:], 0.0]
    rewards = [-BETA * kl for kl in answer.kl]
    rewards[-1] += found.rm_scores[0]
    expected = [rewards[t] + 0.9 * after[t] - answer.values[t] for t in range(length)]
    assert answer.advantages == pytest.approx(expected, abs=1e-5)


def test_values_learned_in_another_unit_are_shown_as_rewards(make_vector, tmp_path):
    env = make_vector(4).unwrapped
    agent = trained(env, tmp_path / "run", Reinforce, ReinforceConfig, scale_rewards=True)
    found, tokens = figures(env, tmp_path / "run", [2])
    ids = found.response_ids[2, : found.lengths[2]].tolist()
    unit = float(agent.return_unit.var) ** 0.5
    assert abs(unit - 1) > 0.05
    own = plain_values(tmp_path / "run", found.prompts[2], ids)
    assert tokens[0].values == pytest.approx((own * unit).tolist(), abs=1e-5)
    rest = [found.rm_scores[2] - BETA * sum(tokens[0].kl[t:]) for t in range(len(ids))]
    assert np.add(tokens[0].values, tokens[0].advantages) == pytest.approx(rest, abs=1e-5)
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    state["return_unit"]["var"] = 0.0  # rewards that were all the same have no unit
    (tmp_path / "run" / "state.json").write_text(json.dumps(state))
    critic = saved_critic(tmp_path / "run", load_language_model(tmp_path / "run" / "policy"), env.task)
    assert critic.unit == 1.0


def test_a_value_function_with_a_trunk_of_its_own_is_read_too(make_vector, tmp_path):
    env = make_vector(4).unwrapped
    agent = trained(env, tmp_path / "run", value_function="trunk")
    critic = saved_critic(tmp_path / "run", load_language_model(tmp_path / "run" / "policy"), env.task)
    for name, weight in agent.actor.state_dict().items():
        torch.testing.assert_close(critic.actor.state_dict()[name], weight, rtol=0, atol=0)


def test_what_a_model_does_not_have_is_left_out(make_vector, model_folder, tmp_path):
    env = make_vector(4).unwrapped
    RLOO(env, RLOOConfig(batch_size=8, group_size=2)).save(tmp_path / "rloo")
    policy = load_language_model(model_folder)
    assert saved_critic(model_folder, policy, env.task) is None
    assert saved_critic(tmp_path / "rloo", policy, env.task) is None
    assert saved_critic("assistant-sft", policy, env.task) is None
    agent = LanguageModelAgent(policy, env.task)
    agent.knows_logprobs = False
    answer = token_figures(evaluate(agent, env), np.array([0]), env.task)[0]
    assert answer[1:] == (None, None, None)


def test_without_a_kl_there_are_values_but_no_advantages(make_vector, tmp_path):
    env = make_vector(4).unwrapped
    agent = trained(env, tmp_path / "run")
    agent.knows_logprobs = False
    critic = saved_critic(tmp_path / "run", agent.policy, env.task)
    answer = token_figures(evaluate(agent, env), np.array([0]), env.task, critic)[0]
    assert answer.values is not None
    assert (answer.kl, answer.advantages) == (None, None)


def test_a_value_function_of_other_models_is_an_error(make_vector, tmp_path):
    env = make_vector(4).unwrapped
    agent = trained(env, tmp_path / "run")
    weights = load_file(tmp_path / "run" / "value.safetensors")
    save_file({name: w[:1].clone() for name, w in weights.items()}, tmp_path / "run" / "value.safetensors")
    with pytest.raises(ValueError, match="must fit the environment's models"):
        saved_critic(tmp_path / "run", agent.policy, env.task)


def test_each_token_is_what_it_adds_to_the_text_and_an_ending_has_its_name(make_vector, model_folder):
    env = make_vector(4).unwrapped
    found = evaluate(LanguageModelAgent(load_language_model(model_folder), env.task, seed=3), env)
    for row, answer in enumerate(token_figures(found, np.arange(4), env.task)):
        ended = found.finish_reasons[row] == "eos"
        assert "".join(answer.pieces[: -1 if ended else None]) == found.responses[row]
        assert (answer.pieces[-1] == "<eos>") is ended
    assert {"eos", "length"} == set(found.finish_reasons)
