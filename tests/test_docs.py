"""What the documents tell a reader to type is understood, and what they link to is there."""

import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import gymnasium
import pytest

from textenv.cli import COMMANDS, parse
from textenv.vector import make_vec

ROOT = Path(__file__).parents[1]
PAGES = [path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts]
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *PAGES]}
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
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


def test_the_id_that_the_readme_registers_can_be_made_and_is_json():
    text = (ROOT / "README.md").read_text("utf-8")
    [example] = re.findall(
        r"^```python\n(import textenv\n\ntextenv\.register\(.*?)^```", text, re.MULTILINE | re.DOTALL
    )
    try:
        exec(example, {})
        env = make_vec("me/Short-v0", 1)
        json.dumps(dict(gymnasium.spec("me/Short-v0").kwargs))
        env.reset(seed=0)
    finally:
        gymnasium.registry.pop("me/Short-v0", None)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs_and_links_to_what_exists(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    assert not [cell for cell in cells if cell["cell_type"] == "code" and (cell["outputs"] or cell["execution_count"])]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert targets
    assert not [target for target in targets if not (path.parent / target).exists()]


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    blocks = re.findall(r"```\{toctree\}(.*?)```", index, re.DOTALL)
    listed = {line for block in blocks for line in block.split() if not line.startswith(":")}
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in [*PAGES, *NOTEBOOKS]}
    assert pages - listed == {"index"}
