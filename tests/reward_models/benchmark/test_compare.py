"""Two models on the same items."""

import numpy as np
import pytest

from reward_models.benchmark import BenchmarkConfig, compare, run_benchmark


def records(count):
    return [{"prompt": f"prompt {i // 2}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)]


def right_on(numbers):
    """A model that is right on the pairs ``numbers`` and wrong on the others."""
    right = {f"good {i}" if i in numbers else f"bad {i}" for i in range(100)}
    return lambda prompts, completions, **columns: [float(text in right) for text in completions]


QUICK = BenchmarkConfig(resamples=500)


def test_the_difference_counts_the_pairs_that_only_one_gets_right():
    a = run_benchmark(right_on(set(range(70))), records(100), QUICK, name="a")
    b = run_benchmark(right_on(set(range(10, 60))), records(100), QUICK, name="b")
    found = compare(a, b)
    assert found.difference == pytest.approx(0.2)
    assert (found.only_first, found.only_second, found.pairs) == (20, 0, 100)
    assert found.mcnemar_p == pytest.approx(2 * 0.5**20)
    assert 0.05 < found.interval[0] < 0.2 < found.interval[1] < 0.35
    # Paired, two pairs per prompt: 10 of 50 prompts gain 1, the rest 0 — standard error √(0.2 · 0.8 / 49).
    assert found.se == pytest.approx(np.sqrt(0.2 * 0.8 / 49))
    assert compare(b, a).difference == pytest.approx(-0.2)
    assert compare(a, a).interval == (0.0, 0.0)


def test_reports_on_different_items_are_not_compared():
    a, b = (run_benchmark(right_on(set()), records(count), QUICK) for count in (10, 12))
    with pytest.raises(ValueError, match="the same items"):
        compare(a, b)
    other = [{**record, "prompt": "another"} for record in records(10)]
    with pytest.raises(ValueError, match="the same items"):
        compare(a, run_benchmark(right_on(set()), other, QUICK))


def test_labelled_ties_play_no_part_and_a_score_tie_is_half_a_point_and_nobodys_win():
    data = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "r", "chosen": "a", "rejected": "b", "tie": True},
    ]

    def report(**gaps):
        """Of a model that scores "a" by its prompt, and everything else 0."""
        return run_benchmark(
            lambda p, t, **k: [gaps.get(x, 0.0) * (y == "a") for x, y in zip(p, t, strict=True)], data, QUICK
        )

    found = compare(report(p=1.0, q=0.0, r=5.0), report(p=-1.0, q=-1.0, r=-5.0))
    assert found.pairs == 2
    assert found.difference == pytest.approx((1 + 0.5) / 2)
    assert (found.only_first, found.only_second, found.tied) == (1, 0, 1)
    assert found.mcnemar_p == pytest.approx(1.0)


def test_reports_on_the_same_responses_ranked_otherwise_are_not_compared():
    tied = [*records(9), {"prompt": "prompt 4", "chosen": "good 9", "rejected": "bad 9", "tie": True}]
    with pytest.raises(ValueError, match="the same items"):
        compare(run_benchmark(right_on(set()), records(10), QUICK), run_benchmark(right_on(set()), tied, QUICK))
