"""The reward-model benchmark: how right, how calibrated, how biased, and how it fares when it is optimised.

    from reward_models.benchmark import compare, load_suite, run_benchmark

    suite = load_suite("embedded")                    # or "micro", or a JSONL file of preferences
    report = run_benchmark("assistant-rm", suite)               # any name, folder or callable
    print(report.accuracy_per_pair, report.limits, report.flags)

Command: ``textenv rm-bench MODEL… --data embedded``.
"""

from reward_models.benchmark.compare import Comparison, compare
from reward_models.benchmark.measure import BenchmarkReport
from reward_models.benchmark.report import markdown_table
from reward_models.benchmark.run import run_benchmark
from reward_models.benchmark.suites import BenchmarkConfig, Suite, load_suite

__all__ = [
    "BenchmarkConfig",
    "BenchmarkReport",
    "Comparison",
    "Suite",
    "compare",
    "load_suite",
    "markdown_table",
    "run_benchmark",
]
