"""Reading and writing records: JSON lines, and `datasets` sets. Errors name the file, the line and the reason."""

import gzip
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textenv.config import hint


@dataclass(frozen=True, eq=False)
class PromptSet:
    """Prompts in a fixed order, with the columns that reward models may ask for."""

    prompts: tuple[Any, ...]
    """Strings, or chats (lists of ``{"role", "content"}``)."""
    columns: dict[str, tuple[Any, ...]]
    """Other fields of the records, one value a prompt."""


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Records of a ``.jsonl`` or ``.jsonl.gz`` file, or of all such files in a folder (sorted by name). Blank lines are
    skipped.

    Raises:
        ValueError: the path does not exist or holds nothing, or a line is not a JSON object.
    """
    return list(read_jsonl_lines(path).values())


def read_jsonl_lines(path: str | Path) -> dict[str, dict[str, Any]]:
    """What :func:`read_jsonl` returns, under the place of each record, ``"<file>, line <number>"``, for errors."""
    return parse_records(jsonl_lines(path))


def jsonl_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """The lines that :func:`read_jsonl` reads, each with its place, as they are: a malformed one is the caller's to
    refuse or to leave out (:func:`json_object`)."""
    path = Path(path)
    files = sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")]) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(f"data must be a JSONL file or a folder of them, with path (={str(path)!r}). Check the path.")
    empty = True
    for file in files:
        for number, line in numbered_lines(file):
            empty = False
            yield f"{file}, line {number}", line
    if empty:
        raise ValueError(f"data must have at least one record, with path (={str(path)!r}) empty.")


def parse_records(records: Iterable[tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    """Records under their places, lines parsed; a ValueError names the place."""
    parsed: dict[str, dict[str, Any]] = {}
    for where, record in records:
        try:
            parsed[where] = json_object(record) if isinstance(record, str) else record
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return parsed


def numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file (``.gz`` too) that are not blank, with their numbers from 1.

    Only a line feed ends a line: JSON strings may hold Unicode's other line separators as they are.

    Raises:
        ValueError: the file is not UTF-8, or not gzip where its name says so.
    """
    with file.open("rb") as raw, gzip.open(raw) if file.suffix == ".gz" else raw as data:
        try:
            for number, line in enumerate(data, start=1):
                if line.strip():
                    yield number, line.decode("utf-8")
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
            raise ValueError(
                f"data must be UTF-8 text, one JSON object a line, with file (={str(file)!r}): {error}."
            ) from None


def json_object(line: str) -> dict[str, Any]:
    """One line as a record; ValueError with the reason."""
    try:
        record = json.loads(line.rstrip("\r\n"))  # where a line was cut, it ends, not at the start of the next one
        if "\\ud" in line.lower():
            check_text(json.dumps(record, ensure_ascii=False))
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno}).") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply).") from None
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object, not {type(record).__name__}.")
    return record


def check_text(text: str) -> None:
    """Refuse half a surrogate pair, which JSON can write (``\\ud800``) and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        start = max(error.start - 20, 0)
        raise ValueError(
            f"a text must be Unicode without lone surrogates, with {text[error.start]!r} in "
            f"{text[start : error.start + 20]!r}. Write the whole character."
        ) from None


def read_dataset(
    dataset: str,
    *,
    column: str = "prompt",
    split: str | None = None,
    config: str | None = None,
    revision: str | None = None,
) -> list[dict[str, Any]]:
    """Records of a data set, with ``column`` as their ``"prompt"``; its other columns keep their names.

    Args:
        dataset: a JSONL file, a folder (of JSONL or parquet files, or what ``save_to_disk`` wrote), or a hub id.
        column: where the prompts stand.
        split: default the only split, else "train".
        config: which configuration, where a data set has several.
        revision: commit or tag of a hub data set; pins what an experiment read.

    Raises:
        ValueError: no such data set, split or column, or the ``datasets`` package is missing.
    """
    rows = list(read_records(dataset, split=split, config=config, revision=revision).values())
    names = list(dict.fromkeys(key for row in rows for key in row))
    if column not in names:
        raise ValueError(
            f"a data set must have the column that is asked for, with column (={column!r}) of {dataset!r}. "
            f"{hint(column, names)}Columns: {', '.join(names)}."
        )
    return [{**{key: value for key, value in row.items() if key != column}, "prompt": row.get(column)} for row in rows]


def read_records(
    dataset: str | Path, *, split: str | None = None, config: str | None = None, revision: str | None = None
) -> dict[str, dict[str, Any]]:
    """Records of a data set as they are, each under its place (``"<file>, line <number>"``, or ``"<data set>, record
    <number>"``): a JSONL file (``.gz`` too), a folder (of JSONL or parquet files, or what ``save_to_disk`` wrote), or a
    hub id; the other arguments are those of :func:`read_dataset`.

    Raises:
        ValueError: no such data set or split, a line that is no JSON object, or the ``datasets`` package is missing.
    """
    return parse_records(raw_records(dataset, split=split, config=config, revision=revision))


def raw_records(
    dataset: str | Path, *, split: str | None = None, config: str | None = None, revision: str | None = None
) -> Iterator[tuple[str, Any]]:
    """What :func:`read_records` reads, one by one, lines of JSONL as they are (:func:`jsonl_lines`)."""
    path = Path(dataset)
    jsonl = path.is_file() or str(dataset).endswith((".jsonl", ".jsonl.gz"))
    jsonl = jsonl or (path.is_dir() and any([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")]))
    if jsonl and split is None and config is None:
        yield from jsonl_lines(path)
        return
    rows = _load_dataset(str(dataset), split, config, revision)
    yield from ((f"{dataset}, record {number}", dict(row)) for number, row in enumerate(rows, start=1))


def check_dataset(source: Mapping[str, Any]) -> None:
    """Refuse a mapping that does not name a data set: unknown keys, missing ``dataset``, values that are no strings."""
    names = ("dataset", "column", "split", "config", "revision")
    for name, value in source.items():
        if name not in names:
            raise ValueError(
                f"a data set has the keys {', '.join(names)}, with key (={name!r}). {hint(str(name), names)}"
                "Other columns of its records reach the reward model by their own names."
            )
        if not isinstance(value, str) and not (value is None and name not in ("dataset", "column")):
            raise ValueError(f"{name} of a data set must be a string, with {name} (={value!r}).")
    if "dataset" not in source:
        raise ValueError(
            f"a data set must be named, with keys (={sorted(source)}). Give {{'dataset': folder or hub id}}."
        )


def looks_like_path(name: str) -> bool:
    """Whether a string can only mean a file or folder: it starts like one."""
    return name.startswith((".", "/", "~"))


def _load_dataset(dataset: str, split: str | None, config: str | None, revision: str | None) -> Any:
    """A ``datasets.Dataset``, whole."""
    path = Path(dataset)
    if looks_like_path(dataset) and not path.exists():
        raise ValueError(
            f"a data set must be an existing path or a hub id, with dataset (={dataset!r}). Check the path."
        )
    try:
        import datasets  # pyright: ignore[reportMissingImports]  (optional)
        from datasets.exceptions import DatasetsError  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"reading this data set needs the package `datasets`, with dataset (={dataset!r}). "
            "Install it: pip install 'textenv[data]'. JSONL files need nothing."
        ) from error
    from textenv.data.hub import hub_or_cache

    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    with hub_or_cache(dataset) as unreachable:
        try:
            if saved:
                loaded: Any = datasets.load_from_disk(dataset)
            else:
                loaded = datasets.load_dataset(dataset, config, split=split, revision=revision)
        except (OSError, ValueError, DatasetsError) as error:
            raise ValueError(
                "a data set must be a JSONL file, a folder of JSONL or parquet files, what save_to_disk wrote, or a "
                f"hub id, with dataset (={dataset!r}), split (={split!r}), config (={config!r}). Loading it failed: "
                f"{error}{unreachable}"
            ) from error
    if saved and not isinstance(loaded, dict):
        loaded = {str(loaded.split or "train"): loaded}
    if not isinstance(loaded, dict):
        return loaded
    wanted = split or (next(iter(loaded)) if len(loaded) == 1 else "train")
    if wanted not in loaded:
        raise ValueError(
            f"a data set must have the split that is asked for, with split (={wanted!r}) of {dataset!r}. "
            f"Splits: {', '.join(map(str, loaded))}."
        )
    return loaded[wanted]


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` that replaces it when the block ends well and disappears when it does not."""
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
    """Records (strings, chats, or objects with a ``prompt``) as a prompt set; refused when one is empty, or all are."""
    if isinstance(records, PromptSet):
        return records
    prompts: list[Any] = []
    columns: dict[str, list[Any]] = {}
    for number, record in enumerate(records):
        fields = dict(record) if isinstance(record, Mapping) else {"prompt": record}
        prompt = fields.pop("prompt", None)
        if not isinstance(prompt, str | list) or not prompt:
            raise ValueError(
                f"a prompt must be a non-empty string or list of chat messages, with prompt number {number} "
                f"(={record!r}). Give strings, or objects with a 'prompt'."
            )
        prompts.append(prompt)
        for key in fields.keys() | columns.keys():
            columns.setdefault(key, [None] * number).append(fields.get(key))
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, with prompts (=[]). Give a list or a JSONL file.")
    return PromptSet(tuple(prompts), {key: tuple(values) for key, values in columns.items()})
