"""What is logged of a batch of episodes, worked out by hand."""

import pytest
import torch

import textenv
from agents import PPO, PPOConfig
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


@pytest.mark.parametrize("slots", [2, 3])
def test_a_learner_with_few_slots_collects_the_same_rollouts(make_vector, slots):
    kinds = [PPO(make_vector(8).unwrapped, PPOConfig(batch_size=16, rollout_slots=n)) for n in (None, slots)]
    seen = []

    def count(module, args, kwargs):
        if kwargs.get("use_cache"):
            seen.append(len(kwargs["input_ids"]))

    kinds[1].policy.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    at_once, waited = (kind.collect() for kind in kinds)
    assert max(seen) <= slots
    assert torch.equal(waited.tokens.response_ids, at_once.tokens.response_ids)
    torch.testing.assert_close(waited.logprobs, at_once.logprobs, atol=1e-5, rtol=0)
