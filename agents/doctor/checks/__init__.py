"""Every check by name, and the part of a set-up that it is about."""

from agents.doctor.checks.cost import COST_CHECKS
from agents.doctor.checks.demonstrations import DEMONSTRATION_CHECKS
from agents.doctor.checks.environment import ENVIRONMENT_CHECKS
from agents.doctor.checks.model import MODEL_CHECKS
from agents.doctor.checks.preferences import PREFERENCE_CHECKS
from agents.doctor.checks.reward import REWARD_CHECKS
from agents.doctor.checks.tokens import TOKEN_CHECKS
from agents.doctor.finding import Check

CHECKS: dict[str, dict[str, Check]] = {
    "model": {**MODEL_CHECKS, **TOKEN_CHECKS},
    "demonstrations": DEMONSTRATION_CHECKS,
    "preferences": PREFERENCE_CHECKS,
    "reward model": REWARD_CHECKS,
    "environment": {**ENVIRONMENT_CHECKS, **COST_CHECKS},
}
"""Part → name → check, in the order in which they run."""


def checks_table(part: str) -> str:
    """The checks of a part as a Markdown table."""
    rows = [f"| {name} | {check.rule} | {check.why} | {check.remedy} |" for name, check in CHECKS[part].items()]
    return (
        "\n".join(["| check | healthy | why | remedy |", "|---|---|---|---|", *rows])
        .replace("<|", "<\\|")
        .replace("|>", "\\|>")
    )
