"""Settings shared by all supervised training."""

from dataclasses import dataclass
from typing import Annotated

from textenv.settings import Below1, Count, Positive, PositiveInt, check_settings
from textenv.training.optimizer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(OptimizerConfig):
    """Optimisation, shared by supervised fine-tuning and reward-model training.

    Dropout is off in every model of this package and stays off in training.
    """

    learning_rate: Positive = 1e-4
    """Peak learning rate of AdamW, > 0. Higher learns faster; too high diverges."""
    epochs: PositiveInt = 1
    """Passes over the data, ≥ 1. More fits the data better, then overfits it."""
    batch_size: PositiveInt = 32
    """Examples per forward pass, ≥ 1. Higher is faster and takes more memory."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward passes per optimizer step, ≥ 1. The gradient is that of one large batch, however it is split."""
    warmup_ratio: Annotated[Below1, "It is a share of the steps."] = 0.05
    """Share of the steps, in [0, 1), over which the learning rate rises from 0 to its peak."""
    seed: Count = 0
    """Seed of the order of the examples. The same seed gives the same weights, bit for bit on a CPU."""
    logging_steps: Annotated[PositiveInt | None, "Use None for the default."] = None
    """Optimizer steps between entries of the history, ≥ 1; None: about 50 entries per run."""
    save_steps: Annotated[PositiveInt | None, "Use None for the default."] = None
    """Optimizer steps between checkpoints in the output folder, ≥ 1; None: only when interrupted."""

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def window(self) -> int:
        """Examples in one optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps
