"""``textenv check``."""

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import textenv
from textenv.cli.common import Option, options_of
from textenv.conformance import check as run_checks


def check(
    env_id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ID")],
    *,
    option: Option = (),
    experiment: Path | None = None,
) -> int:
    """Does an environment keep the contract? Exit code 1 when it does not.

    Args:
        env_id: a registered id, or module:id to import the module first.
        option: what gymnasium.make takes, the value as JSON or plain text.
        experiment: register this experiment file first.
    """
    if experiment is not None:
        textenv.load_experiment(experiment).register()
    report = run_checks(env_id, **options_of(option))
    table = Table("", "check", "", "seconds", box=None, pad_edge=False)
    for name, passed, detail, seconds in report.checks:
        mark = "[green]passed[/]" if passed else "[red]FAILED[/]"
        table.add_row(mark, name, escape(detail), f"{seconds:.2f}")
    Console().print(table)
    failed = len(report.failures)
    print(f"\n{env_id}: {f'{failed} of {len(report.checks)} checks failed' if failed else 'all checks passed'}")
    return 1 if failed else 0
