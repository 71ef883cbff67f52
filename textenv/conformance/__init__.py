"""Does an environment id keep the contract? ``textenv check ID``, or ``textenv.conformance.check(ID, **options)``.

The checks cover what agents rely on (docs/environment.md), on any id, of this package or not. An environment must have
``reference``, ``kl_coef``, ``report_logprobs``, ``attach_policy`` and ``action_masks``, and its vector form ``play``;
an id without a vector entry point is checked without one.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from gymnasium.vector import AutoresetMode

from textenv.conformance import checks, episode_checks, vector_checks
from textenv.conformance.subject import Skipped, Subject

CHECKS: dict[str, Callable[[Subject], str]] = {
    "global generators": checks.global_generators,
    "make": checks.make,
    "gymnasium checker": checks.gymnasium_checker,
    "stable-baselines3 checker": checks.stable_baselines3_checker,
    "spec as JSON": checks.spec_json,
    "shared models": checks.shared_models,
    "pickling": checks.pickling,
    "fresh arrays": checks.fresh_arrays,
    "endings": episode_checks.endings,
    "rewards": episode_checks.rewards,
    "KL": episode_checks.kl,
    "observations": episode_checks.observations,
    **{
        f"vector {mode.value}": functools.partial(vector_checks.vector, mode=mode)
        for mode in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED)
    },
    "play": vector_checks.play,
}
"""Name → a function that returns what it compared, and raises at the first violation. They run in this order, so that
the first one also covers the loading of models."""


class Check(NamedTuple):
    """One property of an environment."""

    name: str
    passed: bool
    detail: str
    """What was compared; for a failure, the first difference; for a check that could not run, "skipped: " and why."""
    seconds: float


class ConformanceReport(NamedTuple):
    """All checks of one id."""

    env_id: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> dict[str, str]:
        """Name → detail of each failed check."""
        return {check.name: check.detail for check in self.checks if not check.passed}


def check(env_id: str, **options: Any) -> ConformanceReport:
    """Run every check on an id; ``options`` are those of ``gymnasium.make``. No other check runs if "make" fails.

    Raises:
        ValueError: the id does not exist.
    """
    subject = Subject(env_id, options)
    found: list[Check] = []
    for name, function in CHECKS.items():
        start = time.perf_counter()
        try:
            passed, detail = True, function(subject)
        except Skipped as reason:
            passed, detail = True, f"skipped: {reason}"
        except Exception as error:  # whatever a broken environment raises is a finding
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            passed, detail = False, kind + str(error)
        found.append(Check(name, passed, detail, time.perf_counter() - start))
        if name == "make" and not passed:
            break
    return ConformanceReport(env_id, tuple(found))
