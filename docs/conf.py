"""The documentation site: ``make docs`` builds it from the pages of this folder, warnings as errors."""

import dataclasses
import os
from importlib import import_module
from importlib.metadata import version as installed_version
from typing import Any, ClassVar

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

project = "textenv"
author = "the textenv developers"
release = version = installed_version("textenv")

os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # in the notebooks' kernels

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"textenv {version}"
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
html_show_copyright = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes stand in the signatures
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_inherit_docstrings = False


class Settings(SphinxDirective):
    """``{settings} module.Class``: the fields of a dataclass, inherited ones included, with their defaults."""

    required_arguments: ClassVar[int] = 1

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        cls = getattr(import_module(module), name)
        notes = field_notes(cls)
        lines: list[str] = []
        for field in dataclasses.fields(cls):
            lines += [f"``{field.name}`` = ``{default(field)}``"]
            lines += [f"    {line}" for line in notes.get(field.name, [])] or ["    ."]
            lines += [""]
        return self.parse_text_to_nodes("\n".join(["```{eval-rst}", *lines, "```"]))


def field_notes(cls: type) -> dict[str, list[str]]:
    """Field → the docstring after it, of a class and those that it inherits from."""
    notes: dict[str, list[str]] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found = ModuleAnalyzer.for_module(base.__module__).find_attr_docs()
            notes |= {name: text for (owner, name), text in found.items() if owner == base.__qualname__}
    return notes


def default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return type(value).__name__ + "(…)" if dataclasses.is_dataclass(value) else repr(value)
    return "required"


def math_in_text(translator: Any, node: nodes.math) -> None:
    translator.body.append(latex2mathml.tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def math_block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{latex2mathml.tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def link_log(app: Sphinx, document: str, source: list[str]) -> None:
    """Pages link to files of the repository; where the site has a page of such a file, the link goes there."""
    up = "../" * document.count("/")
    source[0] = source[0].replace("](../benchmarks/LOG.md", f"]({up}log.md")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("settings", Settings)
    # MathML needs no network, unlike MathJax.
    app.add_html_math_renderer("mathml", (math_in_text, None), (math_block, None))
    app.connect("source-read", link_log)
    return {"parallel_read_safe": True}
