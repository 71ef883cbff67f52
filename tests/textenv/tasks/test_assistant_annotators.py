"""Simulated annotators against the closed form of Plackett–Luce."""

import math
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from textenv.stats import bayes_limits
from textenv.tasks import assistant

GOLD, TEMPERATURE = [1.0, -0.5, 0.3], 0.7


def plackett_luce(ranking, gold, temperature) -> float:
    """The product formula: the next place goes to one of those left, in proportion to exp(gold / temperature)."""
    weights = [math.exp(g / temperature) for g in gold]
    probability, left = 1.0, list(range(len(gold)))
    for index in ranking:
        probability *= weights[index] / sum(weights[i] for i in left)
        left.remove(index)
    return probability


@pytest.fixture(scope="module")
def rankings() -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    return [tuple(assistant.rank(GOLD, rng, TEMPERATURE)) for _ in range(20_000)]


def test_whole_rankings_come_as_often_as_the_product_formula_says(rankings):
    orders = list(permutations(range(3)))
    expected = [20_000 * plackett_luce(order, GOLD, TEMPERATURE) for order in orders]
    assert sum(expected) == pytest.approx(20_000)
    assert stats.chisquare([rankings.count(order) for order in orders], expected).pvalue > 1e-4


@pytest.mark.parametrize(("better", "worse"), [(0, 1), (0, 2), (2, 1)])
def test_a_pair_is_ordered_with_the_sigmoid_of_its_gold_difference(rankings, better, worse):
    p = 1 / (1 + math.exp(-(GOLD[better] - GOLD[worse]) / TEMPERATURE))
    observed = np.mean([r.index(better) < r.index(worse) for r in rankings])
    assert observed == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 20_000))


def test_little_noise_ranks_by_gold_and_much_noise_by_chance(rng):
    assert assistant.rank([0.0, 3.0, 1.0, 2.0], rng, 1e-3) == [1, 3, 2, 0]
    firsts = [assistant.rank([0.0, 3.0], rng, 1e6)[0] for _ in range(2000)]
    assert np.mean(firsts) == pytest.approx(0.5, abs=0.05)


def test_no_scorer_beats_the_bayes_accuracy_and_gold_reaches_it(rng):
    gold = rng.normal(size=(4000, 3)) * 2
    rankings = [assistant.rank(row, rng) for row in gold]
    first, second = np.triu_indices(3, k=1)
    ranked = np.take_along_axis(gold, np.array(rankings), axis=1)
    accuracy = np.mean(ranked[:, first] > ranked[:, second])
    best, floor = bayes_limits(gold[:, first] - gold[:, second], assistant.ANNOTATOR_TEMPERATURE)
    assert accuracy == pytest.approx(best.mean(), abs=0.015)
    p = 1 / (1 + np.exp(-(ranked[:, first] - ranked[:, second]) / assistant.ANNOTATOR_TEMPERATURE))
    assert -np.log(p).mean() == pytest.approx(floor.mean(), abs=0.015)


def test_sampled_rankings_are_records_of_permutations_and_follow_their_seed():
    prompts = [p.text for p in assistant.sample_prompts("train", 40, 0)]
    responses = [["it depends .", "use the soap on the chain .", "go away ."]] * 40
    records = assistant.sample_rankings(prompts, responses, 0)
    assert records == assistant.sample_rankings(prompts, responses, 0)
    assert records != assistant.sample_rankings(prompts, responses, 1)
    for record, prompt in zip(records, prompts, strict=True):
        assert record["prompt"] == prompt
        assert record["responses"] == responses[0]
        assert sorted(record["ranking"]) == [0, 1, 2]


def test_annotators_see_that_an_answer_was_cut_off():
    prompt = "user: how do i clean the bike ? assistant:"
    answer = "use the soap on the chain ."
    reasons = [["length", "eos"]] * 50
    records = assistant.sample_rankings(
        [prompt] * 50, [[answer, answer]] * 50, 0, finish_reasons=reasons, temperature=0.01
    )
    assert all(r["ranking"] == [1, 0] for r in records)


def test_bad_temperatures_are_refused(rng):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        assistant.rank([0.0, 1.0], rng, 0.0)
