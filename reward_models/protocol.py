"""What a reward model is: any callable with this signature, and two things more that one may offer."""

import json
from collections.abc import Sequence
from typing import Any, Protocol


class RewardModel(Protocol):
    """Scores texts; higher is better. It gets text, since its tokenizer need not be the policy's.

    ``columns`` are further facts of each episode, one value a text: the fields of the prompt's record, and what an
    environment adds (``finish_reason``; ``chat``, the messages, where prompts are chats). A model names those that it
    wants, or takes ``**columns`` and ignores them. Scores may also be a tensor or an array, ``[B]`` or ``[B, 1]``. The
    scorer of an environment refuses what is not one finite number a text.
    """

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> Sequence[float]: ...


class ItemisedRewardModel(RewardModel, Protocol):
    """A reward model that is a sum and tells its parts, which an environment lists in ``info["reward_terms"]``."""

    def terms(self, prompts: list[str], completions: list[str], **columns: Any) -> dict[str, Sequence[float]]:
        """Scores of each part, the same names on every call; their sum is what calling the model returns."""
        ...


def identity_of(model: Any) -> str | None:
    """What tells a model from every other: its optional attribute ``identity``. Models of equal identity score alike.

    None for a plain callable: nothing short of running it says what it does.
    """
    return getattr(model, "identity", None)


def joint_identity(kind: str, parts: dict[str, Any], **settings: Any) -> str | None:
    """The identity of a model made of other models; None unless every part has one."""
    identities = {name: identity_of(part) for name, part in parts.items()}
    if None in identities.values():
        return None
    return json.dumps({"kind": kind, "parts": identities, **settings}, sort_keys=True)
