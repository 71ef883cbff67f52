"""Collects runs of ``textenv rlhf``, one a seed, and prints their table for the docs.

Command: ``make demo-smollm`` (once more with ``SEED=1``), then ``python -m benchmarks.rlhf runs/smollm runs/smollm-1``.
"""

import json
from pathlib import Path
from typing import Any

import tyro

from agents.demo.report import LAYOUTS, cell, metric_title
from benchmarks.demo_tables import row
from benchmarks.record import write_result

STAGES = {"base": "pretrained", "sft": "SFT", "ppo": "PPO"}


def table(summaries: list[dict[str, Any]]) -> list[str]:
    """A row a metric and stage, a column a seed."""
    rows = [
        row(["", "stage", *(f"seed {summary['seed']}" for summary in summaries)]),
        "|---" * (len(summaries) + 2) + "|",
    ]
    for key in LAYOUTS["pretrained"].metrics:
        for stage, name in STAGES.items():
            cells = [cell(summary[stage], key) for summary in summaries]
            title = metric_title(key, LAYOUTS["pretrained"]).value if stage == "base" else ""
            rows.append(row([title, name, *(f"{c.value} {c.note}".strip() for c in cells)]))
    return rows


def main(runs: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    summaries = [json.loads((run / "summary.json").read_text("utf-8")) for run in runs]
    print("\n".join(table(summaries)))
    for summary in summaries:
        print(summary["seed"], summary["gains"], summary["reward_model"], sum(summary["seconds"].values()))
    unnamed = [{key: value for key, value in summary.items() if key != "config"} for summary in summaries]  # its paths
    print(write_result("rlhf", {"runs": unnamed}))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
