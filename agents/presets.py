"""Settings by name. The defaults of a config suit a pretrained model; the small worlds included here have presets.

The presets are those of the demo and of ``benchmarks/agents.py``. The learning rate falls to 0 over the run.
"""

from typing import Any

from textenv.config import hint

_GROUP = {"epochs": 2, "minibatches": 4}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "pretrained": {},
    "micro": {
        "ppo": {"learning_rate": 7e-4},
        "rloo": {**_GROUP, "learning_rate": 1e-3},
        "grpo": {**_GROUP, "learning_rate": 1e-3},
        "reinforce": {"learning_rate": 2e-3},
        "online-dpo": {**_GROUP, "learning_rate": 1e-3},
        "dpo": {"learning_rate": 1e-3, "batch_size": 64},
    },
    "assistant": {
        "ppo": {"epochs": 2, "learning_rate": 3e-4},
        "rloo": {**_GROUP, "learning_rate": 3e-4},
        "grpo": {**_GROUP, "learning_rate": 3e-4},
        "reinforce": {"learning_rate": 1e-3},
        "online-dpo": {**_GROUP, "learning_rate": 3e-4},
        "dpo": {"learning_rate": 3e-4, "batch_size": 64},
    },
}
"""Preset → learner → settings that differ from the defaults of its config."""
WORLDS = {"textenv/Micro-v0": "micro", "textenv/Assistant-v0": "assistant"}
"""The preset that an id is trained with unless another is named."""


def preset(name: str, learner: str, total_episodes: int) -> dict[str, Any]:
    """Settings of a learner (``ppo``, ``rloo``, …) for a run of so many episodes: ``PPOConfig(**preset(…))``.

    Raises:
        ValueError: no preset has that name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}. {hint(name, PRESETS)}".rstrip())
    settings = PRESETS[name].get(learner)
    if settings is None or learner == "dpo":  # whose schedule is as long as its data
        return dict(settings or {})
    return {"lr_decay_episodes": total_episodes, **settings}
