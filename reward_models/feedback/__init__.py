"""People who rank responses: a project file, a page, a blind arena, agreement, and an export that training reads.

A *project* is one SQLite file. It holds *items*, each a prompt with K responses, and what *annotators* said of them.
"""

from importlib.util import find_spec

_PACKAGES = ("choix", "filelock", "krippendorff", "markdown_it", "starlette", "uvicorn")


def check_extra() -> None:
    """Refuse, before any work, to go on without the packages of the extra.

    Raises:
        ValueError: one is missing.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"feedback must have the packages of its extra, got none named {', '.join(missing)}. Install them: "
            "pip install 'textenv[feedback]'."
        )
