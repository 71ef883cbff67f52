"""``textenv doctor``."""

import json

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from agents.doctor import Diagnosis, diagnose
from textenv.cli.common import Json, Option, options_of
from textenv.training.progress import progress_bar

STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def doctor(
    *,
    model: str | None = None,
    reward_model: str | None = None,
    data: tuple[str, ...] = (),
    held_out: str | None = None,
    env_id: str | None = None,
    option: Option = (),
    as_json: Json = False,
) -> int:
    """Find the silent bugs of a set-up. Exit code 1 when there is an error, 0 when there are warnings or notes alone.

    Args:
        model: language model: a registered name, a folder, a hub id or a .gguf file.
        reward_model: a registered name, module:callable, the folder or hub id of a sequence classifier, or a JSON
            object.
        data: demonstrations or preferences: files, folders or hub ids.
        held_out: a file of records whose prompts must not be trained on.
        env_id: a registered id, in which model and reward model replace its own. Without it, model, reward model and
            data make an environment.
        option: of the environment, what gymnasium.make takes, the value as JSON or plain text.
    """
    parts = {"model": model, "reward_model": reward_model, "data": data, "held_out": held_out, "env_id": env_id}
    with progress_bar("examination") as advance:
        diagnosis = diagnose(**parts, options=options_of(option), on_progress=advance)
    if as_json:
        print(json.dumps([finding._asdict() for finding in diagnosis.findings], indent=2, ensure_ascii=False))
    else:
        show_diagnosis(diagnosis, Console(highlight=False))
    return 0 if diagnosis.healthy else 1


def show_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """The findings, the worst first, then which checks ran."""
    for check, level, what, why, remedy in diagnosis.findings:
        console.print(f"[{STYLES[level]}]{level}[/]  [bold]{escape(check)}[/]")
        for text, style in ((what, ""), (why, "dim"), (f"→ {remedy}", "")):
            console.print(Padding(escape(text), (0, 0, 0, 2)), style=style)
        console.print()
    skipped = "; ".join(f"{name} ({reason})" for name, reason in diagnosis.skipped.items())
    for title, listed in (("skipped", skipped), ("not given", ", ".join(diagnosis.absent))):
        if listed:
            console.print(escape(f"{title}: {listed}"), style="dim")
    counts = ", ".join(_count(diagnosis.count(level), level) for level in STYLES)
    console.print(f"{len(diagnosis.ran)} checks ran: {counts}")


def _count(number: int, level: str) -> str:
    return f"{number} {level}{'s' * (number != 1)}"
