"""JSON values held against the types of what they become."""

import sys
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_KINDS: dict[Any, str] = {
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    NoneType: "null",
    list: "a list",
    Mapping: "an object",
}


def check_value(name: str, value: Any, hint: Any, where: str = "") -> None:
    """Refuse a value that is not what its type says, by its name and ``where`` it stands."""
    if not fits(value, hint):
        raise ValueError(f"{name}{where} must be {_described(hint)}, with {name} (={value!r}). Give such a value.")


def fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type: a whole number is a float, a truth value is no number."""
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, option) for option in get_args(hint))
    if origin is not None:  # a list or an object, whatever is in it
        return isinstance(value, list | tuple if origin is list else origin)
    if hint is float:
        return isinstance(value, int | float) and type(value) is not bool and abs(value) <= sys.float_info.max
    return type(value) is hint


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {get_args(hint)}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_described, get_args(hint)))
    return _KINDS[get_origin(hint) or hint]
