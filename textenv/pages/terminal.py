"""Tables on the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_columns(title: str, header: Sequence[str], columns: Sequence[Sequence[str]]) -> None:
    """A title, and a table with ``header`` down its left; columns that do not fit beside the others go below them."""
    console = Console(highlight=False)
    room = console.width - max(map(len, header))
    parts: list[list[Sequence[str]]] = [[]]
    for column in columns:
        if parts[-1] and sum(max(map(len, cells)) + 2 for cells in [*parts[-1], column]) > room:
            parts.append([])
        parts[-1].append(column)
    console.print(f"\n{escape(title)}", style="bold")
    for part in parts:
        rows = [[escape(cell) for cell in cells] for cells in zip(header, *part, strict=True)]
        table = Table(*rows[0], box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A title, and a table with ``header`` above it."""
    console = Console(highlight=False)
    console.print(f"\n{escape(title)}", style="bold")
    table = Table(*map(escape, header), box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
