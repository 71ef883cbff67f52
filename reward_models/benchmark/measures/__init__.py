"""What the benchmark measures, one file each: its figures, columns, flags, and section of the page."""

from importlib import import_module

from reward_models.benchmark.measure import Measure

MEASURES: tuple[Measure, ...] = tuple(
    import_module(f"{__name__}.{name}").MEASURE
    for name in (
        "accuracy",
        "calibration",
        "margins",
        "published",
        "length",
        "response_only",
        "robustness",
        "probes",
        "determinism",
        "best_of_n",
        "throughput",
    )
)
"""In the order of the report, the table and the page."""
