"""What is logged of each update: its batch, its optimiser steps, speed and memory (``docs/logging.md``)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from agents.core.actor import Evaluated
from agents.core.returns import Advantages
from agents.core.rollout import Rollout
from textenv.kl import kl_k3
from textenv.lm import Responses
from textenv.served.sampler import Gap, ServedSampler
from textenv.training.memory import peak_memory_mb
from textenv.training.processes import together

MEASURED = (
    "rollout_seconds",
    "update_seconds",
    "rollout_tokens_per_second",
    "update_tokens_per_second",
    "memory_mb",
    "cuda_memory_mb",
)
"""Figures of the machine: two runs that learn the same differ in them alone."""


def rollout_log(rollout: Rollout, sampler: ServedSampler | None = None) -> dict[str, float]:
    """Means over a batch of episodes, and what is unusual in it; ``sampler``: the server that drew it."""
    kl, lengths = rollout.kl_per_token.numpy(), rollout.tokens.response_lengths
    episodes = len(rollout.rewards)
    log = {
        "reward": rollout.rewards.mean().item(),
        "rm_score": rollout.rm_scores.mean().item(),
        "kl": rollout.kl_per_token.sum(1).mean().item(),
        "kl_k3": kl_k3(kl, np.zeros_like(kl)).sum(1).mean().item(),
        "nll": -rollout.logprobs[rollout.tokens.response_mask].mean().item(),
        "response_tokens": lengths.float().mean().item(),
        "shortest_response": float(lengths.min()),
        "longest_response": float(lengths.max()),
        "eos_rate": rollout.ended.double().mean().item(),
        "truncated_responses": float(rollout.truncated.sum()),
    }
    if episodes > 1:
        log["kl_se"] = float(rollout.kl_per_token.double().sum(1).std() / episodes**0.5)
    if sampler is not None:
        log |= sum(together(sampler.gap), Gap()).log()
    return log if rollout.gold is None else {**log, "gold_score": rollout.gold.mean().item()}


@torch.no_grad()
def pass_log(new: Evaluated, old_logprobs: torch.Tensor, batch: Responses, packed: bool) -> dict[str, Any]:
    """The ratios of a pass that trains, π(y_t) / π_old(y_t), its real tokens, and its positions with the padding."""
    ratio = (new.logprobs - old_logprobs)[batch.response_mask].exp()
    lengths = batch.total_lengths
    tokens = int(lengths.sum())
    positions = tokens if packed else len(lengths) * int(lengths.max())
    ratios = {"ratio_max": ratio.max(), "ratio_min": ratio.min()}
    return {**ratios, "update_tokens": tokens, "update_positions": positions}


def add_figures(log: dict[str, float], figures: Mapping[str, Any]) -> None:
    """Add the figures of a micro-batch to those of its step: sums, but the largest ``…_max`` and smallest ``…_min``."""
    for name, figure in figures.items():
        value = float(figure.item() if isinstance(figure, torch.Tensor) else figure)
        combine = max if name.endswith("_max") else min if name.endswith("_min") else float.__add__
        log[name] = combine(log[name], value) if name in log else value


def totals(log: Mapping[str, float]) -> dict[str, float]:
    """The log of an optimiser step from the logs that its processes have of their shares."""
    total: dict[str, float] = {}
    for share in together(log):
        add_figures(total, share)
    return total


def update_log(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The log of an update from those of its optimiser steps: means, and the extremes of all of them."""
    columns = {name: [step[name] for step in steps] for name in steps[0]}
    tokens, positions = sum(columns.pop("update_tokens")), sum(columns.pop("update_positions"))
    log = {name: float(np.mean(column)) for name, column in columns.items()}
    log |= {"ratio_max": max(columns["ratio_max"]), "ratio_min": min(columns["ratio_min"])}
    log["first_ratio_deviation"] = max(columns["ratio_max"][0] - 1.0, 1.0 - columns["ratio_min"][0])
    return {**log, "update_tokens": tokens, "padding_share": 1.0 - tokens / positions}


def explained_variance(rollout: Rollout, targets: Advantages) -> dict[str, float]:
    """How much of the variance of the returns, over real tokens, the values knew that were held while playing.
    Empty where the returns are alike up to rounding: there is nothing to know."""
    mask, returns = rollout.tokens.response_mask, targets.returns
    returns, values = returns[mask].double(), rollout.values[mask].double()
    residual, variance = (float(x.var(unbiased=False)) for x in (returns - values, returns))
    scale = float(torch.cat([returns, values]).abs().max())
    alike = variance <= max(1e-12, (1e-6 * scale) ** 2)
    return {} if alike else {"explained_variance": 1.0 - residual / variance}


def machine_log(
    log: Mapping[str, float], rollout: Rollout, times: tuple[float, float, float], device: str
) -> dict[str, float]:
    """Speed, and the highest memory so far; ``times``: when playing began, the steps began and they ended, seconds."""
    started, played, ended = times
    rollout_seconds, update_seconds = played - started, ended - played
    sampled = float(rollout.tokens.response_lengths.sum())
    figures = {
        "rollout_seconds": rollout_seconds,
        "update_seconds": update_seconds,
        "rollout_tokens_per_second": sampled / rollout_seconds,
        "update_tokens_per_second": log["update_tokens"] / update_seconds,
    }
    memory = peak_memory_mb()
    if memory is not None:
        figures["memory_mb"] = memory
    if torch.device(device).type == "cuda":
        figures["cuda_memory_mb"] = torch.cuda.max_memory_allocated(device) / 1e6
    return figures
