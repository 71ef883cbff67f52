"""Writing a result folder without losing files: neither the user's, nor those of an earlier result.

A folder written here carries a marker that lists its files; only a folder that holds nothing else is ever replaced. The
old one is moved aside, the new one moved in, and the old one removed, in this order: a process killed between any two
steps leaves a whole folder, which :func:`recover` puts back.
"""

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARKER = ".textenv-folder.json"
"""Written last; lists the files of the folder."""
_PROBE = ".textenv-probe-"


def check_replaceable(path: str | Path) -> None:
    """Refuse a folder that :func:`replace_folder` cannot safely replace; call it before long work.

    Raises:
        ValueError: it holds files that are not ours, or cannot be written.
    """
    path = Path(path)
    check_writable(path)
    recover(path)
    if path.is_dir():
        foreign = sorted(set(os.listdir(path)) - {name.split("/")[0] for name in [MARKER, *_files(path)]})
        foreign += sorted(_walk(path) - {MARKER, *_files(path)})
        if foreign:
            raise ValueError(
                f"output must be a new or empty folder, or hold only an earlier result of ours, got {str(path)!r} "
                f"with {foreign[0]!r} in it. Nothing was removed. Name another folder."
            )


def check_collection(path: str | Path) -> None:
    """Refuse a place where :func:`collection_folder` could write over files of others; call it before long work.

    Raises:
        ValueError: it holds files and no marker of a collection, or cannot be written.
    """
    path = Path(path)
    check_writable(path)
    if path.is_dir() and any(path.iterdir()) and (_files(path) or not (path / MARKER).is_file()):
        rule = "output must be a new or empty folder, or hold earlier results of the same command"
        raise ValueError(f"{rule}, got {str(path)!r} with other files. Nothing was changed. Name another folder.")


def collection_folder(path: str | Path) -> Path:
    """A folder for results that come one by one, made if it is new; its marker lists nothing, so nothing replaces it.

    Raises:
        ValueError: see :func:`check_collection`.
    """
    check_collection(path)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / MARKER).write_text("[]", "utf-8")
    return path


def check_writable(path: str | Path) -> None:
    """Check, by trying, that the folder can be made and written to.

    Raises:
        ValueError: it is a file, or not writable.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"output must be a folder, got the file {str(path)!r}. Name another folder.")
    existing = path if path.exists() else next(parent for parent in path.absolute().parents if parent.exists())
    try:
        for place in {existing, path.absolute().parent if path.exists() else existing}:
            for left in place.glob(f"{_PROBE}*"):  # by a process that was killed between the two steps
                with suppress(OSError):
                    left.rmdir()
            tempfile.TemporaryDirectory(dir=place, prefix=_PROBE).cleanup()
    except OSError as error:
        raise ValueError(
            f"output must be a writable folder, got {str(path)!r} ({error.strerror}). Name another folder."
        ) from error


def is_of_writing(error: Exception) -> bool:
    """Whether an error says that a file could not be written: the disk is full, say. torch and safetensors have errors
    of their own for that."""
    from safetensors import SafetensorError

    of_torch = isinstance(error, RuntimeError) and "inline_container" in str(error)
    return of_torch or isinstance(error, OSError | SafetensorError)


@contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new folder that replaces ``path`` if the block succeeds, and disappears if it fails.

    Raises:
        ValueError: see :func:`check_replaceable`.
    """
    path = Path(path)
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.new-{os.getpid()}-"))
    (new / MARKER).write_text("[]", "utf-8")
    try:
        yield new
        (new / MARKER).write_text(json.dumps(sorted(_walk(new) - {MARKER})), "utf-8")
        aside = _aside(path)
        if path.exists():
            path.rename(aside)
        new.rename(path)
        _remove(aside)
    finally:
        if new.exists():
            shutil.rmtree(new)  # it needs no space, unlike a marker


def add_file(folder: Path, name: str, text: str) -> None:
    """Write one more file into a folder made by :func:`replace_folder`, as one of its own."""
    names = sorted({*_files(folder), name})
    (folder / MARKER).write_text(json.dumps(names), "utf-8")
    (folder / name).write_text(text, "utf-8")


def recover(path: str | Path) -> None:
    """Clean up after a killed :func:`replace_folder`: put the old folder back, or remove it if the new one is in place.

    Half-written folders of processes that have ended are removed.
    """
    path = Path(path)
    for new in path.parent.glob(f"{glob.escape(f'.{path.name}.new-')}*-*"):
        ours = (new / MARKER).is_file() or not any(new.iterdir())  # killed before it had written its marker
        if ours and not _is_running(new.name.rpartition(".new-")[2].partition("-")[0]):
            shutil.rmtree(new)
    aside = _aside(path)
    if (aside / MARKER).is_file():
        if path.exists():
            _remove(aside)
        else:
            aside.rename(path)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OSError):
        return True  # not a number that we wrote, or another user's process
    return True


def _aside(path: Path) -> Path:
    return path.parent / f".{path.name}.old"


def _walk(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}


def _files(folder: Path) -> list[str]:
    """The files that the marker of a folder lists; none without a marker."""
    marker = folder / MARKER
    return json.loads(marker.read_text("utf-8")) if marker.is_file() else []


def _remove(folder: Path) -> None:
    """Remove the files that the marker lists, then the folders left empty, and the marker last."""
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
