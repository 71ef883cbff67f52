"""Real human preferences, where they are: ``TEXTENV_HH_DATA`` names Anthropic's harmless-base test pairs (1,156 of
them, every second line of the published file)."""

import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks.human_preferences import folds_of, without_prompt
from reward_models.benchmark.baselines import shorter
from reward_models.preferences import ASSISTANT, HUMAN, load_rankings

DATA = Path(os.environ.get("TEXTENV_HH_DATA", "hh-harmless-base.jsonl.gz"))
pytestmark = pytest.mark.skipif(not DATA.is_file(), reason="TEXTENV_HH_DATA names no file of human preferences")


@pytest.fixture(scope="module")
def rankings():
    return load_rankings(DATA, skip_malformed=True)


def test_pairs_that_do_not_share_their_prompt_are_named_or_left_out_and_counted(rankings, caplog):
    with pytest.raises(ValueError, match=r"line 628: two dialogues must be the same up to the last assistant turn"):
        load_rankings(DATA)
    assert len(load_rankings(DATA, skip_malformed=True)) == len(rankings) == 1_151
    assert "5 of 1156 preferences left out" in caplog.text


def test_prompt_and_reply_are_the_dialogue_again(rankings):
    assert all(r.prompt.startswith(HUMAN) and r.prompt.endswith(ASSISTANT) for r in rankings)
    assert not any(HUMAN in reply for r in rankings for reply in r.responses)


def test_the_shorter_reply_is_preferred_in_59_of_100_pairs(rankings):
    scores = np.array([shorter([""] * 2, list(r.responses)) for r in rankings])
    agreement = np.mean(0.5 + 0.5 * np.sign(scores[:, 0] - scores[:, 1]))
    assert agreement == pytest.approx(0.586, abs=0.001)


def test_no_prompt_is_in_two_folds(rankings):
    fold = folds_of(rankings, 5, seed=1)
    prompts = [{r.prompt for r, own in zip(rankings, fold, strict=True) if own == number} for number in range(5)]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 1_150
    assert min(map(len, prompts)) >= 229
    assert {r.prompt for r in without_prompt(rankings)} == {""}
