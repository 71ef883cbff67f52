"""Data sets: JSON lines and arrays, CSV, folders, and what the `datasets` package reads. Errors say which and why."""

import codecs
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from textenv.config import hint
from textenv.data.records import Placed, csv_rows, json_array, jsonl_lines, looks_like_path, parse_records
from textenv.data.splits import data_files, train_part


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
        dataset: a file (JSONL, a JSON array, CSV, Parquet), a folder (of such files, of one kind, or what
            ``save_to_disk`` wrote), or a hub id.
        column: where the prompts stand.
        split: default the only split, else "train". The names of the files of a folder say which split they are.
        config: which configuration, where a data set has several.
        revision: commit or tag of a hub data set; pins what an experiment read.

    Raises:
        ValueError: no such data set, split or column, a folder of several kinds of files, or the ``datasets`` package
            is missing.
    """
    records = read_records(dataset, split=split, config=config, revision=revision)
    names = list(dict.fromkeys(key for row in records.values() for key in row))
    if column not in names:
        rule = f"a column must be one of {', '.join(names)} in data set {dataset!r}"
        raise ValueError(f"{rule}, got {column!r}. {hint(column, names)}Name another column.")
    others = ({key: value for key, value in row.items() if key != column} for row in records.values())
    prompts = (row.get(column) for row in records.values())
    return Placed(({**row, "prompt": prompt} for row, prompt in zip(others, prompts, strict=True)), records)


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
    if config is None and (files := _own_files(path, str(dataset), split)):
        for file in files:
            yield from _READERS.get(file.suffix, jsonl_lines)(file)
        return
    rows = _load_dataset(str(dataset), split, config, revision)
    yield from ((f"{dataset}, record {number}", dict(row)) for number, row in enumerate(rows, start=1))


def _json_file(file: Path) -> Iterator[tuple[str, Any]]:
    """A .json file: an array, or JSON lines."""
    with file.open("rb") as data:
        array = data.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    return json_array(file) if array else jsonl_lines(file)


_READERS = {".json": _json_file, ".csv": csv_rows}
_LINES = (".jsonl", ".jsonl.gz")


def _own_files(path: Path, name: str, split: str | None) -> list[Path]:
    """The files that are read here: JSONL and CSV of a folder without others in it, and single files but Parquet, where
    no split is named."""
    if path.is_dir():
        files = [] if _is_saved(path) else data_files(path)
        own = all(file.parent == path and file.name.endswith((*_LINES, ".csv")) for file in files)
        return train_part(files, path) if own and split is None else []
    own = name.endswith(_LINES) or (path.is_file() and path.suffix != ".parquet")
    return [path] if own and split is None else []


def _is_saved(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def check_dataset(source: Mapping[str, Any]) -> None:
    """Refuse a mapping that does not name a data set: unknown keys, missing ``dataset``, values that are no strings."""
    names = ("dataset", "column", "split", "config", "revision")
    for name, value in source.items():
        if name not in names:
            raise ValueError(
                f"a data set must have keys among {', '.join(names)}, got {name!r}. {hint(str(name), names)}"
                "Other columns of its records reach the reward model by their own names."
            )
        if not isinstance(value, str) and not (value is None and name not in ("dataset", "column")):
            raise ValueError(f"{name} of a data set must be a string, got {value!r}. Quote it.")
    if "dataset" not in source:
        raise ValueError(f"a data set must be named, got keys {sorted(source)}. Give {{'dataset': folder or hub id}}.")


def _load_dataset(dataset: str, split: str | None, config: str | None, revision: str | None) -> Any:
    """A ``datasets.Dataset``, whole."""
    path = Path(dataset)
    if looks_like_path(dataset) and not path.exists():
        raise ValueError(f"a data set must be an existing path or a hub id, got {dataset!r}. Check the path.")
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ValueError(
            f"data set {dataset!r} needs the package `datasets`. Install it: pip install 'textenv[data]'. JSONL files "
            "need nothing."
        ) from error
    from textenv.data.hub import hub_or_cache  # huggingface_hub takes a while to import

    saved = _is_saved(path)
    with hub_or_cache(dataset) as unreachable:
        try:
            if path.is_file():
                builder = {".csv": "csv", ".parquet": "parquet"}.get(path.suffix, "json")
                loaded: Any = datasets.load_dataset(builder, data_files=dataset, split=split)
            elif saved:
                loaded = datasets.load_from_disk(dataset)
            else:
                loaded = datasets.load_dataset(dataset, config, split=split, revision=revision)
        except (OSError, ValueError, DatasetsError) as error:
            raise ValueError(
                "a data set must be a JSONL, JSON, CSV or Parquet file, a folder of them, what save_to_disk wrote, or "
                f"a hub id, got {dataset!r} (split {split!r}, config {config!r}). Loading it failed: "
                f"{error}{unreachable}"
            ) from error
    if saved and not isinstance(loaded, dict):
        loaded = {str(loaded.split or "train"): loaded}
    if not isinstance(loaded, dict):
        return loaded
    wanted = split or (next(iter(loaded)) if len(loaded) == 1 else "train")
    if wanted not in loaded:
        rule = f"a split must be one of {', '.join(map(str, loaded))} in data set {dataset!r}"
        raise ValueError(f"{rule}, got {wanted!r}. Name another split.")
    return loaded[wanted]
