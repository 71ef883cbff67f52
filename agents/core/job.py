"""What an experiment gives to an algorithm, and what it gets back."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from textenv.evaluation import Agent
from textenv.training.progress import Advance
from textenv.training.trackers import Tracker


class Job(NamedTuple):
    """One agent to train, in one environment, with one seed."""

    env_id: str
    options: Mapping[str, Any]
    """Options of the algorithm, as an experiment file gives them."""
    seed: int
    total_episodes: int
    folder: Path
    """Folder of the checkpoint from which an interrupted job continues."""
    advance: Advance | None = None
    evaluation: Mapping[str, Any] | None = None
    """Options of the environment that the agent is measured in, where they differ, like other prompts."""
    report_to: Sequence[Tracker] = ()
    """Trackers that get the figures of the training as well."""
    name: str | None = None
    """What the job is called there."""


class Trained(NamedTuple):
    """A trained agent."""

    agent: Agent
    model: Any
    """The policy's ``PreTrainedModel``, for exact measurement; None if the agent is not a single model."""
    curve: list[dict[str, float]]
    """Means of the training episodes by update: ``episodes, reward, rm_score, kl``, and ``gold_score`` where known."""
    tokens: int
    """Response tokens sampled in training."""


class Algorithm(ABC):
    """Interface of the classes in :data:`agents.algorithms.ALGORITHMS`."""

    @classmethod
    def option_names(cls) -> Collection[str]:
        """The options that an experiment file may give."""
        return ()

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Raise ValueError or TypeError for a value that training would refuse."""
        return

    @classmethod
    @abstractmethod
    def train(cls, job: Job) -> Trained:
        """Build the agent and train it."""
