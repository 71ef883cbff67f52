"""What the documents tell a reader to type is understood, and what they link to is there."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from textenv.cli import COMMANDS, parse

ROOT = Path(__file__).parents[1]
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
_COMMAND = re.compile(r"(?:^|`)textenv (?P<name>(?:feedback )?[a-z][a-z-]*)(?P<rest> [^`\n#…]*)?", re.MULTILINE)


def quoted_commands() -> list[tuple[str, str, str]]:
    """``(document, command, arguments)`` of every line of code that starts with ``textenv COMMAND``."""
    found = [
        (name, match["name"], (match["rest"] or "").strip())
        for name, path in sorted(DOCUMENTS.items())
        for match in _COMMAND.finditer(path.read_text("utf-8"))
    ]
    return [(name, command, rest) for name, command, rest in found if rest and "|" not in rest]


def test_the_documents_quote_commands():
    assert len(quoted_commands()) >= 8


@pytest.mark.parametrize(("document", "command", "arguments"), quoted_commands())
def test_a_quoted_command_is_one_that_the_shell_command_understands(document, command, arguments):
    parse(COMMANDS[command].load(command), shlex.split(arguments), f"textenv {command}")


@pytest.mark.parametrize("document", sorted(DOCUMENTS))
def test_a_link_to_a_file_finds_it(document):
    path = DOCUMENTS[document]
    targets = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", path.read_text("utf-8"))
    assert not [target for target in targets if not (path.parent / target).exists()]


@pytest.mark.parametrize("document", sorted(DOCUMENTS))
def test_the_python_examples_import_names_that_exist(document):
    for example in re.findall(
        r"^```python\n(.*?)^```", DOCUMENTS[document].read_text("utf-8"), re.MULTILINE | re.DOTALL
    ):
        for node in ast.walk(ast.parse(example)):
            if isinstance(node, ast.ImportFrom) and node.module != "mymodule":
                module = importlib.import_module(node.module or "")
                assert not [name.name for name in node.names if not hasattr(module, name.name)]
