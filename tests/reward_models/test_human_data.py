"""Real human preferences, where they are: ``TEXTENV_HH_DATA`` names Anthropic's harmless-base test pairs (1,156 of
them, every second line of the published file)."""

import gzip
import json
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
    return load_rankings(DATA)


def test_every_pair_is_read_and_replies_of_several_turns_are_whole(rankings):
    assert len(rankings) == 1_156
    several = [number for number, r in enumerate(rankings) if any(ASSISTANT in reply for reply in r.responses)]
    assert several == [627, 844, 975, 976, 1018]
    assert rankings[627].prompt.endswith("Human: Isn't that drag kings?\n\nAssistant:")
    assert rankings[627].responses[0].startswith(" No. Men who impersonate stereotypical women are called drag kings.")
    assert rankings[627].responses[0].endswith("\n\nAssistant:  I think they call them that because")


def test_prompt_and_reply_are_the_dialogue_again(rankings):
    with gzip.open(DATA, "rt", encoding="utf-8") as file:
        dialogues = [json.loads(line) for line in file]
    for dialogue, r in zip(dialogues, rankings, strict=True):
        assert r.prompt.startswith(HUMAN)
        assert r.prompt.endswith(ASSISTANT)
        assert [r.prompt + reply for reply in r.responses] == [dialogue["chosen"], dialogue["rejected"]]


def test_the_shorter_reply_is_preferred_in_58_of_100_pairs(rankings):
    scores = np.array([shorter([""] * 2, list(r.responses)) for r in rankings])
    agreement = np.mean(0.5 + 0.5 * np.sign(scores[:, 0] - scores[:, 1]))
    assert agreement == pytest.approx(0.5848, abs=0.0001)


def test_no_prompt_is_in_two_folds(rankings):
    fold = folds_of(rankings, 5, seed=1)
    prompts = [{r.prompt for r, own in zip(rankings, fold, strict=True) if own == number} for number in range(5)]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 1_155
    assert min(map(len, prompts)) >= 231
    assert {r.prompt for r in without_prompt(rankings)} == {" "}
