"""One cell of the comparison: the same world, the same settings, all sides in turns."""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.ppo_speed.talk import ROOT, Side
from benchmarks.ppo_speed.work import Shape, iteration_flops
from benchmarks.ppo_speed.worlds import World, make_world
from benchmarks.record import commit
from textenv.lm.kernels.layers import product

TRL = ROOT / ".venv-trl" / "bin" / "python"
SIDES: dict[str, dict[str, Any]] = {
    "trl": {},
    "ours": {},
    "ours-bfloat16": {"dtype": "bfloat16"},
    "ours-trunk": {"value_function": "trunk"},
    "ours-checkpointing": {"gradient_checkpointing": True},
    "ours-offload": {"offload_frozen": True},
    "ours-lora": {"lora_rank": 16},
    "ours-lora-bfloat16": {"lora_rank": 16, "dtype": "bfloat16"},
}
"""What each side changes. TRL always trains a second model for the values, as we do with "trunk"."""
DEFAULTS = {"epochs": 4, "minibatches": 4, "learning_rate": 1e-6, "dtype": "float32"}
DEFAULTS |= {"lora_rank": 0, "value_function": "head", "gradient_checkpointing": False, "offload_frozen": False}


def spec_of(world: World, *, natural: bool, threads: int, **changes: Any) -> dict[str, Any]:
    """What a driver gets."""
    stop = {"stop": world.stop if natural else None}
    return {**world._asdict(), "batch": len(world.prompts), "threads": threads, **DEFAULTS, **stop, **changes}


def compare(name: str, *, natural: bool, sides: Sequence[str], runs: int, threads: int) -> dict[str, Any]:
    """Medians of ``runs`` iterations of each side, one after the other in turns, after one that does not count."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(name, Path(folder), natural=natural)
        processes: dict[str, Side] = {}
        for label in sides:
            python, module = (TRL, "trl_side") if label == "trl" else (sys.executable, "ours")
            spec = spec_of(world, natural=natural, threads=threads, **SIDES[label])
            processes[label] = Side(python, module, spec, threads)
        rows: dict[str, list[dict[str, Any]]] = {label: [] for label in sides}
        peaks = []
        try:
            for _ in range(runs + 1):
                for label, process in processes.items():
                    rows[label].append(process.run())
                peaks.append(gemm_gflops())
        finally:
            for process in processes.values():
                process.close()
        shape = Shape.of_folder(world.reference)
    peak = statistics.median(peaks[1:])
    figures = {label: summary(found[1:], shape, peak) for label, found in rows.items()}
    if "trl" in figures:
        for label, side in figures.items():
            times = [(row["collect"] + row["update"]) for row in rows["trl"][1:]]
            own = [(row["collect"] + row["update"]) for row in rows[label][1:]]
            side["speedup"] = statistics.median(theirs / mine for theirs, mine in zip(times, own, strict=True))
            side["speedup_wall"] = figures["trl"]["iteration_wall"] / side["iteration_wall"]
            side["rss_ratio"] = side["peak_rss_mb"] / figures["trl"]["peak_rss_mb"]
    return {"commit": commit(), "runs": runs, "threads": threads, "gemm_gflops": peak, "sides": figures}


def summary(rows: list[dict[str, Any]], shape: Shape, peak: float) -> dict[str, Any]:
    """Medians of one side, and what follows from them; the highest memory."""
    figures: dict[str, Any] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    seconds = [row["collect"] + row["update"] for row in rows]
    figures["iteration"] = statistics.median(seconds)
    figures["iteration_min_max"] = [min(seconds), max(seconds)]
    figures["iteration_wall"] = statistics.median(row["collect_wall"] + row["update_wall"] for row in rows)
    figures["peak_rss_mb"] = max(row["peak_rss_mb"] for row in rows)
    figures["tokens_per_s"] = statistics.median(row["tokens"] / s for row, s in zip(rows, seconds, strict=True))
    flops = iteration_flops(shape, figures["tokens"], figures["response_tokens"])
    figures["gemm_share"] = flops / figures["iteration"] / (peak * 1e9)
    return figures


def gemm_gflops(size: int = 1536) -> float:
    """GFLOP/s of a large float32 product by the faster of PyTorch's library and ours: the best of five."""
    left, right = torch.ones(size, size), torch.ones(size, size)
    seconds = []
    for multiply in (torch.mm, product) * 5:
        start = time.process_time()
        multiply(left, right)
        seconds.append(time.process_time() - start)
    return 2 * size**3 / min(seconds) / 1e9
