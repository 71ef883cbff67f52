"""What is sampled is what is scored: 20,000 drawn responses against the enumerated policy, by χ²."""

from dataclasses import dataclass

import gymnasium
import numpy as np
import pytest
import torch
from scipy import stats

from textenv.lm import TokenRule, pad_left, sample_responses
from textenv.tasks.exact import ExactWorld, exact_world
from textenv.tasks.micro import gold_scores

DRAWS = 20_000
RULE = TokenRule(stop_ids=(0,))
PLAUSIBLE = 1e-4


@pytest.fixture(scope="module")
def world():
    return exact_world(gymnasium.make("textenv/Micro-v0"))


def draw(world, prompts, rule=RULE, seed=0, lengths=None):
    """Response numbers: which of the enumerated responses each row of ``prompts`` (numbers) got."""
    encoded = [world.reference.encode_prompt(world.prompts[x]) for x in prompts]
    ids, true_lengths = pad_left(encoded, world.reference.pad_id)
    sampled = sample_responses(
        world.reference.model,
        ids,
        true_lengths if lengths is None else lengths,
        max_new_tokens=4,
        rule=rule,
        pad_id=world.reference.pad_id,
        generator=torch.Generator().manual_seed(seed),
    )
    number = {
        tuple(y[:length]): row
        for row, (y, length) in enumerate(zip(world.response_ids.tolist(), world.lengths.tolist(), strict=True))
    }
    drawn = zip(sampled.response_ids.tolist(), sampled.response_lengths.tolist(), strict=True)
    return np.array([number[tuple(y[:length])] for y, length in drawn])


def p_value(drawn, logprobs):
    """χ² of drawn response numbers against log-probabilities; cells that expect fewer than 5 become one."""
    probs = logprobs.exp().numpy()
    expected = len(drawn) * probs / probs.sum()
    seen = np.bincount(drawn, minlength=len(probs))
    rare = expected < 5
    assert (~rare).sum() > 50  # a test of many cells, not of a few
    expected = np.append(expected[~rare], expected[rare].sum())
    return stats.chisquare(np.append(seen[~rare], seen[rare].sum()), expected).pvalue


def test_samples_follow_the_enumerated_policy(world):
    assert p_value(draw(world, [2] * DRAWS), world.ref_logprobs[2]) > PLAUSIBLE


def test_samples_follow_the_rule_they_are_scored_by(world):
    """Temperature and a banned early ending on *both* sides agree."""
    rule = TokenRule(temperature=0.7, min_new_tokens=2, stop_ids=(0,))
    same = ExactWorld(world.reference, world.prompts[:1], gold_scores, kl_coef=0.3, max_new_tokens=4, rule=rule)
    assert p_value(draw(same, [0] * DRAWS, rule), same.ref_logprobs[0]) > PLAUSIBLE


@dataclass(frozen=True, kw_only=True)
class TopK(TokenRule):
    """What the package has no place for: the five likeliest tokens only."""

    def logprobs(self, logits, steps):
        least = logits.topk(5, dim=-1).values[:, -1:]
        return super().logprobs(logits.masked_fill(logits < least, float("-inf")), steps)


@pytest.mark.parametrize(
    "rule",
    [
        TokenRule(stop_ids=(0,), temperature=0.9),
        TopK(stop_ids=(0,)),
        TokenRule(stop_ids=(0,), min_new_tokens=1),
    ],
    ids=["temperature 0.9", "top-k", "banned EOS"],
)
def test_the_test_rejects_another_distribution(world, rule):
    assert p_value(draw(world, [2] * DRAWS, rule), world.ref_logprobs[2]) < PLAUSIBLE


def mixed(world):
    """The prompts of 1 to 4 tokens in turn, so that every other row is left-padded and rows leave at other times."""
    return np.resize(np.arange(len(world.prompts)), DRAWS * 3)


def test_samples_of_a_batch_with_left_padding_follow_the_policy_of_each_prompt(world):
    which = mixed(world)
    drawn = draw(world, which)
    for x in range(len(world.prompts)):
        assert p_value(drawn[which == x], world.ref_logprobs[x]) > PLAUSIBLE, world.prompts[x]


def test_the_test_rejects_attention_to_the_padding(world):
    """The same batch with every prompt declared as long as the longest: padding is read as EOS tokens."""
    which = mixed(world)
    drawn = draw(world, which, lengths=torch.full((len(which),), 4))
    shorter = [x for x, prompt in enumerate(world.prompts) if len(prompt.split()) < 4]
    assert len(shorter) == 4
    for x in shorter:
        assert p_value(drawn[which == x], world.ref_logprobs[x]) < PLAUSIBLE, world.prompts[x]
