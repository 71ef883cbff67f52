"""What several tests of the benchmark measure."""

import pytest

from reward_models.benchmark import load_suite
from tests.reward_models.benchmark.models import CONFIG


@pytest.fixture(scope="session")
def suite():
    return load_suite("embedded", CONFIG)
