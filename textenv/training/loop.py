"""What supervised training has in common: one fit on transformers' Trainer.

A loss is an :class:`Objective` over ragged token lists (:class:`Ragged`), and :func:`fit` runs it: length-bucketed
batches, resume, interruption, progress, and global random states left as they were.
"""

import contextlib
import dataclasses
import hashlib
import json
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.utils import logging as hf_logging

from textenv.data.records import write_json
from textenv.settings import Below1, Count, NonNegative, Positive, PositiveInt, check_settings
from textenv.training.interrupt import deferred_interrupt
from textenv.training.trainable import BestWeights

OnProgress = Callable[[int, int, dict[str, float]], None]
"""``(step, total steps, latest logged numbers)``, after every optimizer step."""

_POOL = 50
"""Steps whose examples are sorted by length together: large enough for little padding, small enough to stay random."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Optimisation, shared by supervised fine-tuning and reward-model training: AdamW with one learning-rate schedule.

    Dropout is off in every model of this package and stays off in training.
    """

    learning_rate: Positive = 1e-4
    """Peak step size of AdamW, > 0. Higher learns faster, then diverges."""
    epochs: PositiveInt = 1
    """Passes over the data, ≥ 1. More fits the data better, then overfits it."""
    batch_size: PositiveInt = 32
    """Examples in one forward pass, ≥ 1. Higher is faster and takes more memory."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes in one optimizer step, ≥ 1. The gradient is that of one large batch, however it is split."""
    warmup_ratio: Annotated[Below1, "It is a share of the steps."] = 0.05
    """Share of the steps, in [0, 1), in which the learning rate rises from 0 to its peak."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up: to 0 along a line or a cosine, or constant."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay, ≥ 0, on matrices only (not on biases and norms)."""
    max_grad_norm: NonNegative = 1.0
    """Gradients with a larger norm are scaled down to it; 0 never does."""
    adam_beta2: Below1 = 0.999
    """Memory of AdamW's squared gradients, in [0, 1). Lower follows changes faster."""
    seed: Count = 0
    """Order of the examples. The same seed gives the same weights, bit for bit on a CPU."""
    logging_steps: Annotated[PositiveInt | None, "Use None for the default."] = None
    """Optimizer steps between entries of the history, ≥ 1; None: about 50 entries a run."""
    save_steps: Annotated[PositiveInt | None, "Use None for the default."] = None
    """Optimizer steps between checkpoints in the output folder, ≥ 1; None: only when interrupted."""

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def window(self) -> int:
        """Examples in one optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps


class Ragged:
    """Token lists of different lengths, end to end in one tensor, with their lengths: padding is cut to size on use."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.lengths: Int[Tensor, " N"] = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
        self.flat: Int[Tensor, " n"] = torch.tensor([i for sequence in sequences for i in sequence], dtype=torch.int64)
        self._starts = self.lengths.cumsum(0) - self.lengths

    def padded(self, index: Int[Tensor, " B"], *, left: bool = False) -> tuple[Int[Tensor, "B W"], Int[Tensor, " B"]]:
        """The lists number ``index`` as ``(ids, lengths)``, padded with 0 on the right (or ``left``) to the longest."""
        lengths = self.lengths[index]
        column = torch.arange(max(int(lengths.max()), 1))[None, :]
        if left:
            column = column - (column.shape[1] - lengths)[:, None]
        real = (column >= 0) & (column < lengths[:, None])
        source = (self._starts[index][:, None] + column).clamp(0, max(len(self.flat) - 1, 0))
        return self.flat[source].masked_fill(~real, 0), lengths

    def digest(self) -> str:
        """A fingerprint of the tokens and of where each list ends."""
        return hashlib.sha256(self.flat.numpy().tobytes() + self.lengths.numpy().tobytes()).hexdigest()[:16]


class LengthBuckets(Sampler[int]):
    """A fresh order an epoch, in windows (optimizer steps) of examples of similar length.

    The order depends on the seed and the epoch alone: shuffle, sort by length within pools of many windows, shuffle the
    windows of a pool. The examples that fill no window come last, as they fall.
    """

    def __init__(self, lengths: Int[Tensor, " N"], window: int, seed: int) -> None:
        self._lengths, self._window, self._seed, self._epoch = lengths.numpy(), window, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self._seed, self._epoch])
        order = rng.permutation(len(self._lengths))
        full = len(order) // self._window * self._window
        for start in range(0, full, _POOL * self._window):
            pool = order[start : min(start + _POOL * self._window, full)]
            windows = pool[np.argsort(self._lengths[pool], kind="stable")].reshape(-1, self._window)
            yield from rng.permutation(windows).ravel().tolist()
        yield from order[full:].tolist()


class Objective(nn.Module):
    """A loss as a module, so that what wraps it for several processes wraps the whole computation.

    ``summed_loss(model, **batch)`` is a *sum* over items (tokens, prompts); the mean is taken over all the items of one
    optimizer step, so that the gradient does not depend on how the step is split into micro-batches. Items are counted
    by Trainer: they are the entries of ``labels`` in a batch, whatever their value.
    """

    accepts_loss_kwargs = True

    def __init__(self, model: PreTrainedModel, summed_loss: Callable[..., Float[Tensor, ""]]) -> None:
        super().__init__()
        self.model = model
        self._summed_loss = summed_loss

    def forward(self, *, labels: Tensor, num_items_in_batch: Any = None, **batch: Tensor) -> dict[str, Tensor]:
        items = labels.numel() if num_items_in_batch is None else num_items_in_batch
        return {"loss": self._summed_loss(self.model, **batch) / items}


class Fit(NamedTuple):
    """What training leaves behind, beside the weights."""

    history: list[dict[str, float]]
    """One entry a logging interval: ``step, epoch, loss`` (mean since the last), ``learning_rate, grad_norm``; and one
    an evaluation with what ``evaluate`` returned."""
    seconds: float
    """Wall-clock time of this call."""
    steps: int
    """Optimizer steps of the whole run; fewer than planned when it stopped early."""
    evaluation: dict[str, float]
    """What ``evaluate`` returned for the weights that the model ends with; empty without it."""


def fit(
    objective: Objective,
    lengths: Int[Tensor, " N"],
    collate: Callable[[Int[Tensor, " B"]], dict[str, Tensor]],
    config: TrainingConfig,
    *,
    save: Callable[[Path], None],
    inputs: Mapping[str, str] | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    on_progress: OnProgress | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    load: Callable[[Path], None] | None = None,
    eval_steps: int | None = None,
    best: BestWeights | None = None,
) -> Fit:
    """Minimise ``objective`` over ``len(lengths)`` examples, in place, and leave the model in eval mode.

    ``collate`` makes the batch of the examples numbered ``[B]``; ``lengths`` only serve to group them. Checkpoints
    (``save`` writes the model, Trainer its own state) go to ``output_dir``; ``resume=True`` continues from the last one
    if there is one, and ends with the weights of a run that never stopped. ``inputs`` are fingerprints by name of all
    that such a run depends on beside ``config``. Ctrl-C finishes the step, leaves a checkpoint and raises. So does the
    last step: nothing that fails later loses the training, and who has saved the finished model calls
    :func:`remove_checkpoints`. ``load`` reads into the model what ``save`` wrote, where that is no Hugging Face folder.
    ``evaluate`` runs after every epoch and every ``eval_steps`` steps. With ``best`` the model ends with the weights of
    the best evaluation, and the run when that is long ago.

    Raises:
        ValueError: ``output_dir`` holds a checkpoint and ``resume`` is False, or one of another run.
    """
    identity = {"config": dataclasses.asdict(config), "examples": len(lengths), **(inputs or {})}
    checkpoint = _checkpoint(output_dir, resume, identity)
    steps = config.epochs * -(-len(lengths) // config.window)
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(untouched_globals())
        folder = Path(output_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        interrupt = stack.enter_context(deferred_interrupt(active=output_dir is not None))
        every = (steps // config.epochs, eval_steps) if evaluate is not None else ()
        watcher = _Watcher(on_progress, interrupt, every, best, may_save=output_dir is not None)
        trainer = _Trainer(objective, config, lengths, collate, steps, folder, save, load, identity, evaluate, best)
        trainer.add_callback(watcher)
        if best is not None and checkpoint is not None:
            best.load(Path(checkpoint))
        try:
            if best is not None and checkpoint is not None and best.exhausted:  # it had stopped early already
                trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
            else:
                trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            objective.model.eval()
        history = [entry for entry in trainer.state.log_history if "train_runtime" not in entry]
        if interrupt.is_set():
            raise KeyboardInterrupt
        if best is not None:
            best.restore()
        evaluation = best.evaluation if best is not None else trainer.evaluation
        if evaluate is not None and not evaluation:  # resumed after the last step
            evaluation = evaluate()
            if not any(evaluation.keys() <= entry.keys() for entry in history[-2:]):
                history.append({**evaluation, "step": trainer.state.global_step, "epoch": float(config.epochs)})
    return Fit(history, time.perf_counter() - start, trainer.state.global_step, evaluation)


def remove_checkpoints(output_dir: str | Path) -> None:
    """Remove the checkpoints of a run whose model is saved."""
    for folder in _checkpoints(output_dir):
        shutil.rmtree(folder)


@contextlib.contextmanager
def untouched_globals() -> Iterator[None]:
    """Keep Python's, NumPy's and torch's global random states, and transformers' log level, as they were.

    Inside, transformers shows no progress bars of its own.
    """
    python, numpy, level = random.getstate(), np.random.get_state(), hf_logging.get_verbosity()  # noqa: NPY002
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def encode_texts(
    tokenizer: Any, prompts: Sequence[Any], responses: Sequence[str], *, rendered: bool = False
) -> tuple[list[list[int]], list[list[int]]]:
    """``(prompt tokens, response tokens)`` of many texts at once, without EOS; special tokens in prompts only.

    The tokens are those of ``LanguageModel.encode_prompt`` and ``encode_response``: a chat goes through the tokenizer's
    template, which brings its own special tokens. ``rendered=True``: so has a string that starts with BOS.
    """
    keys: list[tuple[str, bool]] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            special = not (rendered and tokenizer.bos_token and prompt.startswith(tokenizer.bos_token))
            keys.append((prompt, special))
        else:
            keys.append((tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False), False))
    encoded: dict[tuple[str, bool], list[int]] = {}
    for special in (True, False):
        texts = [key for key in dict.fromkeys(keys) if key[1] is special]
        encoded |= zip(texts, _encode(tokenizer, [text for text, _ in texts], special), strict=True)
    return [encoded[key] for key in keys], _encode(tokenizer, list(responses), False)


def _encode(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(
        texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False
    ).input_ids


class _Trainer(Trainer):
    """Trainer with our batches and our way to write a model; the loop, the optimizer and its state are Trainer's."""

    def __init__(
        self,
        objective: Objective,
        config: TrainingConfig,
        lengths: Int[Tensor, " N"],
        collate: Callable[[Int[Tensor, " B"]], dict[str, Tensor]],
        steps: int,
        folder: Path,
        save: Callable[[Path], None],
        load: Callable[[Path], None] | None,
        identity: Mapping[str, Any],
        evaluate: Callable[[], dict[str, float]] | None,
        best: BestWeights | None,
    ) -> None:
        on_cpu = objective.model.device.type == "cpu"
        args = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            num_train_epochs=config.epochs,
            learning_rate=config.learning_rate,
            lr_scheduler_type="constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule,
            warmup_steps=round(config.warmup_ratio * steps),
            weight_decay=config.weight_decay,
            adam_beta2=config.adam_beta2,
            max_grad_norm=config.max_grad_norm,
            logging_steps=config.logging_steps or max(1, steps // 50),
            logging_first_step=True,
            logging_nan_inf_filter=False,
            save_strategy="no" if config.save_steps is None else "steps",
            save_steps=config.save_steps or 1,
            save_total_limit=1,
            seed=config.seed,
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="none",
        )
        self._order = LengthBuckets(lengths, config.window, config.seed)
        self._objective, self._save_model, self._load_model, self._identity = objective, save, load, identity
        self._measure, self._best = evaluate, best
        self.evaluation: dict[str, float] = {}
        super().__init__(
            model=objective,
            args=args,
            train_dataset=range(len(lengths)),  # type: ignore[arg-type]
            data_collator=lambda index: collate(torch.tensor(index)),
        )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._order

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        assert self._measure is not None
        self.evaluation = self._measure()
        self.log(dict(self.evaluation))
        if self._best is not None:
            self._best.update(self.evaluation)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, self.evaluation)
        return self.evaluation

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        self._save_model(folder)
        if self._best is not None:
            self._best.save(folder)
        write_json(folder / "run.json", self._identity)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        own: Any = self._objective.model
        try:
            if self._load_model is not None:
                return self._load_model(Path(resume_from_checkpoint))
            saved = type(own).from_pretrained(resume_from_checkpoint, dtype=own.dtype, use_safetensors=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"a checkpoint must be readable, with path (={resume_from_checkpoint!r}): {error}"
            ) from error
        own.load_state_dict(saved.state_dict())


class _Watcher(TrainerCallback):
    """Reports progress, calls for evaluations, and turns an interrupt into a checkpoint at the end of a step."""

    def __init__(
        self,
        on_progress: OnProgress | None,
        interrupt: threading.Event,
        eval_every: Sequence[int | None],
        best: BestWeights | None,
        *,
        may_save: bool,
    ) -> None:
        self._on_progress, self._interrupt, self._may_save = on_progress, interrupt, may_save
        self._eval_every, self._best = [steps for steps in eval_every if steps], best
        self._latest: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._latest = dict(logs or {})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._on_progress is not None and state.is_world_process_zero:
            try:
                self._on_progress(state.global_step, state.max_steps, self._latest)
            except KeyboardInterrupt:
                self._interrupt.set()
        # Trainer now logs, evaluates and saves, in that order: a checkpoint knows of the evaluation at its own step.
        control.should_evaluate = any(state.global_step % steps == 0 for steps in self._eval_every)
        if self._interrupt.is_set():
            control.should_training_stop = True
        if self._interrupt.is_set() or state.global_step >= state.max_steps:
            control.should_save = self._may_save

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._best is not None and self._best.exhausted:
            control.should_training_stop = True
            control.should_save = self._may_save


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders, oldest step first."""
    return sorted(Path(output_dir).glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))


def _checkpoint(output_dir: str | Path | None, resume: bool, identity: Mapping[str, Any]) -> str | None:
    """The checkpoint to continue from, or None for a fresh start."""
    if output_dir is None:
        if resume:
            raise ValueError("resume (=True) must have an output_dir (=None) to resume from. Give output_dir.")
        return None
    # Trainer writes its state last: a folder without it was cut short and is passed over.
    complete = [folder for folder in _checkpoints(output_dir) if (folder / "trainer_state.json").is_file()]
    if not complete:
        return None
    if not resume:
        raise ValueError(
            f"output_dir (={str(output_dir)!r}) must not hold the checkpoint of an unfinished run "
            f"({complete[-1].name}). Continue it with resume=True, remove it, or choose another folder."
        )
    try:
        saved = json.loads((complete[-1] / "run.json").read_text("utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"a checkpoint must be readable, with path (={str(complete[-1])!r}): {error}") from error
    for key, value in identity.items():
        if saved.get(key) != value:
            raise ValueError(
                f"a run must be resumed with the {key} it started with, with {key} (={value!r}) ≠ {saved.get(key)!r} "
                f"in {complete[-1]}. Restore it, or start in another folder."
            )
    return str(complete[-1])
