"""The exact world: its texts and scores by hand, and the shape of the problem it poses."""

import random
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
import torch

from textenv.tasks import micro
from textenv.tasks.exact import exact_world


@pytest.fixture(scope="module")
def world():
    return exact_world(gymnasium.make("textenv/Micro-v0"))


def test_importing_the_world_loads_no_torch():
    code = "import sys, textenv.tasks.micro as m; m.gold_scores(['a'], ['b']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tokens_are_letters_and_padding_is_eos():
    words = micro.tokenizer()
    assert len(words) == 8
    assert words.eos_token_id == words.pad_token_id == 0
    assert words("g a d").input_ids == [7, 1, 4]
    assert words.decode([7, 1, 4, 0], skip_special_tokens=True) == "g a d"


def test_prompts_have_one_to_four_letters_and_no_eos():
    lm = micro.reference()
    ids = [lm.encode_prompt(prompt) for prompt in micro.prompts()]
    assert sorted(len(row) for row in ids) == [1, 2, 2, 3, 4, 4]
    assert all(1 <= token <= 7 for row in ids for token in row)
    assert len(set(micro.prompts())) == 6


@pytest.mark.parametrize(
    ("prompt", "completion", "score"),
    [
        ("c e", "d f", 1.2),  # both wanted: 1.6 · (1 − 1/4)
        ("c e", "d", 0.8),  # 1.6 · (1 − 1/2)
        ("c e", "d d", 0.7),  # 1.6 · (1 − 1/4) − 0.5
        ("c e", "d f d f", 0.5),  # 1.6 · (1 − 1/16) − 2 · 0.5
        ("c e", "a b c e", 0.0),  # nothing wanted, nothing repeated
        ("c e", "a a a a", -1.5),
        ("e c", "d f", 1.2),
        ("c b b e", "d f", 1.2),  # the first and the last letter decide
        ("a", "b c", 0.8),  # one letter is first and last
        ("g", "a", 0.8),  # a follows g
        ("c e", "", 0.0),
        ("c e", "zebra zebra dd", -0.5),  # words out of the vocabulary repeat too
        ("hello there", "a b", 0.0),  # a prompt without letters wants nothing
    ],
)
def test_gold_scores_by_hand(prompt, completion, score):
    assert micro.gold_scores([prompt], [completion], finish_reason=["eos"]) == [pytest.approx(score)]


def test_gold_scores_pair_each_prompt_with_its_own_completion():
    assert micro.gold_scores(["a", "b"], ["b", "b"]) == [pytest.approx(0.8), 0.0]
    with pytest.raises(ValueError):
        micro.gold_scores(["a", "b"], ["b"])


def test_the_reference_is_always_the_same_and_leaves_every_random_state_alone():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    one, two = micro.reference(), micro.reference()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]
    assert one.model is not two.model
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_reference_is_far_from_uniform_and_ends_at_times(world):
    """EOS comes early in some places, late in others, and never takes over."""
    probs = world.ref_logprobs.exp()
    first = probs[:, world.lengths == 1].sum(1)  # P(EOS at once), one number a prompt
    by_length = torch.stack([probs[:, world.lengths == n].sum(1) for n in range(1, 5)], 1).mean(0)
    assert first.min() > 0.01
    assert first.max() < 0.5
    assert (by_length[:3] > 0.03).all()
    entropy = -(probs * world.ref_logprobs).sum(1)
    assert entropy.min() > 2.0  # broad enough to explore; uniform would be log 2801 = 7.9
    assert entropy.max() < 6.5


def test_there_is_something_to_learn_at_a_moderate_kl(world):
    """The optimum lies 0.42 above the reference and 1.00 nat away from it."""
    best = world.optimum()
    assert best.objective - float(world.objective(world.ref_logprobs)) > 0.3
    assert 0.7 < world.kl(best.logprobs) < 1.5


def test_a_model_that_counts_words_is_over_optimised(world):
    """Least squares on letter counts under the reference's own distribution: good there, and wrong far away.

    Tilting the reference to it, π_ref exp(proxy/β) with β falling, the proxy rises for ever; the gold score rises,
    peaks, and falls below where it started.
    """
    letters = [text.split() for text in world.texts]
    counts = torch.tensor([[row.count(a) for a in micro.LETTERS] + [1] for row in letters], dtype=torch.float64)
    proxy = torch.zeros_like(world.rewards)
    for x, gold in enumerate(world.rewards):
        root = world.ref_logprobs[x].exp().sqrt()[:, None]  # weighted least squares
        proxy[x] = (counts @ torch.linalg.lstsq(counts * root, gold[:, None] * root).solution)[:, 0]
    probs = world.ref_logprobs.exp()
    unexplained = (probs * (world.rewards - proxy) ** 2).sum(1)
    variance = (probs * world.rewards**2).sum(1) - (probs * world.rewards).sum(1) ** 2
    assert (unexplained < variance).all()  # it knows something

    tilted = [world.tilted(beta, proxy) for beta in (1e6, 3.0, 1.0, 0.5, 0.3, 0.1, 0.03, 0.01)]
    gold = np.array([world.expected_reward(logprobs) for logprobs in tilted])
    believed = np.array([float((logprobs.exp() * proxy).sum(1).mean()) for logprobs in tilted])
    kl = np.array([world.kl(logprobs) for logprobs in tilted])
    peak = int(gold.argmax())
    assert (np.diff(kl) > 0).all()
    assert (np.diff(believed) > 0).all()
    assert 0 < peak < len(gold) - 1
    assert (np.diff(gold[: peak + 1]) > 0).all()
    assert (np.diff(gold[peak:]) < 0).all()
    assert gold[peak] > gold[0] + 0.4
    assert gold[-1] < gold[0]
