"""Training a policy in little memory; see docs/memory.md."""

from textenv.training.memory.policy import (
    MemoryConfig,
    PassConfig,
    Trunk,
    critic_to_train,
    frozen_to_offload,
    named_policy,
    peak_memory_mb,
    policy_to_train,
    recompute_activations,
    saved_policy,
)

__all__ = [
    "MemoryConfig",
    "PassConfig",
    "Trunk",
    "critic_to_train",
    "frozen_to_offload",
    "named_policy",
    "peak_memory_mb",
    "policy_to_train",
    "recompute_activations",
    "saved_policy",
]
