"""The benchmark of PPO's speed: lengths, the work of an iteration, and our side as a process."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.ppo_speed import compare, picture, rollout, worlds
from benchmarks.ppo_speed.talk import Side
from benchmarks.ppo_speed.work import Shape, iteration_flops
from benchmarks.ppo_speed.worlds import World, end_probability, make_models, random_prompts
from benchmarks.record import RESULTS

TINY = {"n_layer": 1, "n_embd": 16, "n_head": 1, "vocab_size": 32}


def test_an_end_is_as_likely_as_the_mean_length_demands():
    q = end_probability(14.0, 32)
    lengths = [min(step, 32) for step in torch.empty(40_000).geometric_(q, generator=torch.Generator().manual_seed(0))]
    assert float(sum(lengths)) / len(lengths) == pytest.approx(14.0, abs=0.2)


def test_the_work_of_an_iteration_worked_out_by_hand(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **TINY}))
    shape = Shape.of_folder(tmp_path)
    assert shape == (12 * 16 * 16, 32 * 16)
    # 10 tokens pass the trunk in the policy, the reference and the reward model, and 4 · 3 times while learning; 6 of
    # them the head, twice and 12 times.
    assert iteration_flops(shape, 10, 6) == 2 * (3072 * 10 * 15 + 512 * 6 * 14)


def test_a_model_that_favours_the_end_gives_it_the_probability_asked_for(tmp_path):
    make_models(tmp_path, TINY, mean_length=worlds.MEAN_LENGTH)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "reference").eval()
    ids = torch.randint(2, 32, (32, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        probability = model(ids).logits.softmax(-1)[..., 0].mean()
    assert float(probability) == pytest.approx(end_probability(worlds.MEAN_LENGTH, 32), rel=0.15)


def test_our_side_runs_iterations_on_request_and_says_what_they_cost(tmp_path):
    make_models(tmp_path, TINY)
    prompts = random_prompts(32, 4, 3)
    world = World(str(tmp_path / "reference"), str(tmp_path / "reward"), prompts, "w1", "<eos>", 3, 5)
    side = Side(sys.executable, "ours", compare.spec_of(world, natural=False, threads=1), 1)
    rows = [side.run() for _ in range(2)]
    side.close()
    assert all((row["response_tokens"], row["tokens"], row["padding"]) == (20, 32, 0.0) for row in rows)
    figures = compare.summary(rows, Shape.of_folder(world.reference), peak=1.0)
    assert figures["iteration"] == pytest.approx(sum(row["collect"] + row["update"] for row in rows) / 2)
    assert figures["peak_rss_mb"] > 50


def test_both_samplers_draw_the_same_lengths_and_count_the_end(tmp_path):
    make_models(tmp_path, TINY, mean_length=worlds.MEAN_LENGTH)
    prompts = torch.randint(2, 32, (512, worlds.PROMPT), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    mean = {
        make: make(tmp_path / "reference", prompts, natural=True)() / len(prompts)
        for make in (rollout.ours, rollout.generate)
    }
    assert mean[rollout.ours] == pytest.approx(mean[rollout.generate], rel=0.12)
    assert mean[rollout.ours] == pytest.approx(worlds.MEAN_LENGTH, rel=0.25)
    full = [make(tmp_path / "reference", prompts[:4], natural=False)() for make in (rollout.ours, rollout.generate)]
    assert full == [4 * worlds.RESPONSE] * 2


def test_the_picture_has_a_panel_for_each_cell_and_a_bar_for_each_side(tmp_path):
    cells = json.loads((RESULTS / "ppo_speed.json").read_text("utf-8"))["cells"]
    figure = picture.picture(cells)
    drawn = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title("left") for axes in drawn] == list(cells)
    for axes, cell in zip(drawn, cells.values(), strict=True):
        assert len(axes.patches) == 2 * len(cell["sides"])
