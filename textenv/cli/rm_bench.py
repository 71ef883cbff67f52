"""``textenv rm-bench``."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from reward_models.benchmark import BenchmarkConfig
from reward_models.benchmark.bench import run_all
from textenv.data.folders import check_collection
from textenv.training.progress import progress_bar


def rm_bench(
    models: tyro.conf.Positional[tuple[str, ...]],
    config: Annotated[BenchmarkConfig, tyro.conf.arg(name="")],
    *,
    data: str = "embedded",
    output: Path = Path("runs/rm-bench"),
    compare: bool = False,
) -> None:
    """Benchmark reward models: accuracy, calibration, bias, robustness, best-of-n, speed; JSON, a table and a page.

    Args:
        models: registered names, module:callable, or folders or hub ids of sequence classifiers.
        config: what to measure.
        data: embedded, embedded-validation, micro, or JSONL (.gz too) of {"prompt", "responses", "ranking"},
            {"prompt", "chosen", "rejected"} or {"chosen", "rejected"} dialogues.
        output: folder for report.html, table.md and one JSON per model; an earlier benchmark there is replaced.
        compare: test every model against the first one, pair by pair.
    """
    check_collection(output)
    with progress_bar("benchmark") as advance:
        table = run_all(models, data, output, config, compare_to_first=compare, advance=advance)
    print(table)
    print(f"report: {output / 'report.html'}", file=sys.stderr)
