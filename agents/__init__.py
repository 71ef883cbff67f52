"""Agents for text environments: learners, baselines, and supervised fine-tuning.

The names below are imported when they are first used, so that ``import agents`` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agents.algorithms import ALGORITHMS

if TYPE_CHECKING:
    from agents.baselines import RandomAgent, ReferenceAgent
    from agents.best_of_n import BestOfN
    from agents.dpo import DPO, DPOConfig, train_dpo
    from agents.grpo import GRPO, GRPOConfig
    from agents.online_dpo import OnlineDPO, OnlineDPOConfig
    from agents.ppo import PPO, PPOConfig
    from agents.reinforce import Reinforce, ReinforceConfig
    from agents.rloo import RLOO, RLOOConfig
    from agents.sft import SFTConfig, train_sft

__all__ = [
    "DPO",
    "GRPO",
    "PPO",
    "RLOO",
    "BestOfN",
    "DPOConfig",
    "GRPOConfig",
    "OnlineDPO",
    "OnlineDPOConfig",
    "PPOConfig",
    "RLOOConfig",
    "RandomAgent",
    "ReferenceAgent",
    "Reinforce",
    "ReinforceConfig",
    "SFTConfig",
    "train_dpo",
    "train_sft",
]


def __getattr__(name: str) -> Any:
    modules = {"train_dpo": "agents.dpo"}
    modules |= {"SFTConfig": "agents.sft", "train_sft": "agents.sft"}
    for target in ALGORITHMS.values():
        module, _, kind = target.partition(":")
        modules |= {kind: module, f"{kind}Config": module}
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(modules[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
