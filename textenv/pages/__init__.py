"""Shared parts of the package's pages and pictures: base template, style sheet, macros, figure helpers and numbers.

A page is a Jinja2 template that extends ``base.html.j2`` and lies beside the module that fills it. Every value is
escaped. A report is one file without scripts.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from textenv.data.records import atomic_path

if TYPE_CHECKING:
    from jinja2 import Environment


def environment(folder: Path) -> "Environment":
    """Renders the templates of a folder and the shared ones: values are escaped, an unknown name is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_page(path: str | Path, template: Path, **values: Any) -> None:
    """Fill a template and write the page, completely or not at all."""
    page = environment(template.parent).get_template(template.name).render(values)
    with atomic_path(path) as temporary:
        temporary.write_text(page, "utf-8")
