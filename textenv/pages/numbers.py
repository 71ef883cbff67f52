"""Numbers as text: fixed digits, a true minus sign, and a dash for unknown values."""

import math
from typing import NamedTuple

UNKNOWN = "–"


class Cell(NamedTuple):
    """A cell of a table."""

    value: str = UNKNOWN
    note: str = ""
    """Shown small, after the value."""
    hint: str = ""
    """Shown when the pointer is over the cell."""


def number(value: float | None, digits: int = 2) -> str:
    """``digits`` decimals; ∞ for infinity and a dash for NaN or None."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:z.{digits}f}".replace("-", "−")


def percent(share: float | None, digits: int = 1) -> str:
    """A share in percent, without the % sign."""
    return number(None if share is None else 100 * share, digits)


def signed(share: float) -> str:
    """A share in percent with its sign."""
    return f"{100 * share:+.1f}".replace("-", "−")


def significant(value: float) -> str:
    """Two decimals, or two significant digits of a number too small for them."""
    return number(value) if not 0 < abs(value) < 0.1 else f"{value:.2g}".replace("-", "−")
