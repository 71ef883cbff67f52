"""The exact world that several files measure."""

import gymnasium
import pytest

from textenv.tasks.exact import exact_world


@pytest.fixture(scope="module")
def world():
    return exact_world(gymnasium.make("textenv/Micro-v0"))
