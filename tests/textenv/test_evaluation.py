"""Evaluations worked out by hand. How our own agents are run stands in their tests."""

import numpy as np
import pytest

from tests.conftest import PROMPTS, WORDS
from textenv.evaluation import Evaluation, evaluate


def test_the_summary_has_the_means_of_what_is_known_and_counts_every_ending_but_the_budget():
    scores = np.array([1.0, 2.0, 6.0])
    found = Evaluation(
        prompts=["p", "q", "r"],
        responses=["a", "b", "c"],
        prompt_ids=np.arange(3),
        rewards=scores - 1,
        rm_scores=scores,
        kl=None,
        gold=None,
        lengths=np.array([2, 2, 6]),
        finish_reasons=["eos", "stop", "length"],
    )
    summary = found.summary()
    assert summary.keys() == {"reward", "rm_score", "response_tokens", "eos_rate", "episodes"}
    assert (summary["eos_rate"], summary["episodes"]) == (pytest.approx(2 / 3), 3.0)
    assert (summary["reward"].mean, summary["rm_score"].mean) == (2.0, 3.0)
    # Student's t of two degrees of freedom, 4.303, times √7 / √3
    assert summary["rm_score"].ci95 == pytest.approx(4.302653 * np.sqrt(7 / 3))
    known = found._replace(kl=scores / 10, gold=scores * 10).summary()
    assert (known["kl"].mean, known["gold_score"].mean) == (pytest.approx(0.3), 30.0)


def test_of_an_agent_that_steps_the_first_episode_of_every_slot_counts(make_vector):
    eos, red, blue = (WORDS.index(word) for word in ("<eos>", "red", "blue"))
    actions = iter(zip([eos, blue, eos, blue, eos, blue], [red] * 6, strict=True))

    class Scripted:
        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            return np.array(next(actions)), state

    found = evaluate(Scripted(), make_vector(2).unwrapped, prompt_ids=[2, 0])
    assert (found.prompts, found.responses) == ([PROMPTS[2], PROMPTS[0]], ["", "red red red red red red"])
    assert (found.lengths.tolist(), found.finish_reasons) == ([1, 6], ["eos", "length"])
    # Letters of the prompt for a hundredth each, words for −0.3, and half a point for the cut.
    assert found.rm_scores.tolist() == pytest.approx([0.01 * 3, 0.01 * 17 - 0.3 * 6 - 0.5])
