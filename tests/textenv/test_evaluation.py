"""Evaluations worked out by hand. How our own agents are run stands in their tests."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.conftest import PROMPTS, WORDS, word_tokenizer
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
        response_ids=np.zeros((3, 6), dtype=np.int64),
        kl_per_token=None,
    )
    summary = found.summary()
    assert summary.keys() == {"reward", "rm_score", "response_tokens", "eos_rate", "episodes"}
    assert (summary["eos_rate"], summary["episodes"]) == (pytest.approx(2 / 3), 3.0)
    assert (summary["reward"].mean, summary["rm_score"].mean) == (2.0, 3.0)
    # Student's t of two degrees of freedom, 4.303, times √7 / √3
    assert summary["rm_score"].ci95 == pytest.approx(4.302653 * np.sqrt(7 / 3))
    known = found._replace(kl=scores / 10, gold=scores * 10).summary()
    assert (known["kl"].mean, known["gold_score"].mean) == (pytest.approx(0.3), 30.0)


@pytest.mark.parametrize("obs_mode", ["dict", "tokens"])
def test_of_an_agent_that_steps_the_first_episode_of_every_slot_counts(make_vector, obs_mode):
    eos, red, blue = (WORDS.index(word) for word in ("<eos>", "red", "blue"))
    actions = iter(zip([eos, blue, eos, blue, eos, blue], [red] * 6, strict=True))

    class Scripted:
        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            return np.array(next(actions)), state

    found = evaluate(Scripted(), make_vector(2, obs_mode=obs_mode).unwrapped, prompt_ids=[2, 0])
    assert (found.prompts, found.responses) == ([PROMPTS[2], PROMPTS[0]], ["", "red red red red red red"])
    assert (found.lengths.tolist(), found.finish_reasons) == ([1, 6], ["eos", "length"])
    assert found.response_ids.tolist() == [[eos] + [0] * 5, [red] * 6]
    # Letters of the prompt for a hundredth each, words for −0.3, and half a point for the cut.
    assert found.rm_scores.tolist() == pytest.approx([0.01 * 3, 0.01 * 17 - 0.3 * 6 - 0.5])


def test_the_tokens_of_responses_of_any_width_are_kept_with_their_kl(make_vector):
    eos, red = WORDS.index("<eos>"), WORDS.index("red")
    drawn = iter([np.log([[0.5, 0.5]]), np.log([[0.25, 1.0, 1.0]])])
    beyond = [[-9.0] * 2]  # what stands behind a response plays no part

    class Short:
        """Its responses are wider than what was drawn."""

        def respond(self, observation, deterministic):
            logprobs = next(drawn)
            length = logprobs.shape[1]
            padded = np.concatenate([logprobs, beyond], axis=1)
            return Sampled(np.array([[red] * (length - 1) + [eos, 0, 0]]), np.array([length]), padded)

    class Sampled(NamedTuple):
        response_ids: np.ndarray
        response_lengths: np.ndarray
        logprobs: np.ndarray

    env = make_vector(1).unwrapped
    found = evaluate(Short(), env, prompt_ids=[0, 1])
    assert found.response_ids.tolist() == [[red, eos, 0, 0, 0, 0], [red, red, eos, 0, 0, 0]]
    rows = [word_tokenizer()(PROMPTS[i]).input_ids + found.response_ids[i, : i + 2].tolist() for i in (0, 1)]
    for i, row in enumerate(rows):
        with torch.no_grad():
            said = env.reference.model(torch.tensor([row])).logits[0].log_softmax(-1)
        own = [float(said[t - 1, row[t]]) for t in range(len(row) - i - 2, len(row))]
        policy = np.log([[0.5, 0.5], [0.25, 1.0, 1.0]][i])
        assert found.kl_per_token[i].tolist() == pytest.approx([*(policy - own), *[0] * (4 - i)], abs=1e-5)
        assert found.logprobs[i].tolist() == pytest.approx([*policy, *[0] * (4 - i)])
