"""What the doctor says: checks, their findings, and which of them ran."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

Level = Literal["error", "warning", "note"]
"""error: training or its figures would be wrong; warning: probably harmful; note: harmless here, or a figure."""


class Seen(NamedTuple):
    """What a check has seen; the table of checks says why it matters and what to do."""

    level: Level
    what: str


class Check(NamedTuple):
    """One row of the table. The first line of its function says what a healthy set-up is like."""

    run: Callable[[Any], Iterator[Seen]]
    """Takes a part of the set-up; raises :class:`textenv.conformance.subject.Skipped` where it cannot run."""
    why: str
    """With a public precedent."""
    remedy: str

    @property
    def rule(self) -> str:
        """What holds of a healthy set-up."""
        return str(self.run.__doc__).splitlines()[0]


class Finding(NamedTuple):
    """A problem, or a fact worth knowing."""

    check: str
    level: Level
    what: str
    """With the values found."""
    why: str
    """Why it matters, with its public precedent."""
    remedy: str


class Diagnosis(NamedTuple):
    """The outcome of an examination."""

    findings: list[Finding]
    """The worst first."""
    ran: tuple[str, ...]
    """Names of the checks that ran to their end."""
    skipped: Mapping[str, str]
    """Check → why it could not run, though its part is there."""
    absent: tuple[str, ...]
    """Parts that were not given, and so were not examined."""

    @property
    def healthy(self) -> bool:
        """No error; warnings and notes are allowed."""
        return not self.count("error")

    def count(self, level: str) -> int:
        return sum(finding.level == level for finding in self.findings)
