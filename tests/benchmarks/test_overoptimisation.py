"""The over-optimisation lab: its proxies, its exact curves and what is read off them."""

import itertools
import math

import numpy as np
import pytest
import torch

from benchmarks.overoptimisation import __main__ as lab
from benchmarks.overoptimisation import count_wanted, summary
from benchmarks.overoptimisation.figure import picture
from textenv.tasks import micro


def curve(*points: tuple[float, float, float]) -> list[dict[str, float]]:
    return [{"n": 2.0**i, "kl": kl, "proxy": proxy, "gold": gold} for i, (kl, proxy, gold) in enumerate(points)]


def test_comparisons_are_as_many_as_asked_and_between_different_answers():
    records = lab.comparisons(lab.WORLDS["micro"], 50, seed=3)
    assert len(records) == 50
    assert all(record["responses"][0] != record["responses"][1] for record in records)
    assert {record["prompt"] for record in records} == set(micro.prompts())
    assert (
        records == lab.comparisons(lab.WORLDS["micro"], 50, seed=3) != lab.comparisons(lab.WORLDS["micro"], 50, seed=4)
    )


def test_labels_follow_the_judge_as_often_as_bradley_and_terry_say():
    records = lab.comparisons(lab.WORLDS["micro"], 2_000, seed=0)
    p, agreed = [], []
    for record in records:
        gold = micro.gold_scores([record["prompt"]] * 2, record["responses"])
        p.append(1 / (1 + math.exp(-abs(gold[0] - gold[1]) / 0.75)))
        best = record["ranking"][0]
        agreed.append(0.5 if gold[0] == gold[1] else float(gold[best] > gold[1 - best]))
    assert np.mean(agreed) == pytest.approx(np.mean(p), abs=3 * 0.5 / math.sqrt(2_000))


def test_the_reference_gains_nothing_and_tilting_by_gold_reaches_the_frontier():
    world = lab.gold_world()
    gold, _, sd = lab._gold()
    here = lab.exact_point(world.ref_logprobs, 0.0, gold)
    assert (here["gold"], here["proxy"]) == pytest.approx((0.0, 0.0), abs=1e-12)
    base = float((world.ref_logprobs.exp() * world.rewards).sum(1).mean())
    for point in lab.exact_tilted(gold)[::15]:
        assert (
            point["gold"]
            == point["proxy"]
            == pytest.approx((world.frontier_reward_at(point["kl"]) - base) / sd, abs=1e-6)
        )


def test_counting_words_is_good_until_it_is_not():
    proxy = lab.micro_world(lab.WORD_COUNT, 0.0).rewards.numpy()
    for points in (lab.exact_best_of_n(proxy), lab.exact_tilted(proxy)):
        top = summary.peak(points)
        assert top["gold"] > top["last_gold"] + 0.2
        assert top["proxy_after"] > 0.5
        assert all(a["proxy"] <= b["proxy"] + 1e-12 for a, b in itertools.pairwise(points))


def test_a_point_above_the_frontier_is_an_error(monkeypatch):
    world = lab.micro_world(lab.WORD_COUNT, 0.0)
    measure = lab._exact_measure(world)

    class Agent:
        class policy:
            model = world.reference.model

    measure(Agent, 0)  # type: ignore[arg-type]
    better, count = world.tilted(0.5), type(world).kl
    monkeypatch.setattr(type(world), "sequence_logprobs", lambda self, model: better)
    measure(Agent, 0)  # type: ignore[arg-type]
    # Half of its KL forgotten:
    monkeypatch.setattr(type(world), "kl", lambda self, p: count(self, p) * (0.5 if p is better else 1.0))
    with pytest.raises(AssertionError, match="above the exact frontier"):
        measure(Agent, 0)  # type: ignore[arg-type]


def test_a_peak_is_where_gold_is_highest():
    found = summary.peak(curve((0, 0, 0), (1, 1, 0.5), (4, 2, 0.8), (9, 3, -0.1)))
    assert found == {"gold": 0.8, "root_kl": 2.0, "last_gold": -0.1, "proxy_after": 1.0}


def test_a_path_is_counted_from_where_it_started_and_never_from_below_zero_kl():
    moved = summary.gains(curve((-1e-9, 0.25, 0.5), (1, 1.25, 0.75)))
    assert [(point["kl"], point["proxy"], point["gold"]) for point in moved] == [(0.0, 0.0, 0.0), (1, 1.0, 0.25)]


def test_an_ensemble_stands_beside_the_mean_of_its_members_peaks():
    low, high = curve((0, 0, 0), (1, 1, 0.2), (4, 2, 0.1)), curve((0, 0, 0), (1, 1, 0.3), (4, 2, 0.4))
    cells = {f"micro-200-{seed}": {"best_of_n": {"0": low, "1": high, "min": curve((0, 0, 0), (1, 1, gold), (4, 2, 0))}}
             for seed, gold in ((1, 0.5), (2, 0.2))}  # fmt: skip
    (row,) = summary.ensemble_peaks(cells)
    assert row["mean_member"]["mean"] == pytest.approx(0.3)  # (0.2 + 0.4) / 2, not the peak of the mean curve
    assert row["difference"]["mean"] == pytest.approx(((0.5 - 0.3) + (0.2 - 0.3)) / 2)
    assert row["data_sets_at_or_above"] == 1


@pytest.fixture(scope="module")
def figures():
    """The whole summary on short curves of everything that the picture draws."""
    points = curve((0, 0, 0), (0.5, 0.8, 0.4), (1, 1, 0.5), (4, 2, 0.2))
    each = {**{str(m): points for m in range(4)}, **{way: points for way in lab.ENSEMBLES}}
    cells = {}
    for world in lab.WORLDS:
        for size in lab.SIZES:
            cells[f"{world}-{size}-1"] = {"best_of_n": each} | ({"tilted": {"0": points}} if world == "micro" else {})
    extra = {"below_frontier": 0.1, "gold_below_frontier": 0.2}
    runs = [
        {"cell": cell._asdict(), "path": [{**point, **extra} for point in points]}
        for cell in lab.ppo_cells([1], ["micro", "assistant"])
    ]
    return summary.summarise(cells, runs, {"best_of_n": points, "tilted": points}, points)


def test_the_summary_has_a_row_for_everything(figures):
    assert {(row["world"], row["comparisons"]) for row in figures["peaks"]} == {
        (w, s) for w in lab.WORLDS for s in lab.SIZES
    }
    assert figures["frontier"]["least_below_proxy_frontier"] == 0.1
    assert {row["combine"] for row in figures["ppo_ensembles"]} == {"mean", "min"}
    assert all(row["difference"]["mean"] == 0 for row in figures["ppo_ensembles"])
    singles = next(row for row in figures["ppo"] if (row["proxy"], row["kl_coef"]) == ("2000 single", 0.0))
    assert singles["gold"]["mean"] == 0.5


def test_the_picture_has_six_panels_with_the_axis_in_root_kl(figures):
    panels = picture(figures).axes
    assert len(panels) == 6
    assert all("√" in panel.get_xlabel() for panel in panels)
    line = next(line for line in panels[0].lines if line.get_label() == "200 comparisons")
    assert np.asarray(line.get_xdata()).tolist() == pytest.approx([0, math.sqrt(0.5), 1, 2])


def test_word_counting_counts_only_what_was_asked_for():
    wanted = sorted(micro.wanted_letters("a"))
    assert count_wanted(["a", "a"], [" ".join(wanted * 2), "a"]) == [2.0 * len(wanted), 0.0]


def test_no_tensor_of_an_ensemble_loses_its_member():
    scores = np.stack([np.arange(6.0).reshape(2, 3), 10 - np.arange(6.0).reshape(2, 3)])
    combined = np.stack([lab.combined(row, "min", 1.0) for row in scores.swapaxes(0, 1)])
    assert torch.equal(torch.from_numpy(combined), torch.from_numpy(scores.min(0)))
