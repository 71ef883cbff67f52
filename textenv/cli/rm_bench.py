"""``textenv rm-bench``."""

import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from reward_models.benchmark import BenchmarkConfig
from reward_models.benchmark.bench import run_all
from reward_models.benchmark.report import heads, notes, row
from textenv.cli.common import Json, skipping_named
from textenv.data.folders import check_collection
from textenv.pages.numbers import UNKNOWN
from textenv.pages.terminal import print_columns
from textenv.training.progress import progress_bar


def rm_bench(
    models: tyro.conf.Positional[tuple[str, ...]],
    config: Annotated[BenchmarkConfig, tyro.conf.arg(name="")],
    *,
    data: str = "embedded",
    output: Path = Path("runs/rm-bench"),
    compare: bool = False,
    as_json: Json = False,
) -> None:
    """Benchmark reward models: accuracy, calibration, bias, robustness, best-of-n, speed; JSON, a table and a page.

    Args:
        models: registered names, module:callable, or folders or hub ids of sequence classifiers.
        config: what to measure.
        data: embedded, embedded-validation, micro, or preferences: a JSONL (.gz too), JSON, CSV or
            Parquet file, data set folder or hub id, in a layout that `textenv reward --help` lists.
        output: folder for report.html, table.md and one JSON per model; an earlier benchmark there is replaced.
        compare: test every model against the first one, pair by pair.
    """
    check_collection(output)
    with skipping_named(), progress_bar("benchmark") as advance:
        reports, comparisons = run_all(models, data, output, config, compare_to_first=compare, advance=advance)
    if as_json:
        print(json.dumps([report.to_json() for report in reports], indent=2, ensure_ascii=False))
    else:
        rows = [["model", *heads()], *([report.model, *row(report)] for report in reports)]
        known = [cells for cells in zip(*rows, strict=True) if set(cells[1:]) != {UNKNOWN}]
        header, *columns = zip(*known, strict=True)
        print_columns(f"data: {reports[0].data}", header, columns)
        for name, text in notes(reports, comparisons):
            print(f"\n{name}: {text}")
    print(f"report: {output / 'report.html'}", file=sys.stderr)
