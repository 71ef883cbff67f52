"""Running the checks: each one that can, on every part that there is."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agents.doctor.checks import CHECKS
from agents.doctor.finding import Check, Diagnosis, Finding, Seen
from agents.doctor.setup import gather
from textenv.conformance.subject import Skipped
from textenv.lm import LanguageModel
from textenv.protocols import RewardModel
from textenv.training.isolation import untouched_globals

LEVELS = ("error", "warning", "note")
CRASHED = (
    "A check that breaks off has met something that no set-up should hold; what it would have found is unknown.",
    "Follow the message; if it makes no sense, report it with the set-up.",
)

OnProgress = Callable[[int, int], None]


def diagnose(
    *,
    model: LanguageModel | str | None = None,
    reward_model: RewardModel | str | Mapping[str, Any] | None = None,
    data: Sequence[str | Path] = (),
    held_out: str | Path | None = None,
    env_id: str | None = None,
    options: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> Diagnosis:
    """See :func:`agents.doctor.diagnose`. Global random states stay as they are."""
    with untouched_globals():
        parts, findings = gather(model, reward_model, data, held_out, env_id, options or {})
        return _diagnosis(parts, findings, on_progress)


def _diagnosis(parts: dict[str, list[Any]], findings: list[Finding], on_progress: OnProgress | None) -> Diagnosis:
    ran: list[str] = []
    skipped: dict[str, str] = {}
    rows = [(part, name, check) for part, checks in CHECKS.items() for name, check in checks.items()]
    for done, (part, name, check) in enumerate(rows):
        if on_progress is not None:
            on_progress(done, len(rows))
        title = f"{part}: {name}"
        for subject in parts[part]:
            try:
                findings += _run(title, check, subject, several=len(parts[part]) > 1)
                ran.append(title)
            except Skipped as reason:
                skipped[title] = str(reason)
    if on_progress is not None:
        on_progress(len(rows), len(rows))
    findings.sort(key=lambda finding: LEVELS.index(finding.level))
    once = tuple(dict.fromkeys(ran))
    not_run = {name: why for name, why in skipped.items() if name not in once}
    return Diagnosis(findings, once, not_run, tuple(part for part in CHECKS if not parts[part]))


def _run(title: str, check: Check, subject: Any, *, several: bool) -> list[Finding]:
    """The findings of one check on one part; what it raises is one of them."""
    where = f"{subject.name}: " if several else ""
    reasons = check.why, check.remedy
    try:
        seen = list(check.run(subject))
    except Skipped:
        raise
    except Exception as error:  # whatever a broken set-up raises
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        seen, reasons = [Seen("error", f"the check broke off: {kind}{error}")], CRASHED
    return [Finding(title, level, where + what, *reasons) for level, what in seen]
