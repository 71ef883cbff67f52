"""What a reward model is: any callable with this signature."""

from collections.abc import Sequence
from typing import Any, Protocol


class RewardModel(Protocol):
    """Scores texts; higher is better. It gets text, since its tokenizer need not be the policy's.

    ``columns`` are further facts of each episode, one value a text: the fields of the prompt's record, and what an
    environment adds (``finish_reason``, …). A model names those that it wants, or takes ``**columns`` and ignores them.
    The scorer of an environment refuses scores that are not finite, or not one a text.
    """

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> Sequence[float]: ...
