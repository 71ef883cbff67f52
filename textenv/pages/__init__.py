"""Shared parts of the package's pages and pictures: base template, style sheet, macros, figure helpers and numbers.

A page is a Jinja2 template that extends ``base.html.j2`` and lies beside the module that fills it. The result is one
file without scripts, and every value is escaped.
"""

from pathlib import Path
from typing import Any

from textenv.data.records import atomic_path


def write_page(path: str | Path, template: Path, **values: Any) -> None:
    """Fill a template and write the page, completely or not at all."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template.name).render(values)
    with atomic_path(path) as temporary:
        temporary.write_text(page, "utf-8")
