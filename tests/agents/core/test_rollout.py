"""What is logged of a batch of episodes, worked out by hand."""

import pytest
import torch

import textenv
from agents.core.rollout import Stream
from agents.logs.figures import rollout_log
from tests.conftest import WORDS
from textenv.lm import Sampled

EOS, RED, STOP = (WORDS.index(word) for word in ("<eos>", "red", "?"))


def count_words(prompts, completions):
    return [float(len(completion.split())) for completion in completions]


def test_a_response_ends_by_eos_or_a_stop_token_and_is_cut_by_the_budget(make_vector):
    textenv.register_reward_model("count-words", count_words)
    env = make_vector(3, stop_tokens=("?",), reward_model="count-words", kl_coef=0.0).unwrapped
    ids = torch.tensor([[RED, EOS, EOS, EOS, EOS, EOS], [RED, STOP, EOS, EOS, EOS, EOS], [RED] * 6])
    lengths = torch.tensor([2, 2, 6])
    logprobs = torch.where(torch.arange(6) < lengths[:, None], -1.5, 0.0)
    played = Sampled(ids, lengths, logprobs, torch.zeros(3, 6))
    rollout = Stream(env, 0).collect(6, lambda observation: played)  # two rounds of three slots
    assert rollout.ended.tolist() == [True, True, False] * 2
    assert rollout.rm_scores.tolist() == [1.0, 2.0, 6.0] * 2  # a stop token is a word of the response, EOS is not
    log = rollout_log(rollout)
    assert log["eos_rate"] == pytest.approx(2 / 3)
    assert log["response_tokens"] == pytest.approx(10 / 3)
    assert log["reward"] == log["rm_score"] == pytest.approx(3.0)
    assert log["nll"] == pytest.approx(1.5)
    assert log["truncated_responses"] == 0.0
    assert "gold_score" not in log
