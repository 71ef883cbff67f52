"""Rules to hold a reward model against: what scores well here without understanding anything.

textenv rm-bench my-model reward_models.benchmark.baselines:longer --compare
"""

from typing import Any


def longer(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Characters of the response."""
    return [float(len(completion)) for completion in completions]


def shorter(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Minus the characters of the response."""
    return [-float(len(completion)) for completion in completions]
