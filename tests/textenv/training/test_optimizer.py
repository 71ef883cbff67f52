"""The optimiser and its schedules against transformers and numbers worked out by hand."""

import pytest
import torch
from transformers import get_scheduler

from textenv.training.optimizer import OptimizerConfig, clip_gradients, make_adamw, set_rates


def network():
    """A matrix and a vector of ones, each a part."""
    return [[torch.nn.Parameter(torch.ones(2, 2))], [torch.nn.Parameter(torch.ones(3))]]


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.26, 0.99])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 7, 40])
def test_the_schedules_are_those_of_transformers(schedule, warmup, total):
    config = OptimizerConfig(lr_schedule=schedule, warmup_ratio=warmup, learning_rate=0.3)
    ours, theirs = make_adamw(config, network(), [0.3, 3.0]), torch.optim.SGD(network()[0], lr=0.3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, theirs, round(warmup * total), total)
    for step in range(total):
        factor = set_rates(ours, config, step, total)
        rate = scheduler.get_last_lr()[0]
        assert 0.3 * factor == pytest.approx(rate, abs=1e-15)
        assert [group["lr"] for group in ours.param_groups] == pytest.approx([rate, 10 * rate], abs=1e-14)
        theirs.step()
        scheduler.step()
    assert set_rates(ours, config, 2 * total, total) == (schedule == "constant")  # at the end it stays where it is


def test_a_warm_up_that_is_ahead_skips_the_rate_of_zero_and_changes_nothing_after_it():
    config = OptimizerConfig(warmup_ratio=0.4)
    optimizer = make_adamw(config, network(), [1.0, 1.0])
    for ahead, rates in ((0, [0, 1 / 4, 2 / 4, 3 / 4]), (1, [1 / 4, 2 / 4, 3 / 4, 1]), (3, [3 / 4, 1, 1, 1])):
        found = [set_rates(optimizer, config, step, 10, ahead=ahead) for step in range(11)]
        assert found == pytest.approx([*rates, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    assert set_rates(optimizer, config, 3, None) == 1.0


def test_a_step_is_the_mean_slope_over_the_root_mean_square_plus_epsilon_with_the_means_of_the_config():
    """β₁ = ½, β₂ = ¾; slopes 1, then 3: means (½ · ½ · 1 + ½ · 3) / (1 − ¼) and (¾ · ¼ · 1 + ¼ · 9) / (1 − 9/16)."""
    config = OptimizerConfig(adam_beta1=0.5, adam_beta2=0.75, adam_eps=0.5)
    parts = network()
    optimizer = make_adamw(config, parts, [0.1, 0.2])
    for slope in (1.0, 3.0):
        for part in parts:
            part[0].grad = torch.full_like(part[0], slope)
        optimizer.step()
    moved = 1 / (1 + 0.5) + (1.75 / 0.75) / ((2.4375 / 0.4375) ** 0.5 + 0.5)
    torch.testing.assert_close(parts[0][0].detach(), torch.full((2, 2), 1 - 0.1 * moved))
    torch.testing.assert_close(parts[1][0].detach(), torch.full((3,), 1 - 0.2 * moved))


def test_each_part_is_clipped_by_its_own_norm():
    parts = network()
    parts[0][0].grad, parts[1][0].grad = torch.full((2, 2), 3.0), torch.tensor([0.0, 0.6, 0.8])
    assert clip_gradients(parts, 2.0) == pytest.approx([6.0, 1.0])
    torch.testing.assert_close(parts[0][0].grad, torch.full((2, 2), 1.0), atol=1e-5, rtol=0)
    assert parts[1][0].grad.tolist() == pytest.approx([0.0, 0.6, 0.8])
    assert clip_gradients(parts, None) == pytest.approx([2.0, 1.0], abs=1e-5)


def test_a_gradient_within_the_limit_stays_as_it_is_and_a_weight_without_one_counts_nothing():
    parts = network()
    parts[0][0].grad = torch.full((2, 2), 1.0)
    parts[1][0].grad = torch.tensor([0.0, 0.6, 0.8])
    counted = parts[0][0].grad._version
    assert clip_gradients([[*parts[0], torch.ones(2, requires_grad=True)], parts[1]], 2.0) == pytest.approx([2.0, 1.0])
    assert parts[0][0].grad.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert parts[0][0].grad._version == counted  # nothing was written


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused(value):
    parts = network()
    parts[0][0].grad, parts[1][0].grad = torch.full((2, 2), 3.0), torch.tensor([0.0, value, 0.8])
    with pytest.raises(
        ValueError, match=rf"must be finite, got 6\.0, {value}\. The training diverged: lower the learn"
    ):
        clip_gradients(parts, 2.0)
