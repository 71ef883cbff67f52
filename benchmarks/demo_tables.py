"""The tables of the README and of docs/results.md from ``results/demo_seeds.json``.

Command: ``python -m benchmarks.demo_tables`` (``--picture RUN`` also draws docs/demo.png from a run folder).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from agents.demo.report import save_summary_picture
from benchmarks.record import RESULTS

STAGES = {"base": "base", "sft": "SFT", "best_of_4": "best-of-4", "ppo": "PPO"}


def stage_rows(runs: list[dict[str, Any]]) -> list[str]:
    """One row a stage: means over seeds, gold with its lowest and highest seed."""
    rows = []
    for stage, title in STAGES.items():
        parts = [run[stage] for run in runs]
        gold = [part["gold_score"]["mean"] for part in parts]
        if stage in ("base", "sft"):
            kl = "0" if stage == "sft" else "–"
        elif "kl_bound" in parts[0]:
            kl = f"≤ {parts[0]['kl_bound']:.2f}"
        else:
            kl = f"{np.mean([part['kl']['mean'] for part in parts]):.2f}"
        names = ("helpful_rate", "harmful_compliance_rate", "over_refusal_rate", "tone_rate", "eos_rate")
        right, *rates = (float(np.mean([part[name] for part in parts])) for name in names)
        cells = [title, f"{np.mean(gold):.2f} ({min(gold):.2f} … {max(gold):.2f})", kl, f"{right:.0%}"]
        cells += [f"{rates[0]:.1%}", f"{rates[1]:.1%}", f"{rates[2]:.0%}", f"{rates[3]:.1%}"]
        rows.append(row(cells))
    return rows


def seed_rows(runs: list[dict[str, Any]]) -> list[str]:
    """One row a figure, one column a seed."""

    def interval(stage: str, name: str) -> list[str]:
        return [f"{run[stage][name]['mean']:.2f} ± {run[stage][name]['ci95']:.2f}" for run in runs]

    def change(name: str) -> list[str]:
        return [f"{run['sft'][name]:.1%} → {run['ppo'][name]:.1%}" for run in runs]

    rm = [run["reward_model"] for run in runs]
    table = {f"gold, {title}": interval(stage, "gold_score") for stage, title in STAGES.items()}
    table["PPO: KL, nats"] = interval("ppo", "kl")
    table["right, SFT → PPO"] = change("helpful_rate")
    table["complies with harm, SFT → PPO"] = change("harmful_compliance_rate")
    table["refuses needlessly, PPO"] = [f"{run['ppo']['over_refusal_rate']:.1%}" for run in runs]
    table["tone kept, SFT → PPO"] = change("tone_rate")
    table["EOS, PPO"] = [f"{run['ppo']['eos_rate']:.1%}" for run in runs]
    table["reward model: accuracy (Bayes limit)"] = [
        f"{100 * m['accuracy']:.1f} ± {100 * m['accuracy_ci95']:.1f} % ({m['bayes_accuracy']:.1%})" for m in rm
    ]
    table["reward model: NLL (floor), nats"] = [f"{m['nll']:.3f} ({m['nll_floor']:.3f})" for m in rm]
    table["seconds"] = [f"{sum(run['seconds'].values()):.0f}" for run in runs]
    return [row([name, *cells]) for name, cells in table.items()]


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells).replace("%", " %").replace("  %", " %") + " |"


def main(picture: Path | None = None) -> None:
    results = json.loads((RESULTS / "demo_seeds.json").read_text("utf-8"))
    runs = [run["summary"] for run in results["runs"].values()]
    print("\n".join([*stage_rows(runs), "", *seed_rows(runs)]))
    if picture is not None:
        save_summary_picture(picture, RESULTS.parents[1] / "docs" / "demo.png")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
