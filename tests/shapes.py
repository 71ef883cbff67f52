"""What the tests check of annotations: every jaxtyping shape, in every call.

Other annotations are left to the type checker. What a user passes is checked by the package itself, whose errors the
tests want to see instead of beartype's.
"""

from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def has_shape(annotation: Any) -> bool:
    """Whether an annotation is a jaxtyping array, or holds one: ``Float[Tensor, "B T"] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(has_shape(part) for part in get_args(annotation))


def checked(function: Any) -> Any:
    """``function`` with its shapes checked by beartype; classes and functions without any as they are."""
    if isinstance(function, type) or not any(map(has_shape, function.__annotations__.values())):
        return function
    function.__annotations__ = {
        name: annotation if has_shape(annotation) else Any for name, annotation in function.__annotations__.items()
    }
    return beartype(function)
