"""Several models on one suite, written to a folder: what ``textenv rm-bench`` does."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import textenv
from reward_models.benchmark.compare import Comparison, compare
from reward_models.benchmark.measure import BenchmarkReport, plain
from reward_models.benchmark.page import write_page
from reward_models.benchmark.report import markdown_table
from reward_models.benchmark.run import run_benchmark
from reward_models.benchmark.suites import BenchmarkConfig, Suite, load_suite
from textenv.data.folders import collection_folder
from textenv.data.records import atomic_path, write_json


def run_all(
    models: Sequence[str],
    data: Suite | Sequence[Mapping[str, Any]] | str | Path,
    output: str | Path,
    config: BenchmarkConfig | None = None,
    *,
    compare_to_first: bool = False,
    advance: Any = None,
) -> tuple[list[BenchmarkReport], list[Comparison]]:
    """Benchmark models by name and write ``<model>.json``, ``table.md`` and ``report.html``.

    With ``compare_to_first`` also ``comparisons.json``, each model against the first. A model that fails, or Ctrl-C,
    leaves the files of those that are finished.

    Raises:
        ValueError: no or twice the same model, an unknown name, malformed data, or an output that cannot be written.
    """
    config = config or BenchmarkConfig()
    if not models or len(set(models)) < len(models):
        raise ValueError(f"a benchmark needs one or more models, each named once, got {list(models)}. Name them.")
    for name in models:
        textenv.reward_model(name)  # a wrong name should not wait for the models before it
    suite = load_suite(data, config)
    output = collection_folder(output)
    reports: list[BenchmarkReport] = []
    try:
        for number, (name, stem) in enumerate(zip(models, file_stems(models), strict=True)):

            def progress(done: int, total: int, number: int = number) -> None:
                if advance is not None:
                    advance(number * total + done, len(models) * total, {"model": number + 1})

            reports.append(run_benchmark(name, suite, config, on_progress=progress))
            reports[-1].save(output / f"{stem}.json")
    finally:
        comparisons = _against_first(reports, config) if compare_to_first and reports else []
        if comparisons:
            write_json(output / "comparisons.json", plain(comparisons))
        if reports:
            with atomic_path(output / "table.md") as temporary:
                temporary.write_text(markdown_table(reports, comparisons), "utf-8")
            write_page(output / "report.html", reports, comparisons)
    return reports, comparisons


def file_stems(names: Sequence[str]) -> list[str]:
    """A file name for each model; a number tells apart those that would be the same."""
    stems = [re.sub(r"[^\w.-]+", "-", name).strip("-.")[-80:] or "model" for name in names]
    return [stem if stems.count(stem) == 1 else f"{stem}-{place + 1}" for place, stem in enumerate(stems)]


def _against_first(reports: Sequence[BenchmarkReport], config: BenchmarkConfig) -> list[Comparison]:
    return [compare(reports[0], other, resamples=config.resamples, seed=config.seed) for other in reports[1:]]
