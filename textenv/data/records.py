"""Records as JSON lines, and prompt sets made from them. Errors name the file, the line and the reason."""

import csv
import gzip
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Placed(list[T]):
    """Records that know where each stands, for errors that are found later."""

    def __init__(self, records: Iterable[T], places: Iterable[str]) -> None:
        super().__init__(records)
        self.places = tuple(places)
        """``"<file>, line <number>"``, or ``"record <number>"`` of what was given in memory."""


def place_of(records: Sequence[Any], number: int) -> str:
    """Where the record ``number`` (from 0) stands."""
    return records.places[number] if isinstance(records, Placed) else f"record {number + 1}"


@dataclass(frozen=True, eq=False)
class PromptSet:
    """Prompts in a fixed order, with the columns that reward models may use."""

    prompts: tuple[Any, ...]
    """Strings, or chats (lists of ``{"role", "content"}``)."""
    columns: dict[str, tuple[Any, ...]]
    """Other fields of the records, one value per prompt."""
    places: tuple[str, ...] = ()
    """Where each prompt stands, for errors that are found later; empty if nobody knows."""

    def place(self, number: int) -> str:
        """Where the prompt ``number`` (from 0) stands."""
        return self.places[number] if self.places else place_of(self.prompts, number)


def jsonl_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """Unparsed lines of a ``.jsonl`` or ``.jsonl.gz`` file, each with its place, ``"<file>, line <number>"``: the
    caller decides whether to refuse or skip a malformed one.

    Raises:
        ValueError: the path does not exist or holds nothing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data must be a JSONL file or a folder of them, got {str(path)!r}. Check the path.")
    empty = True
    for number, line in numbered_lines(path):
        empty = False
        yield f"{path}, line {number}", line
    if empty:
        raise _no_records(path)


def _no_records(file: Path) -> ValueError:
    return ValueError(f"data must have at least one record, got {str(file)!r}, which is empty. Name another file.")


def json_array(file: Path) -> Iterator[tuple[str, Any]]:
    """The objects of a file that holds one JSON array, each with its place."""
    try:
        items = json.loads(file.read_text("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"a .json file must hold a JSON array of objects, got {str(file)!r}: {error}.") from None
    if not items:
        raise _no_records(file)
    for number, item in enumerate(items, start=1):
        yield f"{file}, record {number}", item if isinstance(item, dict) else json.dumps(item)  # refused as a line is


def csv_rows(file: Path) -> Iterator[tuple[str, dict[str, str | None]]]:
    """The rows of a CSV file with a header, each with its place. All values stay text, empty ones are None."""
    csv.field_size_limit(2**31 - 1)  # a response may be long
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader, empty = csv.DictReader(lines), True
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"a row must have {len(reader.fieldnames or ())} values, got another number in {str(file)!r}, "
                        f"line {reader.line_num}. Put texts with commas into quotes."
                    )
                empty = False
                yield f"{file}, line {reader.line_num}", {key: value or None for key, value in row.items()}
            if empty:
                raise _no_records(file)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"data must be CSV in UTF-8, got {str(file)!r}: {error}. Save it anew.") from None


def parse_records(records: Iterable[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    """Records keyed by place, with lines parsed; a ValueError names the place."""
    parsed: dict[str, dict[str, Any]] = {}
    for where, record in records:
        try:
            parsed[where] = json_object(record) if isinstance(record, str) else record
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return parsed


def numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file (``.gz`` too) that are not blank, with their numbers from 1.

    Only a line feed ends a line: JSON strings may contain Unicode's other line separators. A byte order mark is left
    out.

    Raises:
        ValueError: the file is not UTF-8, or not gzip where its name says so.
    """
    with file.open("rb") as raw, gzip.open(raw) if file.suffix == ".gz" else raw as data:
        try:
            for number, line in enumerate(data, start=1):
                if line.strip():
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            rule = "data must be UTF-8 text, one JSON object per line"
            raise ValueError(f"{rule}, got {str(file)!r}: {error}. Save it as UTF-8.") from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            rule = f"a .gz file must be whole and compressed by gzip, got {str(file)!r}: {error}"
            raise ValueError(f"{rule}. Fetch it anew, or, if it is plain text, drop .gz from its name.") from None


def json_object(line: str) -> dict[str, Any]:
    """Parse one line as a record, or raise a ValueError with the reason."""
    try:
        record = json.loads(line.rstrip("\r\n"))  # else a cut line's error points to the next line
        if "\\ud" in line.lower():
            check_text(json.dumps(record, ensure_ascii=False))
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno}). Correct the line.") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply). Correct the line.") from None
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object, got {type(record).__name__}. Correct the line.")
    return record


def plain_values(value: Any) -> Any:
    """NumPy arrays and tuples inside a record as lists, as pandas and Parquet hand them out."""
    if isinstance(value, Mapping):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple) or (hasattr(value, "tolist") and not isinstance(value, str)):
        listed = value.tolist() if hasattr(value, "tolist") else value  # type: ignore[union-attr]
        return [plain_values(item) for item in listed] if isinstance(listed, list | tuple) else listed
    return value


def structure(value: Any) -> Any:
    """A list or object that stands in a table as JSON text; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        return value


def flag(name: str, value: Any) -> bool:
    """True or false, which a table may hold as text; None is false."""
    found = {"true": True, "false": False, "none": False}.get(str(value).lower())
    if found is None:
        raise ValueError(f"{name!r} must be true or false, got {value!r}. Correct it.")
    return found


def messages_of(value: Any) -> Any:
    """A chat that stands in a table as JSON text; any other value, text in brackets too, as it is."""
    chat = structure(value)
    if not isinstance(chat, list) or not chat:
        return value
    return chat if all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in chat) else value


def check_text(text: str) -> None:
    """Refuse half a surrogate pair, which JSON can express (``\\ud800``) but no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        start = max(error.start - 20, 0)
        raise ValueError(
            f"a text must be Unicode without lone surrogates, got {text[error.start]!r} in "
            f"{text[start : error.start + 20]!r}. Write the whole character."
        ) from None


def looks_like_path(name: str) -> bool:
    """Whether a string starts like a path, so that it can only mean a file or folder."""
    return name.startswith((".", "/", "~"))


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, completely or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON, completely or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file that replaces ``path`` if the block succeeds, and disappears if it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def as_prompt_set(records: Any) -> PromptSet:
    """Strings, chats, or objects with a ``prompt`` as a prompt set. Neither the set nor a prompt may be empty."""
    if isinstance(records, PromptSet):
        return records
    prompts: list[Any] = []
    columns: dict[str, list[Any]] = {}
    places: list[str] = []
    for number, record in enumerate(records):
        places.append(place_of(records, number))
        fields = dict(record) if isinstance(record, Mapping) else {"prompt": record}
        prompt = fields.pop("prompt", None)
        if not isinstance(prompt, str | list) or not prompt:
            raise ValueError(
                f"{places[-1]}: a prompt must be a non-empty string or list of chat messages, got {record!r}. "
                "Give strings, or objects with a 'prompt'."
            )
        prompts.append(prompt)
        for key in fields.keys() | columns.keys():
            columns.setdefault(key, [None] * number).append(fields.get(key))
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got []. Give a list or a JSONL file.")
    return PromptSet(tuple(prompts), {key: tuple(values) for key, values in columns.items()}, tuple(places))
