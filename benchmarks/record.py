"""Results of benchmarks, with command, commit, versions and hardware."""

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, figures: dict[str, Any]) -> Path:
    """Write ``results/name.json``, a dot in the name as "_", with the figures and how they came about. What stands
    there under ``other_runs``, those of other machines say, stays."""
    record = {
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *map(_of_no_machine, sys.argv[1:])]),
        "commit": commit(),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {package: version(package) for package in ("torch", "transformers", "gymnasium", "numpy")},
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name.replace('.', '_')}.json"
    if path.is_file() and (other := json.loads(path.read_text("utf-8")).get("other_runs")):
        record["other_runs"] = other
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def commit() -> str:
    """The commit whose code runs."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


def _of_no_machine(argument: str) -> str:
    """A path outside the folder where the command ran, as its last part: where it lay helps nobody elsewhere."""
    path = Path(argument)
    return path.name if path.is_absolute() or ".." in path.parts else argument


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
