"""What an iteration of PPO with its default settings would cost here: one small real one, extrapolated by tokens."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from agents.doctor.checks.environment import EnvironmentPart
from agents.doctor.finding import Check, Seen
from agents.ppo import PPOConfig
from textenv import registry


def iteration(part: EnvironmentPart) -> Iterator[Seen]:
    """An iteration of PPO with default settings fits the memory and the patience."""
    full, learned, log = PPOConfig(), part.learned, part.learned.log
    model = part.vector.task.reference.model
    times = full.batch_size / learned.episodes
    seconds = times * (log["rollout_seconds"] + full.epochs * log["update_seconds"])
    tokens = times * log["update_tokens"] / full.minibatches
    widest = min(tokens, full.max_tokens_per_pass) / log["update_tokens"] * learned.activations
    parts = {
        "policy with gradients and Adam": 16.0 * learned.trained,
        "reference": _bytes(model),
        "reward model": _bytes(_module(part)),
        "activations": widest,
    }
    listed = ", ".join(f"{name} {_mib(size)}" for name, size in parts.items() if size)
    what = f"an iteration of {full.batch_size} episodes takes about {_rounded(seconds)} s"
    yield Seen("note", f"{what} and {_mib(sum(parts.values()))} ({listed})")


def _module(part: EnvironmentPart) -> Any:
    config = part.vector.task.config
    model = getattr(registry.reward_model(config.reward_model, *config.loading), "model", None)
    return model if isinstance(model, torch.nn.Module) else None


def _bytes(model: torch.nn.Module | None) -> float:
    return 0.0 if model is None else float(sum(w.numel() * w.element_size() for w in model.parameters()))


def _mib(size: float) -> str:
    return f"{_rounded(size / 2**20)} MiB"


def _rounded(value: float) -> str:
    """Two significant digits: an estimate has no more."""
    return f"{round(value, 1 - math.floor(math.log10(value))):,g}" if value > 0 else "0"


COST_CHECKS = {
    "cost": Check(
        iteration,
        "Adam's moments and activations, not the weights, decide whether a policy fits: 16 bytes a parameter (ZeRO, "
        "Rajbhandari et al. 2020).",
        "Set lora_rank, train_layers, gradient_checkpointing, max_tokens_per_pass or batch_size: see docs/memory.md.",
    ),
}
