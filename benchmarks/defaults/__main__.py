"""Do the algorithms gain with the settings they come with, whatever the reward?

The language model and the prompts of ``textenv/Assistant-v0``, six rewards, two KL coefficients, two batch sizes, three
seeds, and the preset of the id, which sets learning rates and passes over a batch. The objective, reward minus
β · KL, is measured on validation prompts and set beside that of the reference (share 0) and the best known (share 1).
Settings were chosen on ``CHOSEN_ON``; ``REPORTED`` was looked at afterwards.

Command: ``python -m benchmarks.defaults`` (hours on one core; finished cells are not run again).
"""

import json
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from agents.experiments.run import Cell, run_experiment
from benchmarks.record import RESULTS, write_result
from textenv import registry
from textenv.evaluation import optimum
from textenv.registry.experiment import AgentPlan
from textenv.registry.ids import environment_spec
from textenv.vector import make_vec

LEXICON = {"rule": "regex", "pattern": r"\b(please|thank)\b"}
CHOSEN_ON: dict[str, Any] = {
    "reward-model": "assistant-rm",
    "lexicon": LEXICON,
    "length": {"rule": "length_range", "minimum": 10, "maximum": 12, "slope": 0.1},
}
REPORTED: dict[str, Any] = {
    "ending": {"rule": "regex", "pattern": r"\bday \.$"},
    "forbidden-word": {"rule": "regex", "pattern": r"\bi\b", "score": -1.0},
    "sum": {
        "weighted": {"lexicon": {"model": LEXICON, "weight": 1.0}, "good": {"model": "assistant-rm", "weight": 0.5}}
    },
}
REWARDS = {**CHOSEN_ON, **REPORTED}
ALGORITHMS = {"ppo": "PPO", "rloo": "RLOO", "grpo": "GRPO", "reinforce": "REINFORCE", "online-dpo": "Online DPO"}
UPDATES = 60


def env_id(reward: str, kl_coef: float) -> str:
    return f"defaults/{reward}-{kl_coef:g}-v0"


def register(reward: str, kl_coef: float) -> None:
    options = dict(environment_spec("textenv/Assistant-v0").kwargs)
    options |= {"reward_model": REWARDS[reward], "kl_coef": kl_coef}
    registry.register(env_id(reward, kl_coef), **options)


Objectives = dict[tuple[str, int], dict[str, list[float]]]
"""Environment id, batch size → algorithm → the objective of every seed."""


def objectives(results: list[dict[str, Any]]) -> Objectives:
    found: Objectives = {}
    for result in results:
        settings, reward = result["settings"], result["figures"]["reward"]
        group = found.setdefault((settings["env_id"], settings["options"]["batch_size"]), {})
        group.setdefault(settings["algorithm"], []).append(reward)
    return found


def summary(found: Objectives, bounds: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Shares of the way from the reference to the best known objective, by reward, β and batch size."""
    rows = []
    for (name, batch_size), group in found.items():
        every = [value for (other, _), algorithms in found.items() if other == name
                 for values in algorithms.values() for value in values]  # fmt: skip
        low, best = bounds[name]["reference"], max(every)
        shares = {algorithm: [(value - low) / (best - low) for value in values] for algorithm, values in group.items()}
        rows.append({"env_id": name, "batch_size": batch_size, "best": best, **bounds[name], "shares": shares})
    return rows


def added_to(
    last: list[dict[str, Any]], found: Objectives, bounds: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """The last record's rows and new objectives, which replace those of the same algorithm in the same cell: the best
    known of both counts."""
    together: Objectives = {}
    for row in last:
        low, way = row["reference"], row["best"] - row["reference"]
        group = {name: [low + share * way for share in shares] for name, shares in row["shares"].items()}
        together[row["env_id"], row["batch_size"]] = group
    for cell, group in found.items():
        together[cell] = together.get(cell, {}) | group
    earlier = {row["env_id"]: {name: row[name] for name in ("reference", "optimum", "unclear")} for row in last}
    return summary(together, earlier | bounds)


def demands(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The lowest share of any run, the mean share of each algorithm, and how far PPO lies below RLOO at most, as a
    share of the way and in units of the objective."""
    names = [name for name in ALGORITHMS if any(name in row["shares"] for row in rows)]
    means = {name: np.mean([share for row in rows for share in row["shares"].get(name, [])]) for name in names}
    gaps = [(np.mean(row["shares"]["rloo"]) - np.mean(row["shares"]["ppo"]), row["best"] - row["reference"])
            for row in rows if {"rloo", "ppo"} <= row["shares"].keys()]  # fmt: skip
    return {
        "lowest_share": min(share for row in rows for shares in row["shares"].values() for share in shares),
        "mean_share": means,
        "ppo_below_rloo": max((gap for gap, _ in gaps), default=np.nan),
        "ppo_below_rloo_objective": max((gap * way for gap, way in gaps), default=np.nan),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'environment':<32}{'batch':>6}{'reference':>10}{'best':>7}" + "".join(f"{n:>18}" for n in ALGORITHMS)]
    for row in rows:
        cells = "".join(
            f"{np.mean(shares):>9.2f} ({min(shares):>5.2f})" if (shares := row["shares"].get(name)) else f"{'–':>18}"
            for name in ALGORITHMS
        )
        lines.append(f"{row['env_id']:<32}{row['batch_size']:>6}{row['reference']:>10.2f}{row['best']:>7.2f} {cells}")
    return "\n".join(lines)


def main(
    rewards: tuple[Literal[tuple(REWARDS)], ...] = tuple(REPORTED),
    kl_coefs: tuple[float, ...] = (0.05, 0.2),
    batch_sizes: tuple[int, ...] = (64, 256),
    seeds: tuple[int, ...] = (1, 2, 3),
    algorithms: tuple[Literal[tuple(ALGORITHMS)], ...] = tuple(ALGORITHMS),
    output: Path = Path("runs/defaults"),
    keep: bool = False,
) -> None:
    """Args: keep: write what was measured into the results file, beside what is there of other cells."""
    torch.set_num_threads(1)
    cells, bounds = [], {}
    for reward, kl_coef in product(rewards, kl_coefs):
        register(reward, kl_coef)
        name = env_id(reward, kl_coef)
        best = optimum(make_vec(name, 512, prompts="assistant-validation"), 16)
        bounds[name] = {"reference": best.reference.mean, "optimum": best.value, "unclear": best.unclear_prompts}
        for batch_size, seed, algorithm in product(batch_sizes, seeds, algorithms):
            options = {"preset": "assistant", "batch_size": batch_size}
            plan = AgentPlan(name=f"{ALGORITHMS[algorithm]} {batch_size}", algorithm=algorithm, options=options)
            cells.append(Cell(name, plan, seed, UPDATES * batch_size, {"prompts": "assistant-validation"}))
    found = objectives(run_experiment(cells, output))
    rows = summary(found, bounds)
    print(table(rows), demands(rows), sep="\n")
    if keep:
        print(
            write_result("defaults", record(json.loads((RESULTS / "defaults.json").read_text("utf-8")), found, bounds))
        )


def record(last: dict[str, Any], found: Objectives, bounds: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Rows and demands of both halves of the rewards, and the earlier runs that some of them come from."""
    halves: dict[str, Any] = {}
    for half, rewards in (("reported", REPORTED), ("chosen_on", CHOSEN_ON)):
        ours = {cell: group for cell, group in found.items() if cell[0].split("/")[1].rsplit("-", 2)[0] in rewards}
        rows = added_to(last[half]["rows"], ours, bounds)
        halves[half] = {"rows": rows, "demands": demands(rows)}
    runs = {key: last[key] for key in ("command", "commit", "machine", "versions")}
    return {**halves, "earlier_runs": [*last["earlier_runs"], runs]}


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
