"""The panel of defaults: its rewards say what they are meant to say, and its shares are worked out by hand."""

import pytest

from benchmarks.defaults.__main__ import REWARDS, added_to, demands, objectives, record, summary
from textenv import registry

PROMPT = "user: how do i fix the bike ? assistant:"
THANKS = "thank you . turn the screw and have a nice day ."
PLAIN = "i will not help"
LENGTH = "defaults/length-0.05-v0"


def scored(reward: str) -> list[float]:
    model = registry.reward_model(REWARDS[reward])
    return [float(score) for score in model([PROMPT, PROMPT], [THANKS, PLAIN])]


@pytest.mark.parametrize(
    ("reward", "scores"),
    [
        ("lexicon", [1.0, 0.0]),
        ("ending", [1.0, 0.0]),
        ("forbidden-word", [0.0, -1.0]),
        ("length", [1.0, 0.4]),  # 12 words lie within 10 to 12; 4 are 6 too few, at 0.1 each
    ],
)
def test_rules_of_the_panel_score_as_meant(reward, scores):
    assert scored(reward) == pytest.approx(scores)


def test_the_sum_is_the_lexicon_and_half_of_the_reward_model():
    expected = [a + 0.5 * b for a, b in zip(scored("lexicon"), scored("reward-model"), strict=True)]
    assert scored("sum") == pytest.approx(expected, abs=1e-6)


def test_shares_run_from_the_reference_to_the_best_run_of_any_algorithm_or_batch_size():
    def result(algorithm, batch_size, reward):
        settings = {"env_id": "x", "algorithm": algorithm, "options": {"batch_size": batch_size}}
        return {"settings": settings, "figures": {"reward": reward}}

    bounds = {"x": {"reference": 1.0, "optimum": 4.0, "unclear": 0.0}}
    results = [result("ppo", 64, 2.0), result("rloo", 64, 2.5), result("ppo", 256, 3.0), result("rloo", 256, 0.5)]
    small, large = summary(objectives(results), bounds)
    assert small["shares"] == {"ppo": [0.5], "rloo": [0.75]}  # (2 − 1) / (3 − 1), (2.5 − 1) / (3 − 1)
    assert large["shares"] == {"ppo": [1.0], "rloo": [-0.25]}
    found = demands([small, large])
    assert found["lowest_share"] == -0.25
    assert found["mean_share"]["ppo"] == 0.75
    assert found["ppo_below_rloo"] == 0.25
    assert found["ppo_below_rloo_objective"] == 0.5  # a quarter of the way from 1 to 3


def test_what_is_measured_again_replaces_the_same_algorithm_in_the_same_cell():
    bounds = {"x": {"reference": 1.0, "optimum": 4.0, "unclear": 0.0}}
    last = summary({("x", 64): {"ppo": [2.0], "rloo": [3.0]}, ("x", 256): {"ppo": [2.5]}}, bounds)
    small, large, new = added_to(last, {("x", 64): {"ppo": [5.0]}, ("y", 64): {"ppo": [7.0]}}, {"y": bounds["x"]})
    assert small["shares"] == {"ppo": [1.0], "rloo": [0.5]}  # (5 − 1) / (5 − 1), (3 − 1) / (5 − 1)
    assert large["shares"] == {"ppo": [0.375]}
    assert (small["best"], large["best"], new["best"]) == (5.0, 5.0, 7.0)


def test_a_record_keeps_the_rewards_apart_that_settings_were_chosen_on():
    bounds = {name: {"reference": 0.0, "optimum": 1.0, "unclear": 0.0} for name in ("defaults/ending-0.2-v0", LENGTH)}
    header = {"command": "a", "commit": "b", "machine": {}, "versions": {}}
    last = {"reported": {"rows": []}, "chosen_on": {"rows": []}, "earlier_runs": [{"command": "c"}], **header}
    made = record(last, {("defaults/ending-0.2-v0", 64): {"ppo": [0.5]}, (LENGTH, 64): {"ppo": [1.0]}}, bounds)
    assert [[row["env_id"] for row in made[half]["rows"]] for half in ("reported", "chosen_on")] == [
        ["defaults/ending-0.2-v0"],
        [LENGTH],
    ]
    assert made["earlier_runs"] == [{"command": "c"}, header]
