"""Rules to compare a reward model with: they score well on some data without understanding anything.

textenv rm-bench my-model reward_models.benchmark.baselines:longer --compare
"""

from typing import Any


def longer(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The number of characters of the response."""
    return [float(len(completion)) for completion in completions]


def shorter(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Minus the number of characters of the response."""
    return [-float(len(completion)) for completion in completions]
