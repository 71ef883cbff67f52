"""The identity of a reward model: the key under which its scores are cached."""

import json
from typing import Any


def identity_of(model: Any) -> str | None:
    """The model's optional attribute ``identity``. Models of equal identity give equal scores.

    None for a plain callable: nothing short of running it says what it does.
    """
    return getattr(model, "identity", None)


def joint_identity(kind: str, parts: dict[str, Any], **settings: Any) -> str | None:
    """The identity of a model made of other models; None unless every part has one."""
    identities = {name: identity_of(part) for name, part in parts.items()}
    if None in identities.values():
        return None
    return json.dumps({"kind": kind, "parts": identities, **settings}, sort_keys=True)
