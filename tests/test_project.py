"""The project files agree with each other: one version, exact pins for every dependency, the Python versions of CI."""

import ast
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import textenv

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
DEPENDENCIES = [
    Requirement(line)
    for group in (PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values())
    for line in group
]


def test_the_version_stands_in_one_place():
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "textenv.__version__"}
    # A literal: setuptools reads it without importing the package.
    literals = {
        target.id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "textenv" / "__init__.py").read_text("utf-8")).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id == "__version__"
    }
    assert literals == {"__version__": textenv.__version__}
    assert importlib.metadata.version("textenv") == textenv.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", textenv.__version__)


@pytest.mark.parametrize("dependency", DEPENDENCIES, ids=str)
def test_a_dependency_has_an_exact_pin_within_its_range(dependency):
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert dependency.specifier.contains(pins[canonicalize_name(dependency.name)])


def test_continuous_integration_runs_every_python_that_the_package_promises():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13", "3.14"]
    promised = SpecifierSet(PROJECT["project"]["requires-python"])
    assert [f"3.{minor}" for minor in range(8, 15) if f"3.{minor}" in promised] == job["strategy"]["matrix"]["python"]
    assert workflow["permissions"] == {"contents": "read"}
    (script,) = [step["run"] for step in job["steps"] if "run" in step]
    assert (ROOT / script).stat().st_mode & 0o111


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_an_issue_form_names_its_fields(form):
    content = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text("utf-8"))
    assert {"name", "description", "body"} <= content.keys()
    assert all(field["attributes"]["label"] for field in content["body"])
    assert len({field["id"] for field in content["body"]}) == len(content["body"])


def test_the_citation_file_has_what_the_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == PROJECT["project"]["license"]
