"""Does a token cost the same in large batches, long responses and wide models?

One thread, the GPT-2 of 4 blocks, full length; seconds of the processor of an iteration over its real tokens, and that
over the arithmetic a token needs at the width (:func:`benchmarks.ppo_speed.work.iteration_flops`).

Command: ``python -m benchmarks.ppo_speed.growth`` (six minutes on one core).
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers.utils import logging as hf_logging

from benchmarks.ppo_speed.compare import spec_of
from benchmarks.ppo_speed.ours import iteration, make_agent
from benchmarks.ppo_speed.work import Shape, iteration_flops
from benchmarks.ppo_speed.worlds import PROMPT, World, make_models, random_prompts
from benchmarks.record import write_result

BASE = {"batch": 64, "response": 32, "width": 128}
GROWTH: dict[str, tuple[int, ...]] = {"batch": (16, 64, 256), "response": (32, 128, 256), "width": (128, 256, 384)}


def measure(batch: int, response: int, width: int, runs: int) -> dict[str, float]:
    """Microseconds a token, and GFLOP/s, of the median iteration after one that does not count."""
    sizes = {"n_layer": 4, "n_embd": width, "n_head": width // 32, "vocab_size": 1024}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_models(folder, sizes, context=PROMPT + response + 1)
        prompts = random_prompts(1024, batch, PROMPT)
        places = str(folder / "reference"), str(folder / "reward")
        world = World(*places, prompts, "w1", "<eos>", PROMPT, response)
        agent = make_agent(spec_of(world, natural=False, threads=1))
        rows = [iteration(agent) for _ in range(runs + 1)][1:]
        seconds = statistics.median(row["collect"] + row["update"] for row in rows)
        flops = iteration_flops(Shape.of_folder(world.reference), rows[0]["tokens"], rows[0]["response_tokens"])
    return {"us_per_token": 1e6 * seconds / rows[0]["tokens"], "gflops": flops / seconds / 1e9}


def main(runs: int = 3) -> None:
    torch.set_num_threads(1)
    hf_logging.disable_progress_bar()
    cells: dict[str, Any] = {}
    for axis, values in GROWTH.items():
        cells[axis] = {}
        for value in values:
            cells[axis][str(value)] = measure(**(BASE | {axis: value}), runs=runs)
            print(axis, value, {key: round(figure, 1) for key, figure in cells[axis][str(value)].items()}, flush=True)
    print(write_result("ppo_speed.growth", {"base": BASE, "runs": runs, "growth": cells}))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
