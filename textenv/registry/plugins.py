"""Third-party packages that register their own prompts, models and ids when ``textenv`` is imported.

A package names a function in its metadata::

    [project.entry-points."textenv.plugins"]
    mypackage = "mypackage.textenv_plugin:register"

The function takes no arguments and calls ``textenv.register(...)`` and the like.
"""

import importlib.metadata
import warnings

from textenv.registry import all_or_nothing

GROUP = "textenv.plugins"


def load_plugins() -> list[str]:
    """Call every plug-in once; return the names of those that worked.

    One that fails causes a warning that names it, registers nothing, and stops neither the others nor the import.
    """
    worked = []
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            with all_or_nothing():
                entry.load()()
        except (Exception, SystemExit) as error:
            warnings.warn(
                f"the textenv plug-in {entry.name!r} (={entry.value!r}) failed and registered nothing: "
                f"{type(error).__name__}: {error}. Fix or uninstall its package. (Where the package itself imports "
                "textenv at its top, the function must stand in a module of its own.)",
                stacklevel=2,
            )
        else:
            worked.append(entry.name)
    return worked
