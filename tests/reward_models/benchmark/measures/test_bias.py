"""Length bias and responses read without their prompt."""

import json
import math

import numpy as np
import pytest

from reward_models.benchmark import run_benchmark
from reward_models.benchmark.layout import lay_out
from reward_models.benchmark.measures.length import length_bias, within_prompt_spearman
from reward_models.benchmark.measures.response_only import blanked, swapped
from reward_models.preferences import Ranking
from tests.reward_models.benchmark.models import CONFIG, length


def test_a_model_that_counts_letters_shows_a_length_bias_of_one_and_reads_no_prompt(suite):
    report = run_benchmark(length, suite, CONFIG)
    assert report.length.spearman == pytest.approx(1.0)
    assert report.length.accuracy_longer.value == 1.0
    assert report.length.accuracy_shorter.value == 0.0
    assert report.accuracy_per_pair.value == report.length.chosen_longer
    for name in ("blank", "swapped"):
        assert report.response_only[name].value == report.accuracy_per_pair.value
    assert all(edit.flips == 0 and edit.shift == 0 for edit in report.robustness.values())
    assert report.probes["best word repeated"].beats_mean == 1.0
    assert report.probes["empty"].beats_mean == 0.0
    assert any("best word repeated" in flag for flag in report.flags)
    assert run_benchmark(lambda p, c, **k: [-x for x in length(p, c)], suite, CONFIG).length.spearman == pytest.approx(
        -1.0
    )


def test_length_bias_is_measured_within_prompts():
    # Long answers to one prompt, short ones to the other: over all texts score falls with length, within both it rises.
    scores, lengths, prompt = (
        np.array([10.0, 20.0, 1.0, 2.0]),
        np.array([1.0, 2.0, 100.0, 200.0]),
        np.array([0, 0, 1, 1]),
    )
    assert within_prompt_spearman(scores, lengths, prompt) == pytest.approx([1.0, 1.0])
    # Equal lengths say nothing; equal scores do not go with length.
    assert within_prompt_spearman(scores, np.array([1.0, 1.0, 2.0, 1.0]), prompt) == pytest.approx([-1.0])
    assert within_prompt_spearman(np.ones(4), lengths, prompt) == [0.0, 0.0]


def test_only_a_prompt_blind_model_is_flagged_as_ignoring_prompts():
    records = [{"prompt": f"say {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(60)]

    def blind(prompts, completions, **columns):
        return [float(text.startswith("good")) for text in completions]

    def reads(prompts, completions, **columns):
        same = (prompt.split()[-1:] == text.split()[-1:] for prompt, text in zip(prompts, completions, strict=True))
        return [float(text.startswith("good")) * ok for text, ok in zip(completions, same, strict=True)]

    assert any("does not read the prompt" in flag for flag in run_benchmark(blind, records, CONFIG).flags)
    report = run_benchmark(reads, records, CONFIG)
    assert not any("does not read the prompt" in flag for flag in report.flags)
    assert report.accuracy_per_pair.value == 1.0
    assert report.response_only["swapped"].value == report.response_only["blank"].value == 0.5  # all ties


def test_columns_of_a_record_reach_the_model_and_go_along_when_prompts_are_swapped():
    records = [
        {"prompt": f"{i} + 1 = ?", "chosen": f"{i + 1}", "rejected": f"{i + 2}", "answer": i + 1} for i in range(30)
    ]

    def exact(prompts, completions, answer):
        return [float(text == str(right)) for text, right in zip(completions, answer, strict=True)]

    report = run_benchmark(exact, records, CONFIG)
    assert report.accuracy_per_pair.value == 1.0
    assert report.response_only["blank"].value == 1.0  # it reads the column, not the prompt
    assert report.response_only["swapped"].value < 0.6


def test_a_single_prompt_cannot_be_swapped():
    report = run_benchmark(length, [{"prompt": "p", "chosen": "aa", "rejected": "b"}], CONFIG)
    assert report.response_only["swapped"] is None
    assert json.dumps(report.to_json(), allow_nan=False)


def test_swapped_prompts_are_never_their_own(suite):
    layout = lay_out(suite.items)
    texts = swapped(layout, seed=0)
    assert all(a != b for a, b in zip(texts.prompts, layout.texts.prompts, strict=True))
    partner = {}
    for own, other in zip(layout.texts.prompts, texts.prompts, strict=True):
        assert partner.setdefault(own, other) == other  # one for all of its responses


def test_length_bias_is_the_one_done_by_hand():
    lengths = [(21, 19), (30, 10), (10, 30), (10, 10)]  # 2 of 21 is less than a tenth, 2 of 19 more
    items = [Ranking(f"p{i}", ("a" * a, "b" * b), (0, 1), gold=(1.0, 0.0)) for i, (a, b) in enumerate(lengths)]
    # The scores: wrong, right, tied, right.
    scores = np.array([0.0, 1.0, 1.0, 0.0, 5.0, 5.0, 1.0, 0.0])
    found = length_bias(lay_out(items), scores, resamples=20, seed=0)
    assert found.chosen_longer == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    parts = found.accuracy_longer, found.accuracy_shorter, found.accuracy_matched
    assert [(part.value, part.pairs) for part in parts] == [(1.0, 1), (0.5, 1), (0.5, 2)]
    # Rank correlations of two: −1, 1, and 0 for equal scores; equal lengths do not count. Deviation 1, three
    # prompts, t(2) = 4.303.
    assert (found.spearman, found.ci95) == pytest.approx((0.0, 4.30265 / math.sqrt(3)))
    assert found.gold_spearman == pytest.approx((1 + 1 - 1) / 3)


def test_lengths_match_within_a_tenth_of_the_longer_one_whichever_is_preferred():
    # 2 of 21 is less than a tenth, 3 of 22 more; of 19 both would be
    items = [Ranking(f"p{b}", ("a" * 19, "b" * b)) for b in (21, 22)]
    found = length_bias(lay_out(items), np.array([1.0, 0.0, 0.0, 1.0]), resamples=20, seed=0)
    assert (found.accuracy_matched.value, found.accuracy_matched.pairs) == (1.0, 1)
    assert (found.accuracy_shorter.value, found.accuracy_shorter.pairs) == (0.0, 1)
    assert found.accuracy_longer is None


def test_without_its_prompt_a_response_keeps_how_it_ended_and_a_chat_keeps_nothing():
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "why ?"}]
    items = [
        Ranking("p", ("a", "b"), (0, 1), finish_reasons=("eos", "length"), columns={"answer": 1}),
        Ranking(chat, ("c", "d"), (0, 1), finish_reasons=("length", "length"), columns={"answer": 2}),
    ]
    layout = lay_out(items)
    other = swapped(layout, seed=0)
    assert (other.prompts, other.responses) == ([chat, chat, "p", "p"], ["a", "b", "c", "d"])
    assert other.columns == {"answer": [2, 2, 1, 1], "finish_reason": ["eos", "length", "length", "length"]}
    blank = blanked(layout.texts)
    assert blank.prompts == ["", "", *[[{"role": "user", "content": ""}]] * 2]
    assert blank._replace(prompts=layout.texts.prompts) == layout.texts
