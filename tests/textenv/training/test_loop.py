"""The optimiser of supervised training, step by step against numbers worked out by hand."""

import math
import resource

import pytest
import torch

from tests.conftest import tiny_model
from tests.processes import in_processes
from textenv.training.checkpoint import RunFolder
from textenv.training.config import TrainingConfig
from textenv.training.loop import Objective, fit
from textenv.training.processes import is_main


class OneExample:
    """An example that holds nothing: an epoch is a step."""

    lengths = torch.ones(1, dtype=torch.int64)

    def collate(self, index):
        return {}

    def items(self, index):
        return len(index)


def train(model, slopes, **settings):
    """One step for each slope: the gradient of every weight is that slope."""
    following = iter(slopes)

    def summed_loss(model):
        return next(following) * sum(weight.sum() for weight in model.parameters())

    config = TrainingConfig(epochs=len(slopes), logging_steps=1, **{"max_grad_norm": None, **settings})
    return fit(Objective(model, summed_loss), OneExample(), config, RunFolder(None, resume=False), inputs={})


def parameters(model):
    return [weight.detach().clone() for weight in model.parameters()]


LINEAR = [0, 1 / 2, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
SCHEDULES = {
    "linear": LINEAR,
    "cosine": [0, 1 / 2, *(0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8))],
    "constant": [0, 1 / 2, *[1] * 8],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_rises_over_the_warm_up_and_then_follows_the_schedule(schedule):
    """A fifth of ten steps is two: the rates of the steps that they are logged with."""
    run = train(tiny_model().model, [0.0] * 10, learning_rate=0.3, warmup_ratio=0.2, lr_schedule=schedule)
    assert [entry["learning_rate"] for entry in run.history] == pytest.approx([0.3 * x for x in SCHEDULES[schedule]])


def test_weight_decay_shrinks_matrices_and_leaves_biases_and_norms():
    model = tiny_model().model
    before = parameters(model)
    train(model, [0.0] * 3, learning_rate=0.1, weight_decay=0.5, warmup_ratio=0.0, lr_schedule="constant")
    assert {weight.ndim for weight in before} == {1, 2}
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old * (0.95**3 if old.ndim > 1 else 1.0))


@pytest.mark.parametrize(("beta2", "mean_square"), [(0.5, 4.5 / 1.5), (0.999, 4.999 / 1.999)])
def test_adam_divides_by_the_root_of_its_average_of_squares(beta2, mean_square):
    """Slopes 1 and 2. Means of slopes, corrected: 1, then (0.9 · 0.1 · 1 + 0.1 · 2) / (1 − 0.9²); of squares: 1, then
    (β₂ · 1 + 4) / (1 + β₂)."""
    model = tiny_model().model
    before = parameters(model)
    settings = {"learning_rate": 0.1, "warmup_ratio": 0.0, "lr_schedule": "constant", "adam_beta2": beta2}
    train(model, [1.0, 2.0], **settings)
    moved = 0.1 * (1 + 0.29 / 0.19 / math.sqrt(mean_square))
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old - moved, atol=1e-5, rtol=1e-5)


def test_the_gradient_is_scaled_down_to_the_limit_before_the_step_and_logged_as_it_was():
    """Slopes 8 and 1 for each of N weights, limit √N: the clipped slopes are 1 and 1, so Adam moves by its rate."""
    model = tiny_model().model
    before, root = parameters(model), math.sqrt(sum(weight.numel() for weight in model.parameters()))
    settings = {"learning_rate": 0.1, "warmup_ratio": 0.0, "lr_schedule": "constant", "max_grad_norm": root}
    run = train(model, [8.0, 1.0], **settings)
    assert [entry["grad_norm"] for entry in run.history] == pytest.approx([8 * root, root], rel=1e-5)
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old - 0.2, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("slope", "found"), [(math.nan, "loss nan"), (math.inf, "loss inf"), (-math.inf, "loss -inf")])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(slope, found):
    model = tiny_model().model
    with pytest.raises(ValueError, match=rf"got {found}, .* after 1 of 3 steps. The training diverged: lower the"):
        train(model, [0.0, slope, 0.0], learning_rate=0.1)
    assert all(weight.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize(
    ("losses", "warned"), [((2.0, 9.0, 3.1), True), ((2.0, 9.0, 2.9), False), ((-1.0, -0.5), False)]
)
def test_a_loss_that_ends_half_as_high_again_as_it_began_is_warned_of(losses, warned, caplog):
    following = iter(losses)

    def summed_loss(model):
        return next(following) + 0 * sum(weight.sum() for weight in model.parameters())

    config = TrainingConfig(epochs=len(losses), logging_steps=1, learning_rate=0.25)
    fit(Objective(tiny_model().model, summed_loss), OneExample(), config, RunFolder(None, resume=False), inputs={})
    says = "The loss rose from 2 to 3.1: a learning rate of 0.25 may be too high." if warned else ""
    assert "\n".join(caplog.messages) == says


def test_a_gradient_that_is_not_finite_stops_the_run_though_its_loss_is():
    model = tiny_model().model
    weight = next(model.parameters())

    def summed_loss(model):
        # √x at 0 has slope ∞, and its value is 0.
        return (weight.flatten()[0] * 0).sqrt()

    config = TrainingConfig(epochs=1)
    with pytest.raises(ValueError, match=r"got loss 0.0, grad_norm (inf|nan) after 0 of 1 steps.*textenv doctor"):
        fit(Objective(model, summed_loss), OneExample(), config, RunFolder(None, resume=False), inputs={})
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_a_run_that_diverges_leaves_its_last_good_checkpoint_and_no_model(tmp_path):
    """The loss is finite up to a weight of 0.25. Constant slopes let Adam walk by the learning rate, 0.1, a step."""
    model = tiny_model().model
    weight = next(model.parameters())
    with torch.no_grad():
        weight.zero_()

    def summed_loss(model):
        value = -weight.flatten()[0]
        return value if value > -0.25 else value / 0

    settings = {"epochs": 5, "learning_rate": 0.1, "warmup_ratio": 0.0, "lr_schedule": "constant", "save_steps": 1}

    def train(resume):
        folder = RunFolder(tmp_path, resume=resume)
        fit(Objective(model, summed_loss), OneExample(), TrainingConfig(**settings), folder, inputs={})

    for resume in (False, True):
        # After two steps the weight is 0.2, after three 0.3: the checkpoint of the third would not be good.
        with pytest.raises(ValueError, match=r"got loss -inf after 3 of 5 steps. The training diverged"):
            train(resume)
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-2"]


def test_what_is_not_finite_in_one_process_stops_all(tmp_path):
    """The last step is good in both; the loss of its weights, before they are saved, is not in one."""

    def work():
        losses = iter([0.0, 0.0 if is_main() else math.nan])

        def summed_loss(model):
            return next(losses) * sum(weight.sum() for weight in model.parameters())

        folder = RunFolder(tmp_path, resume=False)
        fit(Objective(tiny_model().model, summed_loss), OneExample(), TrainingConfig(), folder, inputs={})

    _, errors = in_processes(work)
    assert ["The training diverged" in error for error in errors] == [True, True]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [2_000, 40_000])
def test_a_disk_that_is_full_is_an_error_with_a_remedy_and_leaves_what_was_there(tmp_path, limit):
    """Files may not grow beyond a limit: the weights fail to be written."""
    lm, before = tiny_model(), resource.getrlimit(resource.RLIMIT_FSIZE)
    run, new = (RunFolder(tmp_path / name, resume=False) for name in ("run", "new"))
    run.save(lm.model, {"step": 1, "history": []}, {}, None)
    saved = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        for folder, left in ((run, "checkpoint-1 is whole. Free space, then resume"), (new, "then start again")):
            with pytest.raises(OSError, match=left):
                folder.save(lm.model, {"step": 2, "history": []}, {}, None)
            with pytest.raises(OSError, match=left):
                folder.finish(lm.save_pretrained, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == saved
    run.save(lm.model, {"step": 2, "history": [{"step": 2, "loss": 0.5}]}, {}, None)
    assert run.checkpoint == tmp_path / "run" / "checkpoint-2"
    assert (tmp_path / "run" / "curves.jsonl").read_text() == '{"step": 2, "loss": 0.5}\n'


def test_another_error_while_saving_stays_what_it_is(tmp_path):
    def write(folder):
        raise RuntimeError("not of the disk")

    with pytest.raises(RuntimeError, match="not of the disk"):
        RunFolder(tmp_path / "run", resume=False).finish(write, [])
