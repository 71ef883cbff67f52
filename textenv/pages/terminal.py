"""Tables on the terminal, and text that must not control it."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {
    127: "\u2421",
    **dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd"),
}


def visible(text: str) -> str:
    """A text that others wrote, its control characters (but tab and line feed) replaced by signs: an escape sequence
    could move the cursor, set the title or paste a command, and a change of writing direction could hide words."""
    return text.translate(_VISIBLE)


def shorten(text: str, width: int = 160) -> str:
    """A text that others wrote, on one line, without its middle if it is long."""
    line = visible(" ".join(text.split()))
    half = width // 2
    return line if len(line) <= width else f"{line[:half]} … {line[-half:]}"


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


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], console: Console | None = None
) -> None:
    """A title, and a table with ``header`` above it."""
    console = console or Console(highlight=False)
    console.print(f"\n{escape(title)}", style="bold")
    table = Table(*map(escape, header), box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
