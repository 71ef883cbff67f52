"""The scores that RewardBench publishes, worked out by hand."""

import math

import numpy as np
import pytest

from reward_models.benchmark.measures.published import SECTIONS, published, ties_score
from reward_models.benchmark.report import heads, row
from reward_models.benchmark.run import run_benchmark
from reward_models.benchmark.suites import BenchmarkConfig
from reward_models.preferences import Ranking


def item(subset, wrong=3, right=1, **columns):
    responses = tuple(f"r{k}" for k in range(right + wrong))
    return Ranking("q", responses, (0,) * right + (1,) * wrong, category=subset, columns=columns)


def test_the_best_of_four_shares_its_point_among_equals_and_subsets_weigh_the_same():
    items = [item("Math"), item("Math"), item("Math"), item("Focus")]
    scores = [np.array(s, float) for s in ([2, 1, 0, 0], [1, 1, 0, 0], [0, 1, 2, 3], [5, 5, 5, 5])]
    found = published(items, scores)  # Math: (1 + 1/2 + 0)/3; Focus: 1/4
    assert found == pytest.approx({"Focus": 0.25, "Math": 0.5, "mean": 0.375})


def test_ties_weigh_accuracy_and_margins_as_published():
    items = [item("Ties", right=1, wrong=2, id="ref:1"), item("Ties", right=2, wrong=1, id="tied:1")]
    scores = [np.array([3.0, 1.0, 0.0]), np.array([2.0, 1.5, 0.5])]
    # Margins: ref 3 − 1 = 2, tied 1.5 − 0.5 = 1, within the correct ones 0.5. Both accurate; 1 > 0.5; min(2, 1) > 0.5.
    assert ties_score(items, scores) == pytest.approx(0.3 + 0.3 + 0.2 + 0.2 + 0.01 * math.tanh(1 / 0.5 - 1))
    # The reference answer below a wrong one: its accuracy and the hard margin go.
    scores[0] = np.array([0.0, 1.0, 0.0])
    assert ties_score(items, scores) == pytest.approx(0.3 + 0.2 + 0.01 * math.tanh(-1 / 0.5 - 1))
    # A spread of the correct answers that exceeds their lead costs both margins, not the accuracy.
    scores = [np.array([3.0, 1.0, 0.0]), np.array([9.0, 1.5, 0.5])]
    assert ties_score(items, scores) == pytest.approx(0.6 + 0.01 * math.tanh(1 / 7.5 - 1))
    # No spread and no lead: 0/0 counts 0. A prompt without a partner has accuracy alone.
    scores = [np.array([1.0, 1.0, 1.0]), np.array([1.0, 1.0, 1.0])]
    assert ties_score(items, scores) == 0.0
    assert ties_score(items[:1], [np.array([3.0, 1.0, 0.0])]) == pytest.approx(0.3)


@pytest.mark.parametrize("columns", [{}, {"id": 7}, {"id": "other:1"}, {"id": "tied:"}])
def test_ties_need_ids_of_their_kind(columns):
    with pytest.raises(ValueError, match="must have an 'id' like 'ref:1'"):
        ties_score([item("Ties", **columns)], [np.zeros(4)])


def test_sections_of_rewardbench_weigh_subsets_by_their_published_counts():
    items = [item(name, wrong=1) for name in ("mt-bench-easy", "mt-bench-med", "math-prm", "hep-go", "hep-go")]
    scores = [np.array(s, float) for s in ([1, 0], [0, 1], [1, 1], [1, 0], [1, 0])]  # a tie is wrong
    chat, reasoning = 28 / (28 + 40), 164 / (984 + 164)
    assert published(items, scores) == pytest.approx(
        {"Chat": chat, "Reasoning": reasoning, "mean": (chat + reasoning) / 2}
    )
    assert sum(SECTIONS["Reasoning"].values()) == 2 * 984  # mathematics weighs as much as code
    assert [sum(weights.values()) for weights in SECTIONS.values()] == [358, 456, 740, 1968]


PAIRS = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 250,
        "xstest-should-respond": 154,
        "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
"""``EXAMPLE_COUNTS`` of the published code, by section."""
TOTALS = {"Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968}


@pytest.mark.parametrize(("section", "subset"), [(section, subset) for section in PAIRS for subset in PAIRS[section]])
def test_a_subset_that_alone_is_right_earns_its_published_share_of_its_section_and_a_quarter_of_it_in_all(
    section, subset
):
    every = [name for names in PAIRS.values() for name in names]
    found = published(
        [item(name, wrong=1) for name in every], [np.array([float(name == subset), 0.5]) for name in every]
    )
    share = PAIRS[section][subset] / TOTALS[section]
    assert found == pytest.approx({**dict.fromkeys(PAIRS, 0.0), section: share, "mean": share / 4})


def test_other_data_have_no_published_scores():
    assert published([item("Math"), item("poetry")], [np.zeros(4)] * 2) is None
    assert published([item("")], [np.zeros(4)]) is None


def test_the_report_carries_them():
    items = [item("Focus")._replace(prompt=f"q{i}") for i in range(4)]

    def model(prompts, completions):
        return [float(completion == "r0") for completion in completions]

    report = run_benchmark(model, items, BenchmarkConfig(resamples=10))
    assert report.to_json()["published"] == {"Focus": 1.0, "mean": 1.0}
    assert dict(zip(heads(), row(report), strict=True))["RewardBench, %"] == "100.0"
