"""How do agents compare in the exact world and in the embedded one, with confidence intervals?

Every agent trains on the same number of episodes, with three seeds. Measured are the regret ratio where the optimum is
known, and gold, reward-model score, KL, wall-clock time and tokens everywhere; in the embedded world on test prompts.

Command: ``python -m benchmarks.agents`` (about half an hour on one core; finished cells are not run again). With
``--agents`` or ``--env-ids`` only those are run; the figures of the others stay those of the last record.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from agents.experiments.page import write_summary
from agents.experiments.run import Cell, markdown, run_experiment, summarise
from agents.presets import WORLDS, preset
from benchmarks.record import RESULTS, write_result
from textenv.registry.experiment import AgentPlan

SB3 = {"gamma": 1.0, "vf_coef": 0.1, "linear_decay": True}
LEARNERS: list[tuple[str, str, dict[str, Any]]] = [  # with the preset of the id
    ("PPO", "ppo", {}),
    ("RLOO", "rloo", {}),
    ("GRPO", "grpo", {}),
    ("Dr. GRPO", "grpo", {"normalize_std": False, "normalize_length": False}),
    ("REINFORCE", "reinforce", {}),
    ("Online DPO", "online-dpo", {}),
    ("DPO", "dpo", {}),
]
FIXED = [("best-of-4", "best-of-n", {"n": 4}), ("reference", "reference", {}), ("random", "random", {})]
SB3_MICRO = {**SB3, "num_envs": 256, "n_steps": 4}
SB3_PPO = {"n_epochs": 4, "batch_size": 256, "learning_rate": 7e-4}
SB3_ASSISTANT = {**SB3, "num_envs": 128, "n_steps": 24, "batch_size": 768, "n_epochs": 4, "learning_rate": 3e-4}
MICRO = [
    *LEARNERS,
    ("SB3 PPO", "sb3-ppo", {**SB3_MICRO, **SB3_PPO}),
    ("SB3 A2C", "sb3-a2c", {**SB3_MICRO, "learning_rate": 1e-3, "use_rms_prop": False}),
    *FIXED,
]
ASSISTANT = [*LEARNERS, ("SB3 PPO", "sb3-ppo", SB3_ASSISTANT), *FIXED]
SETTINGS = {
    "textenv/Micro-v0": (MICRO, 200 * 256, {}),
    "textenv/Assistant-v0": (ASSISTANT, 60 * 256, {"prompts": "assistant-test"}),
}


def cells(seeds: Sequence[int], env_ids: Sequence[str]) -> list[Cell]:
    """Agents × ids × seeds, seed by seed, so that an unfinished run has complete comparisons."""
    out = []
    for env_id in env_ids:
        agents, episodes, evaluation = SETTINGS[env_id]
        for seed in seeds:
            for name, algorithm, options in agents:
                written_out = preset(WORLDS[env_id], algorithm, episodes) | options
                plan = AgentPlan(name=name, algorithm=algorithm, options=written_out)
                out.append(Cell(env_id, plan, seed, episodes, evaluation))
    return out


def of_no_machine(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without what their names stood for, which can be folders."""
    return {name: value for name, value in settings.items() if name not in ("environment", "evaluated")}


def added_to(last: list[dict[str, Any]], measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last record's cells and new ones, which replace all of the same agent in the same world."""

    def name(cell: dict[str, Any]) -> tuple[str, str]:
        return cell["settings"]["env_id"], cell["settings"]["agent"]

    again = set(map(name, measured))
    return [cell for cell in last if name(cell) not in again] + measured


def main(
    seeds: tuple[int, ...] = (1, 2, 3),
    env_ids: tuple[Literal[tuple(SETTINGS)], ...] = tuple(SETTINGS),
    agents: tuple[str, ...] = (),
    output: Path = Path("runs/agents"),
) -> None:
    torch.set_num_threads(1)
    chosen = [cell for cell in cells(seeds, env_ids) if not agents or cell.plan.name in agents]
    results = run_experiment(chosen, output)
    print(f"summary: {write_summary(results, output)}")
    record: dict[str, Any] = {}
    measured = [{"settings": of_no_machine(result["settings"]), "figures": result["figures"]} for result in results]
    if agents or set(env_ids) != set(SETTINGS):
        last = json.loads((RESULTS / "agents.json").read_text("utf-8"))
        measured = added_to(last["cells"], measured)
        record["added_to"] = {key: last[key] for key in ("command", "commit", "machine")}
    rows = summarise(measured)
    print(write_result("agents", {**record, "rows": rows, "cells": measured}))
    print(markdown(rows))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
