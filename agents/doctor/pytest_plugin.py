"""A pytest fixture that fails a test with what the doctor finds.

A ``conftest.py`` asks for it: ``pytest_plugins = ["agents.doctor.pytest_plugin"]``, or a command: ``pytest -p
agents.doctor.pytest_plugin``. It is no entry point, since that would load it in every test run of every project.
"""

from collections.abc import Callable

import pytest

from agents.doctor import assert_healthy


@pytest.fixture
def healthy() -> Callable[..., None]:
    """Function with the arguments of :func:`agents.doctor.diagnose`; the test fails with its errors and warnings
    alone, without a traceback."""

    def check(**parts: object) -> None:
        __tracebackhide__ = True
        try:
            assert_healthy(**parts)
        except AssertionError as error:
            pytest.fail(str(error).strip(), pytrace=False)

    return check
