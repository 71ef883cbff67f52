"""Battles, matches and ratings against figures worked out by hand."""

import math

import pytest

from reward_models.feedback.arena import Battle, battles_of, bradley_terry, judged, matches, ratings
from reward_models.feedback.project import Annotation, Item, Response


def battles(wins, ties, losses, first="a", second="b"):
    scores = [1.0] * wins + [0.5] * ties + [0.0] * losses
    return [Battle(f"prompt {i}", first, second, score) for i, score in enumerate(scores)]


def arena_item(number, first="x", second="y"):
    return Item(number, f"prompt {number}", (Response(first, "a"), Response(second, "b")), "", None)


def said(item, annotator, ranking):
    return Annotation(item, annotator, "rank", ranking, {}, {}, "", (0, 1), 1.0, 0.0)


def test_a_match_by_hand():
    (match,) = matches(battles(8, 2, 2))
    assert match[:5] == ("a", "b", 8, 2, 2)
    assert match.win_rate == pytest.approx(9 / 12)
    # p = 9/12, z = 1.96: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)
    assert match.ci95 == pytest.approx((0.4677, 0.9111), abs=1e-4)
    assert match.sign_test == pytest.approx(2 * (1 + 10 + 45) / 2**10)  # 0, 1 or 2 of 10


def test_the_side_on_which_a_model_stands_does_not_matter():
    turned = [Battle(b.prompt, "b", "a", 1 - b.score) for b in battles(5, 1, 2)]
    (match,) = matches([*battles(5, 1, 2), *turned])
    assert match[:5] == ("a", "b", 10, 2, 4)


def test_two_models_are_rated_by_the_log_odds():
    strong, weak = ratings(battles(30, 0, 10), resamples=200)
    assert (strong.model, weak.model) == ("a", "b")
    assert strong.rating - weak.rating == pytest.approx(400 * math.log10(3), rel=0.01)
    assert (strong.rating + weak.rating) / 2 == pytest.approx(1000)
    assert strong.ci95[0] < strong.rating < strong.ci95[1]
    assert strong.battles == weak.battles == 40


def test_a_tie_is_half_a_win_for_either_side():
    # 30 wins and 40 ties are 50 points, 10 losses and 40 ties are 30
    strong, weak = ratings(battles(30, 40, 10), resamples=2)
    assert strong.rating - weak.rating == pytest.approx(400 * math.log10(50 / 30), rel=0.01)


def test_three_models_are_rated_through_the_one_they_met():
    found = ratings([*battles(30, 0, 10), *battles(30, 0, 10, "b", "c")], resamples=20)
    points = {own.model: own.rating for own in found}
    assert points["a"] - points["c"] == pytest.approx(2 * 400 * math.log10(3), rel=0.02)


def test_strengths_stay_finite_where_one_wins_all():
    strengths = bradley_terry(2, [(0, 1, 1.0)] * 20)
    assert 1 < strengths[0] - strengths[1] < 20


def test_the_interval_resamples_prompts_whose_battles_belong_together():
    # One prompt that a always wins, one that b always wins: a half of the draws hold one of them alone.
    one_sided = [Battle(f"prompt {i}", "a", "b", float(i)) for i in range(2) for _ in range(20)]
    for rating in ratings(one_sided, resamples=100):
        assert rating.ci95[0] < 800
        assert rating.ci95[1] > 1200


def test_a_single_prompt_has_no_interval():
    (first, _) = ratings(battles(1, 0, 0))
    assert all(map(math.isnan, first.ci95))
    assert ratings([]) == []


def test_several_annotators_of_an_item_are_one_battle_by_majority():
    items = [arena_item(1), arena_item(2), arena_item(3), arena_item(4, "same", "same"), arena_item(5)]
    annotations = [
        said(1, "Ann", ((0,), (1,))),
        said(1, "Bob", ((0,), (1,))),
        said(1, "Cat", ((1,), (0,))),
        said(2, "Ann", ((0,), (1,))),
        said(2, "Bob", ((1,), (0,))),
        said(3, "Ann", ((0, 1),)),
    ]
    found = battles_of(items, annotations)
    assert [battle.score for battle in found] == [1.0, 0.5, 0.5, 0.5]  # the fifth waits for somebody


def test_a_reward_model_judges_by_its_score():
    def longer(prompts, completions):
        return [len(completion) for completion in completions]

    items = [arena_item(1, "long", "x"), arena_item(2, "x", "long"), arena_item(3)]
    assert [battle.score for battle in judged(items, longer)] == [1.0, 0.0, 0.5]
