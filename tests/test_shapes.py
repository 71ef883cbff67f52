"""The tests check the shapes of tensors in calls into the packages."""

import pytest
import torch
from jaxtyping import TypeCheckError

from textenv.lm.batch import length_mask
from textenv.lm.heads import ScalarHead


def test_a_wrong_shape_is_refused():
    with pytest.raises(TypeCheckError, match="lengths"):
        length_mask(torch.ones(2, 2, dtype=torch.int64), 3)


def test_a_wrong_dtype_is_refused():
    with pytest.raises(TypeCheckError, match="lengths"):
        length_mask(torch.ones(2), 3)


def test_a_method_is_checked_too():
    with pytest.raises(TypeCheckError, match="hidden"):
        ScalarHead(4)(torch.zeros(4, dtype=torch.int64))


def test_later_calls_are_checked_more_and_more_seldom():
    refused = 0
    for _ in range(64):
        try:
            length_mask(torch.ones(2), 3)
        except TypeCheckError:
            refused += 1
        except Exception:
            pass  # what a function says of a wrong argument that nobody checks
    assert refused == 8 + len([16, 32, 64])
