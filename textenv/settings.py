"""Ranges of settings, declared beside each field and checked in one place.

    @dataclass(frozen=True, kw_only=True)
    class PPOConfig:
        clip_range: Annotated[float, Gt(0), "0.2 is usual."] = 0.2

        def __post_init__(self) -> None:
            check_settings(self)

The bounds are those of ``annotated_types``; a string is the remedy at the end of an error. Types are checked too: True
and 1.5 are not whole numbers, a whole number may stand for a float, and NaN and infinity are refused.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

PositiveInt = Annotated[int, Ge(1)]
Count = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
"""A share or probability, both ends included."""
Below1 = Annotated[float, Ge(0), Lt(1)]

_KINDS: dict[Any, str] = {
    str: "a string",
    bool: "True or False",
    int: "a whole number",
    float: "a finite number",
    NoneType: "None",
    Path: "a path",
}
_HOLDS = {Ge: lambda value, bound: value >= bound.ge, Gt: lambda value, bound: value > bound.gt}
_HOLDS |= {Le: lambda value, bound: value <= bound.le, Lt: lambda value, bound: value < bound.lt}


def check_settings(settings: Any, where: str = "") -> None:
    """Check every field of a dataclass against its annotation; ``where`` follows the field's name in an error.

    Raises:
        ValueError: a field has the wrong type or lies outside its range.
    """
    for name, hint in _hints(type(settings)).items():
        check_value(name, getattr(settings, name), hint, where)


def check_value(name: str, value: Any, hint: Any, where: str = "") -> None:
    """Check one value against an annotation; see :func:`check_settings`."""
    options, remedy = _options(hint)
    fitting = [option for option in options if _has_type(value, option.type)]
    if not fitting:
        raise ValueError(_message(name + where, " or ".join(_type_name(o.type) for o in options), value, remedy))
    for option in fitting:
        if all(_HOLDS[type(bound)](value, bound) for bound in option.bounds):
            return
    low = any(isinstance(b, Ge | Gt) and not _HOLDS[type(b)](value, b) for b in fitting[0].bounds)
    default = "Raise it." if low else "Lower it."
    raise ValueError(_message(name + where, _range(fitting[0].bounds), value, remedy or default))


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of an annotation and lies in its range."""
    try:
        check_value("value", value, hint)
    except ValueError:
        return False
    return True


class _Option(NamedTuple):
    """One member of a union: a plain type and its bounds."""

    type: Any
    bounds: tuple[Any, ...]


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _options(hint: Any) -> tuple[list[_Option], str]:
    """The members of an annotation, and its remedy ("" without one)."""
    if get_origin(hint) is Annotated:
        inner, *metadata = get_args(hint)
        options, remedy = _options(inner)
        bounds = tuple(item for item in metadata if type(item) in _HOLDS)
        own = next((item for item in metadata if isinstance(item, str)), remedy)
        return [o if o.type is NoneType else _Option(o.type, o.bounds + bounds) for o in options], own
    if get_origin(hint) in (Union, UnionType):
        parts = [_options(member) for member in get_args(hint)]
        return [o for options, _ in parts for o in options], next((text for _, text in parts if text), "")
    return [_Option(hint, ())], ""


def _has_type(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and _is_finite(value)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if origin is not None:
        items = [arg for arg in get_args(hint) if arg is not Ellipsis]
        if not isinstance(value, list | tuple if origin in (list, tuple, Sequence) else origin):
            return False
        return issubclass(origin, Mapping) or all(fits(item, items[0]) for item in value) if items else True
    return isinstance(value, hint)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    origin = get_origin(hint)
    if origin in (list, tuple, Sequence):
        items = [arg for arg in get_args(hint) if arg is not Ellipsis]
        return f"a list, each item {_type_name(items[0])}" if items else "a list"
    if isinstance(origin or hint, type) and issubclass(origin or hint, Mapping):
        return "an object"
    return _KINDS.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def _range(bounds: tuple[Any, ...]) -> str:
    low = next((bound for bound in bounds if isinstance(bound, Ge | Gt)), None)
    high = next((bound for bound in bounds if isinstance(bound, Le | Lt)), None)
    if isinstance(low, Ge) and isinstance(high, Le):
        return f"between {low.ge} and {high.le}"
    words = []
    if low is not None:
        plain = f"{low.ge} or more" if isinstance(low, Ge) else f"above {low.gt}"
        words.append(f"at least {low.ge}" if isinstance(low, Ge) and high else plain)
    if high is not None:
        words.append(f"{high.le} or less" if isinstance(high, Le) else f"below {high.lt}")
    return " and ".join(words)


def _message(name: str, rule: str, value: Any, remedy: str) -> str:
    return f"{name} must be {rule}, got {value!r}." + (f" {remedy}" if remedy else "")
