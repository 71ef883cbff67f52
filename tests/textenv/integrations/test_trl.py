"""Reward functions as TRL calls them; what they return is what the environment pays before the KL."""

import dataclasses

import gymnasium
import numpy as np
import pytest

import textenv
from agents.core.agent import LanguageModelAgent
from tests.conftest import PROMPTS, tiny_model
from textenv import registry
from textenv.evaluation import evaluate
from textenv.integrations.trl import reward_function
from textenv.lm import load_language_model
from textenv.vector import make_vec

TRAINER = {"trainer_state": object(), "log_extra": print, "log_metric": print}
"""What TRL 1.16 passes besides columns."""


@pytest.fixture
def env_id(text_options):
    textenv.register("trl/Mine-v0", **text_options, missing_eos_penalty=0.75)
    yield "trl/Mine-v0"
    gymnasium.registry.pop("trl/Mine-v0")
    registry.ids._descriptions.pop("trl/Mine-v0")


def test_the_reward_is_what_the_environment_pays_before_the_kl(env_id, model_folder):
    env = make_vec(env_id, 8, kl_coef=0.0)
    agent = LanguageModelAgent(load_language_model(model_folder), env.task, seed=3)
    found = evaluate(agent, env, prompt_ids=np.arange(8) % len(PROMPTS))
    assert {"eos", "length"} == set(found.finish_reasons)
    ids = [row[:length].tolist() for row, length in zip(found.response_ids, found.lengths, strict=True)]
    reward = reward_function(env_id)
    paid = reward(prompts=found.prompts, completions=found.responses, completion_ids=ids, **TRAINER)
    assert paid == pytest.approx(found.rewards.tolist())
    assert all(type(score) is float for score in paid)
    whole = reward(found.prompts, found.responses)  # nothing says that one was cut
    cut = np.array([reason == "length" for reason in found.finish_reasons])
    assert np.subtract(whole, paid).tolist() == pytest.approx((cut * (0.75 + 0.5)).tolist())
    assert reward(["red"], ["blue"], completion_ids=[[]]) == pytest.approx([1 - 0.3 + 0.03 - 0.5 - 0.75])


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("textenv/Assistant-v0", "Assistant-v0"),
        ("micro-gold", "micro-gold"),
        ("textenv.tasks.assistant:gold_scores", "gold_scores"),
        ({"weighted": {"micro-gold": 1.0}}, "reward_model"),
    ],
)
def test_trl_logs_it_under_the_name_of_what_scores(name, called):
    assert reward_function(name).__name__ == called


def test_columns_of_the_data_set_reach_the_reward_model_and_those_of_the_trainer_do_not():
    seen = []

    def model(prompts, completions, **columns):
        seen.append(columns)
        return [1, 2]

    textenv.register_reward_model("trl-columns", model)
    assert reward_function("trl-columns")(["p", "q"], ["a", "b"], answer=["x", "y"], environments=["e"], **TRAINER) == [
        1.0,
        2.0,
    ]
    assert seen == [{"answer": ["x", "y"], "finish_reason": ["eos", "eos"]}]


def test_what_is_given_goes_before_what_the_id_says(env_id, text_options, monkeypatch):
    registry.environment_spec(env_id).kwargs["dtype"] = "bfloat16"
    asked = []
    monkeypatch.setattr(registry, "reward_model", lambda *how: asked.append(how))
    monkeypatch.setattr(registry, "language_model", lambda *how: asked.append(how) or tiny_model())
    reward_function(env_id)
    reward_function(env_id, reference="other", device="cuda:7", dtype="float32")
    scorer, own = text_options["reward_model"], text_options["reference"]
    assert asked == [
        (scorer, "cpu", "bfloat16"),
        (own, "cpu", "bfloat16"),
        (scorer, "cuda:7", "float32"),
        ("other", "cuda:7", "float32"),
    ]


def test_every_ending_token_of_the_reference_ends_a_completion():
    speaker = dataclasses.replace(tiny_model(), ending_ids=(0, 3))
    textenv.register_language_model("trl-endings", lambda: speaker)
    seen = []

    def model(prompts, completions, finish_reason):
        seen.extend(finish_reason)
        return [0.0] * len(prompts)

    textenv.register_reward_model("trl-reasons", model)
    reward = reward_function("trl-reasons", reference="trl-endings")
    reward(["p"] * 4, ["a"] * 4, completion_ids=[[1, 0], [1, 3], [3, 1], [1, 2]])
    assert seen == ["eos", "eos", "length", "length"]


def chat(text, role="user"):
    return [{"role": role, "content": text}]


def test_chats_arrive_as_text_and_as_messages():
    seen = []

    def model(prompts, completions, chat):
        seen.append((prompts, completions, chat))
        return [0.5]

    speaker = tiny_model()
    speaker.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}the"
    textenv.register_reward_model("trl-chat", model)
    textenv.register_language_model("trl-speaker", lambda: speaker)
    reward = reward_function("trl-chat", reference="trl-speaker")
    assert reward([chat("red is")], [chat("blue", "assistant")], completion_ids=[[3, 0]]) == [0.5]
    assert seen == [(["red is the"], ["blue"], [chat("red is")])]
    with pytest.raises(ValueError, match="rendered by a chat template, got none"):
        reward_function("trl-chat")([chat("red is")], [chat("blue")])
    for completion in (chat("a") + chat("b"), [{"role": "assistant", "tool_calls": []}]):
        with pytest.raises(ValueError, match="a completion must be a text or one message"):
            reward([chat("red is")], [completion])


def test_what_stands_for_no_reward_model_is_an_error():
    with pytest.raises(ValueError, match="an id must have a reward model, got 'textenv/Text-v0'"):
        reward_function("textenv/Text-v0")
    with pytest.raises(ValueError, match="got 'gone'"):
        reward_function("gone")
