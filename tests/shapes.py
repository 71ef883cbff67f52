"""What the tests check of annotations: every jaxtyping shape, in a test's first calls and in ever fewer later ones.

Other annotations are left to the type checker. What a user passes is checked by the package itself, whose errors the
tests want to see instead of beartype's.
"""

import functools
from typing import Any, get_args

import jaxtyping
from beartype import beartype
from jaxtyping import AbstractArray

FIRST = 8
"""Calls of a function that a test checks; then it checks the 16th, the 32nd and so on. With checks in every call, fast
tests took 1.8 times as long."""

_jaxtyped = jaxtyping.jaxtyped
_counts: dict[Any, int] = {}


def install(*packages: str) -> None:
    """Check what is imported of these packages from now on."""
    jaxtyping.jaxtyped = _in_few_calls
    jaxtyping.install_import_hook(packages, "tests.shapes.checked")


def new_test() -> None:
    """Count calls anew."""
    _counts.clear()


def _in_few_calls(*, typechecker: Any) -> Any:
    """jaxtyping's decorator, which its import hook puts before every function and class."""

    def decorate(found: Any) -> Any:
        whole = _jaxtyped(typechecker=typechecker)
        if isinstance(found, type):
            return whole(found)
        if not any(map(has_shape, found.__annotations__.values())):
            return found
        with_checks = whole(found)

        @functools.wraps(found)
        def call(*args: Any, **kwargs: Any) -> Any:
            count = _counts[call] = _counts.get(call, 0) + 1
            rare = count > FIRST and count & (count - 1)
            return (found if rare else with_checks)(*args, **kwargs)

        return call

    return decorate


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
