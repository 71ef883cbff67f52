"""The over-optimisation lab. Its hand-made proxy stands here, where the lab can name it as ``module:callable``."""

from typing import Any

from textenv.tasks import micro


def count_wanted(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Letters that the prompt asks for: all that a reader sees who misses that more of them are worth less."""
    return [
        float(sum(word in micro.wanted_letters(prompt) for word in completion.split()))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
