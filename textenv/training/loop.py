"""The training loop of supervised fine-tuning and reward models, on Accelerate."""

import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from textenv.training.batches import epoch_windows
from textenv.training.checkpoint import RunFolder
from textenv.training.config import TrainingConfig
from textenv.training.interrupt import deferred_interrupt
from textenv.training.isolation import untouched_globals
from textenv.training.memory.sharding import load_optimizer, shard, whole
from textenv.training.optimizer import clip_gradients, make_adamw, set_rates
from textenv.training.processes import any_process, same_weights, sharded
from textenv.training.trackers import Report, Tracker, tracking
from textenv.training.trainable import BestWeights

_log = logging.getLogger(__name__)

RISEN = 1.5
"""A loss that ends at so many times its first value: the training made the model worse."""

OnProgress = Callable[[int, int, dict[str, float]], None]
"""Called as ``(step, total steps, latest logged figures)`` after every optimizer step."""


class Examples(Protocol):
    """What :func:`fit` trains on."""

    @property
    def lengths(self) -> Int[Tensor, " N"]:
        """Tokens of each example; only used to group examples of similar length."""
        ...

    def collate(self, index: Int[Tensor, " B"]) -> dict[str, Tensor]:
        """A batch of the examples numbered ``index``."""
        ...

    def items(self, index: Int[Tensor, " B"]) -> int:
        """The number of items (tokens or prompts) of these examples, over which the loss is averaged."""
        ...


class Objective(nn.Module):
    """A loss as a module, so that the wrapper for several processes covers the whole computation.

    ``summed_loss(model, **batch)`` is a *sum* over items; the loop divides by the items of the whole optimizer step, so
    that the gradient does not depend on how the step is split into micro-batches or processes.
    """

    def __init__(self, model: PreTrainedModel, summed_loss: Callable[..., Float[Tensor, ""]]) -> None:
        super().__init__()
        self.model = model
        self._summed_loss = summed_loss

    def forward(self, **batch: Tensor) -> Float[Tensor, ""]:
        return self._summed_loss(self.model, **batch)


class Evaluation(NamedTuple):
    """Figures measured after every epoch, and every ``steps`` optimizer steps."""

    measure: Callable[[], dict[str, float]]
    steps: int | None = None
    best: BestWeights | None = None
    """If given, training ends with the weights of the best evaluation, and early once its patience is exhausted."""


class Fit(NamedTuple):
    """The record of a training run."""

    history: list[dict[str, float]]
    """One entry per logging interval: ``loss`` (mean since the last), ``grad_norm, learning_rate, epoch, step``; and
    one per evaluation, with its figures."""
    seconds: float
    """Wall-clock time of this call."""
    steps: int
    """Optimizer steps of the whole run; fewer than planned if it stopped early."""
    evaluation: dict[str, float]
    """Figures of the final weights; empty without an evaluation."""


def fit(
    objective: Objective,
    examples: Examples,
    config: TrainingConfig,
    folder: RunFolder,
    *,
    inputs: Mapping[str, str],
    evaluation: Evaluation | None = None,
    report_to: Sequence[Tracker] = (),
    on_progress: OnProgress | None = None,
) -> Fit:
    """Minimise ``objective`` in place and leave the model in eval mode.

    Ctrl-C or SIGTERM finishes the step, saves a checkpoint in ``folder`` and raises KeyboardInterrupt; the last step
    saves one too, so that a later failure loses nothing. A resumed run ends with the weights of a run that never
    stopped. ``inputs`` names fingerprints of everything besides ``config`` that the run depends on; ``report_to``
    trackers that get the history too.

    Raises:
        ValueError: the checkpoint in ``folder`` is damaged or belongs to another run; or the loss or its gradient is no
            longer finite. Then nothing is written, and the last checkpoint stays.
    """
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(untouched_globals())
        interrupt = stack.enter_context(deferred_interrupt(active=folder.path is not None))
        stack.callback(objective.model.eval)
        loop = _Loop(objective, examples, config, folder, inputs, evaluation)
        tracked = tracking(report_to, folder.path, dataclasses.asdict(config), loop.step)
        loop.report = stack.enter_context(tracked)
        best = loop.best
        with loop.shards.scattered():
            while loop.step < loop.steps and not (best is not None and best.exhausted):
                loop.train_step()
                if on_progress is not None and loop.accelerator.is_main_process:
                    try:
                        on_progress(loop.step, loop.steps, loop.latest)
                    except KeyboardInterrupt:
                        interrupt.set()
                loop.evaluate_if_due()
                stopped = any_process(interrupt.is_set())
                ended = stopped or loop.step == loop.steps or (best is not None and best.exhausted)
                if ended or (config.save_steps and loop.step % config.save_steps == 0):
                    loop.save()
                if stopped:
                    raise KeyboardInterrupt
        loop.shards.dissolve()
        if best is not None:
            best.restore()
        if evaluation is not None and not loop.figures:  # resumed after the last step
            loop.evaluate()
    loop.warn_of_a_risen_loss()
    figures = best.evaluation if best is not None else loop.figures
    return Fit(loop.history, time.perf_counter() - start, loop.step, figures)


class _Loop:
    """A run between two steps."""

    def __init__(
        self,
        objective: Objective,
        examples: Examples,
        config: TrainingConfig,
        folder: RunFolder,
        inputs: Mapping[str, str],
        evaluation: Evaluation | None,
    ) -> None:
        self.accelerator = folder.accelerator
        if self.accelerator.num_processes > 1:
            objective.to(self.accelerator.device)
        self.model, self.examples, self.config, self.folder = objective.model, examples, config, folder
        self.evaluation, self.best = evaluation, None if evaluation is None else evaluation.best
        self.identity = {"config": dataclasses.asdict(config), "examples": len(examples.lengths), **inputs}
        self.epoch_steps = -(-len(examples.lengths) // config.window)
        self.steps = config.epochs * self.epoch_steps
        self.log_every = config.logging_steps or max(1, self.steps // 50)
        if sharded():
            same_weights(objective)
        self.shards = shard(objective, [objective.model])
        self.weights = [weight for weight in self.shards.shares().values() if weight.requires_grad]
        optimizer = make_adamw(config, [self.weights], [config.learning_rate])
        self._plain, self._batch = objective, dict[str, Tensor]()
        prepared = (objective, optimizer) if sharded() else self.accelerator.prepare(objective, optimizer)
        self.objective, self.optimizer = prepared
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.losses: list[float] = []
        """Losses of the steps since the last entry of the history."""
        self.figures: dict[str, float] = {}
        """Figures of the last evaluation."""
        self.latest: dict[str, float] = {}
        self.report = Report()
        self._resume()
        self._windows = self._remaining()

    def _remaining(self) -> Any:
        """The examples of each remaining step."""
        for epoch in range(self.step // self.epoch_steps, self.config.epochs):
            done = self.step - epoch * self.epoch_steps
            windows = epoch_windows(self.examples.lengths, self.config.window, self.config.seed, epoch)
            yield from itertools.islice(windows, done, None)

    def train_step(self) -> None:
        """One optimizer step over one window, shared by the processes."""
        config, accelerator = self.config, self.accelerator
        torch.manual_seed(config.seed + self.step)  # randomness inside a model repeats in a resumed run
        self.objective.train()
        window = next(self._windows)
        items, rank, processes = self.examples.items(window), accelerator.process_index, accelerator.num_processes
        parts = window.split(config.batch_size)
        total = torch.zeros((), device=self.model.device)
        for number, part in enumerate(parts, start=1):
            share = part[rank::processes]
            batch = self.examples.collate(share if len(share) else part[:1])  # every process joins each pass
            batch = {name: value.to(self.model.device) for name, value in batch.items()}
            if sharded():  # gradients are added up over processes, in every pass
                loss = self.shards(partial(self.objective, **batch)) / items * bool(len(share))
                loss.backward()
            else:
                with contextlib.nullcontext() if number == len(parts) else accelerator.no_sync(self.objective):
                    loss = self.objective(**batch) / items * bool(len(share))
                    accelerator.backward(loss * processes)  # gradients are averaged over processes
            total += loss.detach()
            self._batch = batch
        if sharded():
            (norm,) = clip_gradients([self.weights], config.max_grad_norm)
        else:
            norm = accelerator.clip_grad_norm_(self.weights, config.max_grad_norm or math.inf)
        figures = {"loss": float(cast(Tensor, accelerator.reduce(total))), "grad_norm": float(cast(Tensor, norm))}
        self._refuse_divergence(figures)
        rate = config.learning_rate * set_rates(self.optimizer, config, self.step, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.losses.append(figures["loss"])
        if self.step == 1 or self.step % self.log_every == 0:
            self.log({**figures, "loss": sum(self.losses) / len(self.losses), "learning_rate": rate})
            self.losses = []

    def _refuse_divergence(self, figures: Mapping[str, float]) -> None:
        """Stop every process before what is not finite reaches the weights or a checkpoint."""
        if any_process(not all(map(math.isfinite, figures.values()))):
            found = ", ".join(f"{name} {value}" for name, value in figures.items())
            rule = f"a loss and its gradient must be finite, got {found} after {self.step} of {self.steps} steps"
            if self.step == 0:
                raise ValueError(f"{rule}. The model or the data are at fault: textenv doctor examines both.")
            raise ValueError(f"{rule}. The training diverged: lower the learning rate and start anew.")

    def warn_of_a_risen_loss(self) -> None:
        """Steps that are too long need not end in a NaN."""
        losses = [entry["loss"] for entry in self.history if "loss" in entry]
        if losses and losses[-1] > RISEN * losses[0] > 0 and self.accelerator.is_main_process:
            rule = f"The loss rose from {losses[0]:.3g} to {losses[-1]:.3g}"
            _log.warning("%s: a learning rate of %g may be too high.", rule, self.config.learning_rate)

    def log(self, figures: dict[str, float]) -> None:
        self.latest = {**figures, "epoch": self.step / self.epoch_steps, "step": self.step}
        self.history.append(self.latest)
        self.report(self.latest, self.step)

    def evaluate_if_due(self) -> None:
        if self.evaluation is not None:
            every = [self.epoch_steps, self.evaluation.steps or self.epoch_steps]
            if any(self.step % steps == 0 for steps in every):
                with self.shards.gathered():
                    self.evaluate()
                    if self.best is not None:
                        self.best.update(self.figures)

    def evaluate(self) -> None:
        assert self.evaluation is not None
        self.figures = self.evaluation.measure()
        if not any(self.figures.keys() <= entry.keys() for entry in self.history if entry["step"] == self.step):
            self.log(self.figures)

    def save(self) -> None:
        state = {
            "step": self.step,
            "history": self.history,
            "losses": self.losses,
            "optimizer": whole(self.optimizer.state_dict()),
        }
        with self.shards.gathered():
            if self.folder.path is not None:  # the step before said nothing about its own weights
                with torch.no_grad():
                    self._refuse_divergence({"loss": float(self._plain(**self._batch))})
            self.folder.save(self.model, state, self.identity, self.best)

    def _resume(self) -> None:
        state = self.folder.load(self.model, self.identity, self.best)
        if state is not None:
            self.step, self.history, self.losses = state["step"], state["history"], state["losses"]
            load_optimizer(self.optimizer, state["optimizer"])
