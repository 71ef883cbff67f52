"""Which way imports run: textenv ← reward_models ← agents ← benchmarks."""

import ast
import graphlib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ("textenv", "reward_models", "agents", "benchmarks")
COMMANDS = ROOT / "textenv" / "cli"  # where everything is wired; nothing imports these files but their own table


def imported_packages(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the package"
            names.add(str(node.module).split(".")[0])
    return names


FILES = [path for package in ORDER for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_package_imports_only_what_stands_to_its_left(path):
    package = path.relative_to(ROOT).parts[0]
    later = set(ORDER[ORDER.index(package) + 1 :])
    imported = imported_packages(path)
    assert not imported & later or COMMANDS in path.parents, f"{path} imports {imported & later}"
    assert "tests" not in imported


MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def imported_modules(path: Path) -> set[str]:
    """Files of the packages that a file imports, at its top or inside a function."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {name if name in MODULES else str(node.module) for name in inside}
    return modules & MODULES.keys()


def test_no_files_import_each_other_in_a_circle():
    graph = {name: imported_modules(path) for name, path in MODULES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"an import circle: {' → '.join(error.args[1])}")


def test_no_folder_holds_more_than_a_dozen_loose_modules():
    loose = Counter(path.parent for path in FILES if not path.name.startswith("__"))
    crowded = {str(folder.relative_to(ROOT)): count for folder, count in loose.items() if count > 12}
    assert not crowded


HEAVY = {"torch", "transformers", "stable_baselines3", "matplotlib", "accelerate", "rich", "tyro", "yaml", "datasets"}
LIGHT = ["__init__", "config", "kl", "data/__init__", "data/records", "registry/__init__", "registry/experiment"]
LIGHT = [f"textenv/{name}.py" for name in (*LIGHT, "protocols", "registry/ids", "registry/sources", "registry/plugins")]


@pytest.mark.parametrize("name", LIGHT)
def test_what_importing_the_package_loads_is_light(name):
    assert not imported_packages(ROOT / name, top_level_only=True) & HEAVY
