"""Which files of a folder are data, and of which split: the names by which the `datasets` package knows them."""

import re
from collections.abc import Sequence
from pathlib import Path

_KINDS = ("jsonl", "ndjson", "json", "csv", "tsv", "parquet", "arrow")
_NOT_DATA = ("config.json", "dataset_info.json", "dataset_infos.json")
_SPLITS = {"train": "train|training", "validation": "validation|valid|dev|val", "test": "test|testing|eval|evaluation"}


def data_files(folder: Path) -> list[Path]:
    """The data files of a folder and of those in it, by name; none where its README.md says which are data.

    Raises:
        ValueError: they are of several kinds, of which `datasets` would read one alone.
    """
    readme = folder / "README.md"
    if readme.is_file() and re.search(r"^\s*-?\s*data_files:", readme.read_text("utf-8", "replace"), re.MULTILINE):
        return []
    files = sorted(file for file in folder.rglob("*") if _is_data(file.relative_to(folder)) and file.is_file())
    of_kinds = {_kind(file): str(file.relative_to(folder)) for file in reversed(files)}
    if len(of_kinds) > 1:
        found = " beside ".join(map(repr, sorted(of_kinds.values())))
        rule = f"a folder must hold data files of one kind, got {found} in {str(folder)!r}"
        raise ValueError(f"{rule}. Name one of the files, or keep one kind in the folder.")
    return files


def train_part(files: Sequence[Path], folder: Path) -> list[Path]:
    """The files whose names say "train", or those of the only split; all where no name says a split.

    Raises:
        ValueError: there are several splits without "train", or a name says none beside one that does.
    """
    of_splits = {split: [file for file in files if _names(file, split)] for split in _SPLITS}
    of_splits = {split: named for split, named in of_splits.items() if named}
    if not of_splits:
        return list(files)
    named = [file for part in of_splits.values() for file in part]
    if unnamed := [file.name for file in files if file not in named]:
        raise ValueError(
            f"all files of a folder must have the name of a split, or none, got {unnamed[0]!r} beside "
            f"{named[0].name!r} in {str(folder)!r}. Name one of the files, or rename them."
        )
    wanted = next(iter(of_splits)) if len(of_splits) == 1 else "train"
    if wanted not in of_splits:
        rule = f"a split must be one of {', '.join(of_splits)} in data set {str(folder)!r}"
        raise ValueError(f"{rule}, got {wanted!r}. Name another split.")
    return of_splits[wanted]


def _kind(file: Path) -> str:
    return file.name.removesuffix(".gz").rpartition(".")[2]


def _is_data(inside: Path) -> bool:
    """Whether `datasets` takes a file for data, by its path in the folder."""
    hidden = any(part.startswith((".", "__")) for part in inside.parts)
    return _kind(inside) in _KINDS and inside.name not in _NOT_DATA and not hidden


def _names(file: Path, split: str) -> bool:
    """A word for the split stands in the name, between its ends or what is no letter."""
    return re.search(rf"(?:^|[-._ 0-9])(?:{_SPLITS[split]})[-._ 0-9]", file.name) is not None
