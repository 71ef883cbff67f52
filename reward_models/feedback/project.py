"""A project file: prompts with their responses, and what annotators said of them.

SQLite in WAL mode with ``synchronous=FULL``: what was committed outlives a killed process and a power cut. Annotations
are append-only, which triggers hold: a correction is a new row, undo too, and the latest row of an annotator counts.
"""

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from reward_models.feedback import schema

Kind = Literal["ranking", "arena"]


class Response(NamedTuple):
    """A response to rank."""

    text: str
    model: str = ""
    """Where it comes from; never shown to annotators."""
    sampling: Mapping[str, Any] = {}
    """Settings that it was sampled with."""
    finish_reason: str = ""


class Item(NamedTuple):
    """A prompt with its responses."""

    id: int
    prompt: Any
    responses: tuple[Response, ...]
    category: str
    known: tuple[tuple[int, ...], ...] | None
    """The right ranking of a check item."""


class Annotation(NamedTuple):
    """What an annotator said of an item, and stands by."""

    item: int
    annotator: str
    action: Literal["rank", "skip"]
    ranking: tuple[tuple[int, ...], ...]
    """Places of the responses, best first, equals together; empty for a skipped item."""
    flags: Mapping[str, str]
    """Place of a response → "harmful" or "nonsense"."""
    scores: Mapping[str, Mapping[str, int]]
    """Place of a response → helpful, accurate, safe → 1 to 5."""
    comment: str
    shown: tuple[int, ...]
    """Places of the responses in the order in which they were shown."""
    seconds: float
    created: float
    """Seconds since 1970, UTC."""


class Project:
    """A project file, opened. Threads may share it: a lock lets one of them in at a time."""

    def __init__(self, path: str | Path, *, _new: bool = False) -> None:
        """Open an existing project, and bring an older schema up to date.

        Raises:
            ValueError: there is no such file, it is no project, damaged, or of a newer version.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(
                f"a project must be an existing file, got {str(path)!r}. Make one: textenv feedback create."
            )
        self._open()
        if not _new and not self._made():
            raise ValueError(
                f"a project must be made before it is opened, got {str(path)!r}, which is empty. Make it: textenv "
                "feedback create."
            )

    @classmethod
    def create(cls, path: str | Path, kind: Kind, settings: Mapping[str, Any], *, guidelines: str = "") -> "Project":
        """A new project; an existing one of the same kind and settings is opened, to go on with. One that has no items
        yet, since making it failed, is made anew.

        Raises:
            ValueError: the file exists with other settings, or is no project.
        """
        path = Path(path)
        settings = json.loads(json.dumps(settings))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise ValueError(
                f"a project must be a file that can be written, got {str(path)!r} ({error.strerror}). Name another."
            ) from error
        project = cls(path, _new=True)
        if not (project._made() and project.items()):
            values = {"settings": settings, "guidelines": guidelines, "created": time.time(), "kind": kind}
            with project.write() as database:
                rows = [(key, json.dumps(value)) for key, value in values.items()]
                database.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)
        for name, own in {"kind": kind, **settings}.items():
            old = project.kind if name == "kind" else project.settings.get(name)
            if old != own:
                project.close()
                raise ValueError(
                    f"a project must keep the settings that it was made with, got {name} {own!r} for {str(path)!r}, "
                    f"which has {old!r}. Name another file."
                )
        return project

    def _open(self) -> None:
        self._lock = threading.RLock()
        self._database = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
        try:
            self._database.row_factory = sqlite3.Row
            fresh = not self._database.execute("SELECT 1 FROM sqlite_master").fetchone()
            if not fresh and self._pragma("application_id") != schema.APPLICATION_ID:
                raise ValueError(
                    f"a project must be a file of textenv feedback, got another database in {str(self.path)!r}. Name "
                    "another file."
                )
            if (damage := self._pragma("quick_check")) != "ok":
                raise sqlite3.DatabaseError(damage)
            for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                self._database.execute(f"PRAGMA {setting}")
            self._migrate()
        except (sqlite3.DatabaseError, OSError) as error:
            self._database.close()
            raise ValueError(
                f"a project must be a whole SQLite file, got {str(self.path)!r}: {error}. Restore a copy; "
                "`sqlite3 FILE .recover` saves what can be read."
            ) from error
        except ValueError:
            self._database.close()
            raise

    def _pragma(self, name: str) -> Any:
        return self._database.execute(f"PRAGMA {name}").fetchone()[0]

    def _migrate(self) -> None:
        version = self._pragma("user_version")
        if version > len(schema.MIGRATIONS):
            raise ValueError(
                f"a project must have schema version {len(schema.MIGRATIONS)} or less, got {version} in "
                f"{str(self.path)!r}. Update textenv."
            )
        for number in range(version, len(schema.MIGRATIONS)):
            self._database.executescript(
                f"BEGIN; PRAGMA application_id={schema.APPLICATION_ID};{schema.MIGRATIONS[number]};"
                f"PRAGMA user_version={number + 1}; COMMIT;"
            )

    def _made(self) -> bool:
        return bool(self.rows("SELECT 1 FROM meta WHERE key = 'kind'"))

    def close(self) -> None:
        """Close the file; others may open it."""
        with self._lock:
            self._database.close()

    def __enter__(self) -> "Project":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is kept, or nothing.

        Raises:
            OSError: the disk is full, or the file cannot be written.
        """
        with self._lock:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                try:
                    yield self._database
                    self._database.execute("COMMIT")
                except BaseException:
                    if self._database.in_transaction:
                        self._database.execute("ROLLBACK")
                    raise
            except sqlite3.OperationalError as error:
                raise OSError(
                    f"the project file {str(self.path)!r} cannot be written ({error}). Nothing of this step was kept. "
                    "Free some space and try again."
                ) from error

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """The rows of a query."""
        with self._lock:
            return self._database.execute(query, values).fetchall()

    def _meta(self, key: str) -> Any:
        (row,) = self.rows("SELECT value FROM meta WHERE key = ?", key)
        return json.loads(row["value"])

    @property
    def kind(self) -> Kind:
        return self._meta("kind")

    @property
    def settings(self) -> dict[str, Any]:
        """What the project was made with."""
        return self._meta("settings")

    @property
    def guidelines(self) -> str:
        """What annotators should know, in Markdown."""
        return self._meta("guidelines")

    def set_guidelines(self, text: str) -> None:
        with self.write() as database:
            database.execute("UPDATE meta SET value = ? WHERE key = 'guidelines'", (json.dumps(text),))

    def add_items(self, items: Sequence["NewItem"]) -> None:
        """Add items in one transaction; those whose source is there already are left as they are."""
        with self.write() as database:
            models: dict[tuple[str, str], int | None] = {("", "{}"): None}
            for item in items:
                known = None if item.known is None else json.dumps(item.known)
                values = (item.source, json.dumps(item.prompt), item.category, item.needed, known, item.turn)
                added = database.execute(
                    "INSERT OR IGNORE INTO items (source, prompt, category, needed, known, turn) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    values,
                )
                if not added.rowcount:
                    continue
                for place, response in enumerate(item.responses):
                    model = (response.model, json.dumps(dict(response.sampling), sort_keys=True))
                    if model not in models:
                        database.execute("INSERT OR IGNORE INTO models (name, sampling) VALUES (?, ?)", model)
                        query = "SELECT id FROM models WHERE name = ? AND sampling = ?"
                        models[model] = database.execute(query, model).fetchone()["id"]
                    row = (added.lastrowid, place, response.text, models[model], response.finish_reason)
                    database.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?)", row)

    def sources(self) -> set[str]:
        """Where the items there came from."""
        return {row["source"] for row in self.rows("SELECT source FROM items")}

    def count(self) -> int:
        """Items of the project."""
        return self.rows("SELECT COUNT(*) AS count FROM items")[0]["count"]

    def item(self, number: int) -> Item | None:
        return next(iter(self._items("WHERE items.id = ?", number)), None)

    def items(self) -> list[Item]:
        """All items, in the order in which they were added."""
        return self._items("")

    def _items(self, where: str, *values: Any) -> list[Item]:
        found: dict[int, tuple[sqlite3.Row, list[Response]]] = {}
        for row in self.rows(
            "SELECT items.id, prompt, category, known, text, finish_reason, name, sampling FROM items "
            "JOIN responses ON responses.item = items.id LEFT JOIN models ON models.id = responses.model "
            f"{where} ORDER BY items.id, place",
            *values,
        ):
            response = Response(
                row["text"], row["name"] or "", json.loads(row["sampling"] or "{}"), row["finish_reason"]
            )
            found.setdefault(row["id"], (row, []))[1].append(response)
        return [
            Item(number, json.loads(row["prompt"]), tuple(responses), row["category"], _ranking(row["known"]))
            for number, (row, responses) in found.items()
        ]

    def annotations(self) -> list[Annotation]:
        """What annotators stand by, in the order in which it came."""
        return self._annotations(
            "JOIN standing ON standing.annotation = annotations.id ORDER BY annotations.id",
        )

    def standing(self, item: int, annotator: int) -> Annotation | None:
        """What an annotator stands by about an item."""
        where = "JOIN standing ON annotation = annotations.id WHERE standing.item = ? AND standing.annotator = ?"
        return next(iter(self._annotations(where, item, annotator)), None)

    def _annotations(self, where: str, *values: Any) -> list[Annotation]:
        query = "SELECT annotations.*, name FROM annotations JOIN annotators ON annotators.id = annotations.annotator "
        return [
            Annotation(
                row["item"],
                row["name"],
                row["action"],
                _ranking(row["ranking"]) or (),
                json.loads(row["flags"]),
                json.loads(row["scores"]),
                row["comment"],
                tuple(json.loads(row["shown"])),
                row["seconds"],
                row["created"],
            )
            for row in self.rows(query + where, *values)
        ]

    def history(self) -> list[dict[str, Any]]:
        """Every annotation ever made, corrections and undone ones too; ``stands`` says which count."""
        query = (
            "SELECT annotations.id, annotations.item, name AS annotator, action, ranking, flags, scores, comment, "
            "shown, seconds, annotations.created, standing.annotation IS NOT NULL AS stands FROM annotations "
            "JOIN annotators ON annotators.id = annotations.annotator "
            "LEFT JOIN standing ON standing.annotation = annotations.id ORDER BY annotations.id"
        )
        return [
            dict(row)
            | {name: json.loads(row[name] or "null") for name in ("ranking", "flags", "scores", "shown")}
            | {"stands": bool(row["stands"])}
            for row in self.rows(query)
        ]


class NewItem(NamedTuple):
    """An item to add."""

    source: str
    prompt: Any
    responses: Sequence[Response]
    category: str = ""
    needed: int = 1
    """Annotators that should rank it."""
    known: Sequence[Sequence[int]] | None = None
    turn: int = 0
    """Shifts the order in which its responses are shown."""


def _ranking(text: str | None) -> tuple[tuple[int, ...], ...] | None:
    return None if text is None else tuple(map(tuple, json.loads(text)))
