"""What both sides of the benchmark say to the process that times them. The standard library alone.

A side is a process with one agent. It reads what to do, then a line for each iteration that it is to run, and answers
with a line of JSON; so the sides take turns, and each has its own models and its own memory.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def answers() -> Callable[[dict[str, Any]], None]:
    """How this process answers: on its standard output, to which nothing else is written from now on."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return lambda figures: print(json.dumps(figures), file=out)


def told() -> dict[str, Any]:
    """What this process is to do: the first line of its input."""
    return json.loads(sys.stdin.readline())


def asked() -> bool:
    """Wait until another iteration is wanted; False at the end."""
    return bool(sys.stdin.readline())


def now() -> tuple[float, float]:
    """Seconds on the wall and of the processor."""
    return time.perf_counter(), time.process_time()


def phases(start: tuple[float, float], collected: tuple[float, float], end: tuple[float, float]) -> dict[str, float]:
    """Seconds of the two parts of an iteration; on a busy machine the processor's are the ones to compare."""
    return {
        "collect": collected[1] - start[1],
        "update": end[1] - collected[1],
        "collect_wall": collected[0] - start[0],
        "update_wall": end[0] - collected[0],
    }


def peak_rss_mb() -> float:
    """Highest resident memory of this process, 10⁶ bytes. (The one in rusage begins with that of the parent.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


class Side:
    """A process that runs iterations on request."""

    def __init__(self, python: str | Path, module: str, spec: dict[str, Any], threads: int) -> None:
        """``spec`` is what :func:`told` returns there."""
        self._module = module
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": _path(), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [str(python), "-m", f"benchmarks.ppo_speed.{module}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        self._tell(json.dumps(spec))

    def run(self) -> dict[str, Any]:
        """The figures of one more iteration.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self._process.stdout is not None
        self._tell("go")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side of the benchmark ended: {self._module}. Its error stands above.")
        return json.loads(line)

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        self._process.communicate("")


def _path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
