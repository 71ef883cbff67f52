"""What does the environment cost on top of its models, and what does importing the package cost?

Plays batches of 64 sampled episodes in ``textenv/Assistant-v0`` and splits the time of a rollout into model calls
(decoding, reference, reward model) and the rest (buffers, checks, text, infos). The gold judge counts as a model call:
it belongs to the world and is no bookkeeping.

Command: ``python -m benchmarks.rollout_cost``.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import tyro
from transformers.utils import logging as hf_logging

from agents.core.agent import LanguageModelAgent
from agents.core.rollout import Stream
from benchmarks.record import write_result
from textenv import registry, scoring
from textenv.vector import make_vec


class Clock:
    """Adds up the time inside wrapped functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def bookkeeping(episodes: int, repeats: int) -> dict[str, float]:
    """Seconds per rollout of ``episodes``, and the share of them outside model calls."""
    env = make_vec("textenv/Assistant-v0", episodes)
    agent = LanguageModelAgent(registry.language_model("assistant-sft"), env.task)
    stream = Stream(env, seed=0)
    clock = Clock()
    scoring.response_logprobs = clock.wrap(scoring.response_logprobs)
    scoring.call_reward_model = clock.wrap(scoring.call_reward_model)
    act = clock.wrap(agent.respond)
    totals, shares = [], []
    for _ in range(repeats + 1):
        clock.seconds, start = 0.0, time.perf_counter()
        stream.collect(episodes, act)
        total = time.perf_counter() - start
        totals.append(total)
        shares.append(1.0 - clock.seconds / total)
    return {"rollout_seconds": statistics.median(totals[1:]), "bookkeeping_share": statistics.median(shares[1:])}


def import_seconds(repeats: int) -> float:
    """Median wall-clock time of ``import textenv`` in a fresh interpreter, without the start of the interpreter."""
    code = "import time; t = time.perf_counter(); import textenv; print(time.perf_counter() - t)"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(repeats)
    ]
    return statistics.median(map(float, runs))


def main(episodes: int = 64, repeats: int = 15) -> None:
    hf_logging.disable_progress_bar()
    figures = bookkeeping(episodes, repeats)
    figures["import_seconds"] = import_seconds(5)
    print(f"rollout of {episodes} episodes: {figures['rollout_seconds']:.3f} s")
    print(f"environment and scoring bookkeeping: {100 * figures['bookkeeping_share']:.1f} % of it")
    print(f"import textenv: {figures['import_seconds']:.2f} s")
    print(write_result("rollout_cost", {"episodes": episodes, "runs": repeats, **figures}))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
