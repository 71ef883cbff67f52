"""The Bayes-gap benchmark: the judge itself reaches the limits, and shuffled labels are a coin."""

import numpy as np
import pytest

from benchmarks import bayes_gap
from reward_models.benchmark.suites import BenchmarkConfig, load_suite
from textenv.tasks import assistant


class Judge:
    """The truth, in log-odds."""

    score_unit = 1 / assistant.ANNOTATOR_TEMPERATURE

    def __init__(self, sign: float = 1.0):
        self._sign = sign

    def __call__(self, prompts, completions):
        return [self._sign * score for score in assistant.gold_scores(prompts, completions)]


@pytest.fixture(scope="module")
def items():
    return [item for item in load_suite("embedded-validation", BenchmarkConfig(limit=150, annotators=8, pool=4)).items
            if set(item.finish_reasons) == {"eos"}]  # fmt: skip


def test_the_judge_reaches_the_limit_the_floor_and_a_slope_of_one(items):
    figures = bayes_gap.measure(Judge(), items)
    assert abs(figures["gap"]) < 3 * figures["gap_se"]
    assert figures["nll_ratio"] == pytest.approx(1.0, abs=0.03)
    assert figures["calibration_slope"] == pytest.approx(1.0, abs=0.1)


def test_a_judge_upside_down_is_as_far_above_chance_as_it_should_be_below(items):
    right, wrong = bayes_gap.measure(Judge(), items), bayes_gap.measure(Judge(-1.0), items)
    assert wrong["accuracy"] == pytest.approx(1 - right["accuracy"])
    assert wrong["calibration_slope"] == pytest.approx(-right["calibration_slope"], rel=1e-6)


def test_training_data_are_fresh_rankings_of_the_split_and_the_coin_turns_half_of_them():
    records = bayes_gap.rankings("train", 300, 2, seed=1)
    assert len(records) == 300
    assert {assistant.parse_prompt(record.prompt) for record in records}
    flipped = bayes_gap.shuffled(records, 1)
    turned = [a.responses != b.responses for a, b in zip(records, flipped, strict=True)]
    assert np.mean(turned) == pytest.approx(0.5, abs=3 * 0.5 / np.sqrt(300))
    assert all(sorted(a.responses) == sorted(b.responses) for a, b in zip(records, flipped, strict=True))


def test_annotators_of_the_same_answers_disagree_as_often_as_they_should():
    """Three orders of one pair, 250 times: two annotators agree with probability p² + (1 − p)²."""
    records = bayes_gap.rankings("train", 250, 2, seed=2, labels=3)
    sets = [records[i : i + 3] for i in range(0, len(records), 3)]
    assert len(sets) == 250
    assert all(len({(r.prompt, frozenset(r.responses)) for r in labelled}) == 1 for labelled in sets)
    agree, expected = [], []
    for first, second, third in sets:
        gold = assistant.gold_scores([first.prompt] * 2, list(first.responses))
        p = 1 / (1 + np.exp(-(gold[0] - gold[1]) / assistant.ANNOTATOR_TEMPERATURE))
        expected.append(p**2 + (1 - p) ** 2)
        agree.append(np.mean([a.responses == b.responses for a, b in ((first, second), (second, third))]))
    assert np.mean(agree) == pytest.approx(np.mean(expected), abs=3 * 0.5 / np.sqrt(250))


def test_a_demand_fails_when_a_figure_does():
    good = {"training": "rankings", "gap": 0.02, "gap_se": 0.004, "nll_ratio": 1.05, "calibration_slope": 0.95}
    coin = [{**good, "training": "shuffled-6000", "gap": 0.28, "accuracy": value} for value in (0.44, 0.52, 0.53)]
    assert all(bayes_gap.demands([good, *coin]).values())
    worse = {"gap": 0.031, "nll_ratio": 1.09, "calibration_slope": 1.2}
    for key, value in worse.items():
        assert sum(not fine for fine in bayes_gap.demands([{**good, key: value}, *coin]).values()) == 1
    assert not all(bayes_gap.demands([{**good, "gap": -0.02}, *coin]).values()), "above the limit: a leak"
    learned = [{**row, "accuracy": value} for row, value in zip(coin, (0.51, 0.52, 0.53), strict=True)]
    assert not all(bayes_gap.demands([good, *learned]).values()), "all of them above a half: a leak"
