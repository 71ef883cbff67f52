"""One small iteration of PPO with a single step, and what it shows of the set-up."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from agents.doctor.parts import LARGE
from agents.ppo import PPO, PPOConfig
from textenv.vector import make_vec


class Learned(NamedTuple):
    """What the iteration has shown."""

    episodes: int
    trained: int
    """Numbers that learn."""
    activations: int
    """Bytes that autograd kept for the backward pass."""
    log: Mapping[str, float]
    """The record of its update."""


def one_iteration(env_id: str, options: Mapping[str, Any], reference: nn.Module) -> Learned:
    """Fewer episodes of a large model."""
    count = 4 if sum(weight.numel() for weight in reference.parameters()) > LARGE else 32
    env = make_vec(env_id, count, **options)
    learner = PPO(env, PPOConfig(batch_size=count, epochs=1, minibatches=1))
    saved = _Saved({weight.data_ptr() for weight in learner.actor.parameters()})
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept):
        learner.learn(count)
    trained = sum(weight.numel() for weight in learner.actor.parameters() if weight.requires_grad)
    return Learned(count, trained, saved.bytes, learner.history[-1])


class _Saved:
    """Counts the bytes that autograd keeps for the backward pass, each storage once."""

    def __init__(self, weights: set[int]) -> None:
        self.bytes, self._seen = 0, set(weights)

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor
