"""Values by key in an SQLite file that threads, forks and processes may share."""

import contextlib
import reprlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

_CHUNK = 500
"""Keys in one query; SQLite allows 999 by default in its older versions."""


@final
class Store:
    """A table of numbers or bytes by key. Each access is a short transaction on a connection of its own."""

    def __init__(self, path: str | Path, table: str, *, what: str) -> None:
        """``what`` is what errors call the file.

        Raises:
            ValueError: the file is no SQLite database, or cannot be made.
        """
        self._path, self._table, self._what = Path(path), table, what
        with self._database() as database:
            database.execute(f"CREATE TABLE IF NOT EXISTS {table} (key BLOB PRIMARY KEY, value) WITHOUT ROWID")

    def __len__(self) -> int:
        with self._database() as database:
            return database.execute(f"SELECT COUNT(*) FROM {self._table}").fetchone()[0]

    def read(self, keys: Sequence[bytes], is_right: Callable[[Any], bool]) -> dict[bytes, Any]:
        """The values of those keys that have one.

        Raises:
            ValueError: one of them is not right: the file is damaged.
        """
        found: dict[bytes, Any] = {}
        unique = list(dict.fromkeys(keys))
        with self._database() as database:
            for start in range(0, len(unique), _CHUNK):
                part = unique[start : start + _CHUNK]
                marks = ",".join("?" * len(part))
                found |= dict(database.execute(f"SELECT key, value FROM {self._table} WHERE key IN ({marks})", part))
        for wrong in (value for value in found.values() if not is_right(value)):
            raise ValueError(
                f"a {self._what} must hold what was written to it, got {reprlib.repr(wrong)} in {str(self._path)!r}. "
                "The file is damaged: remove it."
            )
        return found

    def write(self, values: Mapping[bytes, float | bytes]) -> None:
        """Add values; a key that has one keeps it."""
        with self._database() as database:
            database.executemany(f"INSERT OR IGNORE INTO {self._table} VALUES (?, ?)", values.items())

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction: it waits for other writers, commits at the end and closes."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self._path, timeout=60)) as database, database:
                yield database
        except (sqlite3.DatabaseError, OSError) as error:
            rule = f"a {self._what} must be an SQLite file that can be read and written"
            raise ValueError(f"{rule}, got {str(self._path)!r}: {error}. Remove it or name another.") from error
