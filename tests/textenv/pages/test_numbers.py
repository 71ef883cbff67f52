"""Numbers as text."""

import pytest

from textenv.pages.numbers import signed, significant


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.234, "1.23"), (0.1, "0.10"), (0.0341, "0.034"), (-0.0341, "−0.034"), (0.00512, "0.0051"), (0.0, "0.00")],
)
def test_small_numbers_keep_two_digits_that_tell_something(value, text):
    assert significant(value) == text


def test_a_change_has_its_sign():
    assert (signed(0.0123), signed(-0.5)) == ("+1.2", "−50.0")
