"""Which way imports run: textenv ← reward_models ← agents ← benchmarks."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ("textenv", "reward_models", "agents", "benchmarks")
COMMANDS = ROOT / "textenv" / "cli"  # where everything is wired, lazily


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
    imported = imported_packages(path, top_level_only=COMMANDS in path.parents)
    assert not imported & later, f"{path} imports {imported & later}"
    assert "tests" not in imported


HEAVY = {"torch", "transformers", "stable_baselines3", "matplotlib", "accelerate", "rich", "tyro", "yaml", "datasets"}
LIGHT = ["__init__", "config", "kl", "data/__init__", "data/records", "registry/__init__", "registry/experiment"]
LIGHT = [f"textenv/{name}.py" for name in (*LIGHT, "protocols", "registry/names", "registry/plugins")]


@pytest.mark.parametrize("name", LIGHT)
def test_what_importing_the_package_loads_is_light(name):
    assert not imported_packages(ROOT / name, top_level_only=True) & HEAVY
