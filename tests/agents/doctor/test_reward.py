"""Faults of reward models, each a function of a line or two."""

import math

import numpy as np
import pytest

import textenv
from agents.doctor.checks.reward import RewardPart
from reward_models.benchmark.layout import Inputs
from tests.agents.doctor.helpers import levels, seen
from textenv.conformance.subject import Skipped
from textenv.scoring import note_truncated

PROMPTS = [f"question {n} ?" for n in range(8) for _ in range(4)]
RESPONSES = [f"{'very ' * ((n * 7) % 4)}good answer {(n * 5) % 11}" for n in range(32)]


def part(model):
    return RewardPart(model, "mine", Inputs(PROMPTS, RESPONSES, {"finish_reason": ["eos"] * 32}))


def content(prompt, response):
    """A score that depends on both texts and not on length or white space."""
    return math.sin(sum(map(ord, prompt + "".join(response.split()))))


def fair(prompts, completions):
    return [content(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


ALL = ("finite", "asked again", "batch", "prompt", "end of the text", "length", "context")


def test_a_fair_reward_model_is_silent():
    healthy = part(fair)
    assert {name: seen(f"reward model: {name}", healthy) for name in ALL} == {name: [] for name in ALL}


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), None])
def test_a_score_that_is_no_number_is_found_once(value):
    def broken(prompts, completions):
        return [value if "answer 3" in c else 1.0 for c in completions]

    [(level, what)] = seen("reward model: finite", part(broken))
    assert level == "error"
    assert "answer 3" in what
    with pytest.raises(Skipped):
        seen("reward model: length", part(broken))


def test_a_random_reward_model_is_found():
    rng = np.random.default_rng(0)
    noisy = part(lambda prompts, completions: [s + 0.1 * rng.normal() for s in fair(prompts, completions)])
    assert levels("reward model: asked again", noisy) == ["error"]


def centred(prompts, completions):
    scores = np.array(fair(prompts, completions))
    return (scores - scores.mean()).tolist()


def ranked_in_batch(prompts, completions):
    return [score + 0.1 * row for row, score in enumerate(fair(prompts, completions))]


@pytest.mark.parametrize("model", [centred, ranked_in_batch])
def test_a_score_that_depends_on_its_batch_is_found(model):
    assert levels("reward model: asked again", part(model)) == []
    assert levels("reward model: batch", part(model)) == ["error"]


def test_a_reward_model_that_does_not_read_the_prompt_is_found():
    blind = part(lambda prompts, completions: fair([""] * len(prompts), completions))
    assert levels("reward model: prompt", blind) == ["warning"]
    alone = RewardPart(fair, "mine", Inputs(PROMPTS[:4], RESPONSES[:4], {}))
    with pytest.raises(Skipped):
        seen("reward model: prompt", alone)


@pytest.mark.parametrize(("weight", "level"), [(2.0, "warning"), (0.1, "note")])
@pytest.mark.parametrize("end", [" ", "\n"])
def test_a_score_that_reads_invisible_characters_is_found(end, weight, level):
    def picky(prompts, completions):
        scores = fair(prompts, completions)
        return [s - weight * c.endswith(end) for s, c in zip(scores, completions, strict=True)]

    assert levels("reward model: end of the text", part(picky)) == [level]


def test_a_reward_for_letters_is_found():
    letters = part(lambda prompts, completions: [len(c) + 1e-3 * content(p, c) for p, c in zip(prompts, completions)])
    [(level, what)] = seen("reward model: length", letters)
    assert level == "warning"
    assert "1.00 ± 0.0" in what
    some = part(lambda prompts, completions: [len(c) + 8 * content(p, c) for p, c in zip(prompts, completions)])
    assert levels("reward model: length", some) == ["note"]


def test_a_response_that_is_not_read_to_its_end_is_found():
    def short(prompts, completions):
        long = [completion for completion in completions if len(completion) > 25]
        note_truncated(long)
        return fair(prompts, completions)

    [(level, what)] = seen("reward model: context", part(short))
    assert level == "error"
    assert f"of {len(RESPONSES)} responses" in what


def test_a_prompt_that_does_not_fit_the_context_of_a_classifier_is_found():
    model = textenv.reward_model("assistant-rm")  # 48 positions
    texts = Inputs(["how do i fix the bike ? " * 8] * 4, ["first , check the bike ."] * 4, {})
    assert levels("reward model: context", RewardPart(model, "assistant-rm", texts)) == ["warning"]
