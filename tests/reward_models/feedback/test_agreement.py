"""Agreement by hand, and Krippendorff's own worked example."""

import math

import numpy as np
import pytest

from reward_models.feedback.agreement import agreement, alpha, alpha_of_pairs, kendall_w, levels_of, position_bias
from reward_models.feedback.project import Annotation, Item, Response

NA = None
PUBLISHED = [  # Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, section C: observers × units
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NA, NA, NA],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NA, 3],
    [NA, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NA],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NA],
]


def said(item, annotator, ranking, shown=None, seconds=10.0, action="rank"):
    places = sorted(place for group in ranking for place in group)
    return Annotation(item, annotator, action, ranking, {}, {}, "", tuple(shown or places), seconds, 0.0)


def items(count, k, known=None):
    return {n: Item(n, f"prompt {n}", tuple(Response(str(i)) for i in range(k)), "", known) for n in range(count)}


@pytest.mark.parametrize(("level", "value"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorffs_published_example(level, value):
    values = np.arange(1.0, 6.0)
    counts = np.array([[sum(own == v for own in unit) for v in values] for unit in zip(*PUBLISHED, strict=True)])
    assert alpha(counts, values, level) == pytest.approx(value, abs=0.0005)


def test_alpha_of_two_annotators_by_hand():
    agree, differ = [[0, 1], [0, 1]], [[0, 1], [1, 0]]
    assert alpha_of_pairs([agree], 0).value == 1
    # Both directions of the one pair hold −1 and 1 once each: n = 4, δ² = (2 + 2 − 2)² = 4, D_o = 4,
    # D_e = 2 · 2 · 2 · 4 / (4 · 3) = 8/3, α = 1 − 4 / (8/3)
    assert alpha_of_pairs([differ], 0).value == pytest.approx(-0.5)


def test_one_annotator_or_ties_alone_have_no_alpha():
    assert math.isnan(alpha_of_pairs([], 10).value)
    assert math.isnan(alpha_of_pairs([[[0, 0], [0, 0]]], 10).value)


def test_the_interval_of_alpha_holds_it_and_narrows_with_more_items():
    rng = np.random.default_rng(0)
    groups = [[[0, 1, 2], [0, 1, 2] if rng.random() < 0.7 else [2, 1, 0]] for _ in range(400)]
    few, many = alpha_of_pairs(groups[:40], 200), alpha_of_pairs(groups, 200)
    for found in (few, many):
        assert found.ci95[0] < found.value < found.ci95[1]
    assert np.ptp(many.ci95) < 0.6 * np.ptp(few.ci95)


def test_kendalls_w_by_hand():
    # Sums of ranks 4, 6, 8, 12 around 7.5: S = 35, and 12 · 35 / (9 · 60)
    assert kendall_w([[0, 1, 2, 3], [1, 0, 2, 3], [0, 2, 1, 3]]) == pytest.approx(420 / 540)
    # Ranks 1.5, 1.5, 3 and 1, 2, 3: S = 6.5, and 12 · 6.5 / (4 · 24 − 2 · 6)
    assert kendall_w([[0, 0, 1], [0, 1, 2]]) == pytest.approx(78 / 84)
    assert math.isnan(kendall_w([[0, 0], [0, 0]]))


def test_levels_of_a_ranking_with_ties():
    assert levels_of([[2], [0, 3], [1]]) == [1, 2, 0, 1]


def test_position_bias_by_hand():
    always = [said(0, "a", ((1,), (0,)), shown=(1, 0)), said(1, "a", ((0,), (1,)), shown=(0, 1))]
    assert position_bias(always).mean == pytest.approx(0.5)
    tied = [said(0, "a", ((0, 1), (2, 3)), shown=(1, 2, 3, 0))]  # half of the first rank, a quarter by chance
    assert position_bias(tied).mean == pytest.approx(0.25)
    never = said(2, "a", ((1,), (0,)), shown=(0, 1))
    # ½, ½ and −½: a standard error of √(1/3)/√3 = 1/3, and Student's t of two degrees of freedom is 4.303
    assert position_bias([*always, never]).ci95 == pytest.approx(4.3027 / 3, abs=1e-4)
    assert math.isnan(position_bias(always).ci95)


def test_each_annotators_figures_by_hand():
    known = ((0,), (1,), (2,))
    annotations = [
        said(0, "Ann", ((0,), (1,), (2,)), seconds=4),
        said(0, "Bob", ((0,), (2,), (1,)), seconds=6),  # two of three pairs as Ann
        said(1, "Ann", ((0, 1), (2,)), seconds=8),  # one half, two right
        said(2, "Bob", (), action="skip", seconds=90),
    ]
    found = agreement({**items(3, 3), 1: items(2, 3, known)[1]}, annotations, resamples=10)
    ann, bob = found.annotators
    assert (ann.name, ann.ranked, ann.skipped, ann.seconds) == ("Ann", 2, 0, 6.0)
    assert (bob.name, bob.ranked, bob.skipped, bob.seconds) == ("Bob", 1, 1, 6.0)
    assert ann.agreement == bob.agreement == pytest.approx(2 / 3)
    assert ann.checks == pytest.approx(2.5 / 3)
    assert math.isnan(bob.checks)
    assert found.overlapping == 1
    assert found.kendall_w.mean == pytest.approx(0.75)  # sums 2, 5, 5 around 4: S = 6, and 12 · 6 / (4 · 24)


def test_equals_of_a_known_ranking_say_nothing_about_who_is_right():
    known = ((0,), (1, 2))
    annotations = [said(0, "Ann", ((0,), (1,), (2,))), said(0, "Bob", ((1,), (0,), (2,)))]
    ann, bob = agreement(items(1, 3, known), annotations, resamples=10).annotators
    assert (ann.checks, bob.checks) == (1.0, 0.5)  # of two pairs, not three
