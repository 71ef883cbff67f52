"""The summary of an evaluation, worked out by hand. How agents are run stands in the tests of the agents."""

import numpy as np
import pytest

from textenv.evaluation import Evaluation


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
