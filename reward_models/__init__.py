"""Reward models: preferences in, scalar scores out.

The names below are imported on first use, so that ``import reward_models`` loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reward_models.evaluation import evaluate_reward_model
    from reward_models.preferences import load_rankings
    from reward_models.scorers.transformer import TransformerRewardModel, load_reward_model
    from reward_models.training.trainer import RewardConfig, train_reward_model

__all__ = [
    "RewardConfig",
    "TransformerRewardModel",
    "evaluate_reward_model",
    "load_rankings",
    "load_reward_model",
    "train_reward_model",
]

_MODULES = {
    "RewardConfig": "training.trainer",
    "TransformerRewardModel": "scorers.transformer",
    "evaluate_reward_model": "evaluation",
    "load_rankings": "preferences",
    "load_reward_model": "scorers.transformer",
    "train_reward_model": "training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
