"""One server per project file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def only_server(path: Path) -> Iterator[None]:
    """Hold a project file against a second server.

    Raises:
        ValueError: another process serves it.
    """
    lock = FileLock(f"{path}.lock", timeout=0)
    try:
        with lock:
            try:
                yield
            finally:
                Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout:
        raise ValueError(
            f"a project must have one server, got {str(path)!r}, which another process serves. Stop that one first."
        ) from None
