"""The type of a reward model, as it appears in every signature that takes one."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class RewardModel(Protocol):
    """Scores texts; higher is better. It gets text, since its tokenizer need not be the policy's.

    Called as ``model(prompts, completions, **columns)``. Columns are further facts about each episode, one value per
    text: the fields of the prompt's record, and what an environment adds (``finish_reason``; ``chat``, the messages,
    where prompts are chats). A model names the columns that it wants, or takes ``**columns`` and ignores them. Scores
    may also be a tensor or an array, ``[B]`` or ``[B, 1]``; anything but one finite number per text is an error.

    A model that is a sum may also have a method ``terms``, called the same way, that returns ``{name: scores}`` of its
    parts: an environment lists them in ``info["reward_terms"]``.
    """

    def __call__(self, prompts: list[str], completions: list[str], /, *args: Any, **columns: Any) -> Sequence[float]:
        """``*args: Any`` beside ``**columns: Any`` tells a type checker that any further parameters are fine."""
        ...
