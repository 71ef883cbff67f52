"""Writing a result folder so that nobody's files are lost: not the user's, and not the result that stood there before.

A folder written here carries a marker, a list of its files. Only a folder with a marker and nothing else in it is ever
replaced. The old one is put aside, the new one put in place, and the old one removed, in this order: a process killed
between any two steps leaves a whole folder, which :func:`recover` puts back.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARKER = ".textenv-folder.json"
"""Written last. A list of the files of the folder."""


def check_replaceable(path: str | Path) -> None:
    """Refuse a place that :func:`replace_folder` could not write to without harm; call it before long work.

    Raises:
        ValueError: it holds something that is not ours, or cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"an output folder must not be a file, got {str(path)!r}. Name another folder.")
    if path.is_dir():
        foreign = sorted(set(os.listdir(path)) - {name.split("/")[0] for name in [MARKER, *_files(path)]})
        foreign += sorted(_walk(path) - {MARKER, *_files(path)})
        if foreign:
            raise ValueError(
                f"an output folder must be new, empty, or hold only an earlier result of ours, got {str(path)!r} "
                f"with {foreign[0]!r} in it. Nothing was removed. Name another folder."
            )
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise ValueError(f"an output folder must be writable, got {str(path)!r} in {str(parent)!r}. Name another one.")


@contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """A new folder that takes the place of ``path`` when the block ends well, and disappears when it does not.

    Raises:
        ValueError: see :func:`check_replaceable`.
    """
    path = Path(path)
    recover(path)
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.new-"))
    try:
        yield new
        (new / MARKER).write_text(json.dumps(sorted(_walk(new))), "utf-8")
        aside = _aside(path)
        if path.exists():
            path.rename(aside)
        new.rename(path)
        _remove(aside)
    finally:
        if new.exists():
            (new / MARKER).write_text(json.dumps(sorted(_walk(new) - {MARKER})), "utf-8")
            _remove(new)


def recover(path: str | Path) -> None:
    """Finish what a killed :func:`replace_folder` left: put the old folder back, or remove it if the new one stands."""
    path = Path(path)
    aside = _aside(path)
    if (aside / MARKER).is_file():
        if path.exists():
            _remove(aside)
        else:
            aside.rename(path)


def _aside(path: Path) -> Path:
    return path.parent / f".{path.name}.old"


def _walk(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}


def _files(folder: Path) -> list[str]:
    """The files that the marker of a folder lists; none without a marker."""
    marker = folder / MARKER
    return json.loads(marker.read_text("utf-8")) if marker.is_file() else []


def _remove(folder: Path) -> None:
    """Remove the files that the marker lists, the marker last, and the folders that are empty then."""
    if not folder.is_dir():
        return
    for name in _files(folder):
        (folder / name).unlink(missing_ok=True)
    for part in sorted((part for part in folder.rglob("*") if part.is_dir()), reverse=True):
        if not any(part.iterdir()):
            part.rmdir()
    (folder / MARKER).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
