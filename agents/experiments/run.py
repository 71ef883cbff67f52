"""Agents × environments × seeds: every cell is trained, measured and kept; finished cells are not run again.

A cell is one agent in one environment with one seed. Its folder has a ``checkpoint/`` while a learner trains, and a
``result.json`` when the cell is finished. Ctrl-C stops after the running update; the same command continues from there.

Command: ``textenv run experiment.yaml``.
"""

import itertools
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from agents.algorithms import algorithm, check_plan
from agents.core.job import Job, Trained
from textenv.data.folders import collection_folder
from textenv.data.records import write_json
from textenv.evaluation import evaluate
from textenv.pages.terminal import print_columns
from textenv.registry import changed, described, environment_spec
from textenv.registry.experiment import BUILT_IN_AGENTS, AgentPlan, RunPlan
from textenv.stats import Mean, mean_ci95
from textenv.tasks.exact import exact_world
from textenv.training.progress import Advance, progress_bar
from textenv.training.trackers import Tracker
from textenv.vector import make_vec

FIGURES = {
    "reward": "objective",
    "share": "of the way",
    "rm_score": "reward model",
    "gold_score": "gold",
    "kl": "KL, nats",
    "regret_ratio": "regret ratio",
    "response_tokens": "tokens",
    "eos_rate": "EOS",
    "seconds": "seconds",
    "tokens": "tokens trained on",
}
"""Figures of a cell, where they are known, and their headings in a table."""
MAX_EXACT = 64
"""Environments with at most this many prompts are enumerated, if their responses can be."""


class Cell(NamedTuple):
    env_id: str
    plan: AgentPlan
    seed: int
    total_episodes: int
    evaluation: Mapping[str, Any]
    """Keyword arguments of the environment that the agent is measured in, like ``{"prompts": "assistant-test"}``."""

    @property
    def folder(self) -> str:
        env_id, agent = (re.sub(r"[^A-Za-z0-9.-]+", "-", name) for name in (self.env_id, self.plan.name))
        return f"{env_id}/{agent}/seed-{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """Everything the result depends on. A result with other settings is not this cell's."""
        environment = environment_spec(self.env_id).kwargs
        settings = {
            "env_id": self.env_id,
            "agent": self.plan.name,
            "algorithm": self.plan.algorithm,
            "options": dict(self.plan.options),
            "seed": self.seed,
            "total_episodes": self.total_episodes,
            "evaluation": dict(self.evaluation),
            "environment": described(environment),
            "evaluated": described({**environment, **self.evaluation}),
        }
        return json.loads(json.dumps(settings))


def cells_of(plan: RunPlan, agents: Mapping[str, AgentPlan]) -> list[Cell]:
    """Every agent in every environment with every seed, environment by environment."""
    built_in = {name: AgentPlan(name=name, algorithm=name, options={}) for name in BUILT_IN_AGENTS}
    return [
        Cell(env_id, {**built_in, **agents}[agent], seed, plan.total_episodes, plan.evaluation.get(env_id, {}))
        for env_id, agent, seed in itertools.product(plan.environments, plan.agents, plan.seeds)
    ]


def run_experiment(
    cells: Iterable[Cell], output: str | Path, console: Console | None = None, *, report_to: Sequence[Tracker] = ()
) -> list[dict[str, Any]]:
    """Run the cells that have no result in ``output`` yet; return the results of all, in order.

    ``report_to`` names trackers that get each training's figures as well.

    Raises:
        ValueError: an agent's plan is wrong (before anything runs), or two cells share a folder.
    """
    cells = list(cells)
    console = console or Console(stderr=True)
    for cell in cells:
        check_plan(cell.plan)
    folders = [cell.folder for cell in cells]
    if len(set(folders)) < len(folders):
        twice = next(folder for folder in folders if folders.count(folder) > 1)
        raise ValueError(f"every cell must have a folder of its own, got {twice!r} twice. Rename an agent.")
    output, results = collection_folder(output), []
    for number, cell in enumerate(cells, 1):
        folder = output / cell.folder
        known = finished_result(folder, cell)
        if known is None:
            title = f"{number}/{len(cells)} {cell.plan.name}, seed {cell.seed}"
            with progress_bar(f"{title:<34.34}", console) as advance:
                known = run_cell(cell, folder, advance, report_to)
        results.append(known)
    return results


def finished_result(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """The result in a folder; None if the cell has not finished.

    Raises:
        ValueError: the folder belongs to a cell with other settings.
    """
    for name in ("result.json", "cell.json"):
        path = folder / name
        if path.is_file():
            content = json.loads(path.read_text("utf-8"))
            if content["settings"] != cell.settings:
                what = ", ".join(changed(content["settings"], cell.settings))
                rule = f"a folder must hold one cell, got {str(folder)!r} with other settings ({what} changed)"
                raise ValueError(f"{rule}. Name another output, or delete that folder.")
            if name == "result.json":
                return content
    return None


def run_cell(
    cell: Cell, folder: Path, advance: Advance | None = None, report_to: Sequence[Tracker] = ()
) -> dict[str, Any]:
    """Train and measure one cell."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "cell.json", {"settings": cell.settings})
    start = time.perf_counter()
    trained = train(cell, folder, advance, report_to)
    seconds = time.perf_counter() - start
    if trained.curve and "rollout_seconds" in trained.curve[0]:  # includes the time before an interruption
        seconds = sum(log["rollout_seconds"] + log["update_seconds"] for log in trained.curve)
    figures = measure(trained, cell) | {"seconds": seconds, "tokens": float(trained.tokens)}
    keys = ("episodes", "reward", "rm_score", "gold_score", "kl", "response_tokens", "eos_rate")
    curve = [{key: log[key] for key in keys if key in log} for log in trained.curve]
    result = {"settings": cell.settings, "figures": figures, "curve": curve}
    write_json(folder / "result.json", result)
    (folder / "cell.json").unlink()
    return result


def train(cell: Cell, folder: Path, advance: Advance | None, report_to: Sequence[Tracker] = ()) -> Trained:
    """Train the cell's agent; a learner keeps its checkpoint in the folder and continues from there."""
    where = (cell.env_id, cell.plan.options, cell.seed, cell.total_episodes, folder / "checkpoint")
    name = f"{cell.env_id}, {cell.plan.name}, seed {cell.seed}"
    job = Job(*where, advance, cell.evaluation, report_to, name)
    return algorithm(cell.plan.algorithm).train(job)


def measure(trained: Trained, cell: Cell) -> dict[str, float]:
    """Means over the prompts of the evaluation environment, and the regret ratio where the world can be enumerated."""
    env = make_vec(cell.env_id, 64, **cell.evaluation)
    env.reset(seed=cell.seed)
    count = len(env.task.prompts.ids)
    repeats = -(-256 // count)  # at least 256 answers: few prompts are answered often, many once
    summary = evaluate(trained.agent, env, prompt_ids=np.tile(np.arange(count), repeats)).summary()
    means = {key: value.mean if isinstance(value, Mean) else value for key, value in summary.items()}
    figures = {key: means[key] for key in FIGURES if key in means}
    if "kl" not in figures and env.kl_coef > 0:
        del figures["reward"]  # best-of-n's lacks the KL that the others pay
    if trained.model is not None and count <= MAX_EXACT:
        try:
            exact = exact_world(env).measure(trained.model)
        except ValueError:
            return figures  # too many responses to enumerate
        figures |= {"kl": exact.kl, "regret_ratio": exact.regret_ratio}
    return figures


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per agent and environment: for every figure the mean over seeds and half of its 95 % interval."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        settings = result["settings"]
        groups.setdefault((settings["env_id"], settings["agent"]), []).append(result)
    rows = []
    for (env_id, agent), group in groups.items():
        known = [name for name in FIGURES if all(name in result["figures"] for result in group)]
        figures = {name: mean_ci95([result["figures"][name] for result in group])._asdict() for name in known}
        rows.append({"env_id": env_id, "agent": agent, "seeds": len(group), "figures": figures})
    return rows


def tables(rows: list[dict[str, Any]]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Environment id → the header and the cells of its table, as text."""
    out: dict[str, tuple[list[str], list[list[str]]]] = {}
    for env_id in dict.fromkeys(row["env_id"] for row in rows):
        group = [row for row in rows if row["env_id"] == env_id]
        names = [name for name in FIGURES if any(name in row["figures"] for row in group)]
        body = [[row["agent"], str(row["seeds"]), *(shown(row["figures"].get(n)) for n in names)] for row in group]
        out[env_id] = (["agent", "seeds", *(FIGURES[name] for name in names)], body)
    return out


def shown(figure: Mapping[str, float] | None) -> str:
    """``mean ± ci95``, rounded to suit its size."""
    if figure is None:
        return "–"
    mean, ci95 = figure["mean"], figure["ci95"]
    digits = 0 if abs(mean) >= 100 else 1 if abs(mean) >= 10 else 3
    mean = round(mean, digits) + 0.0  # no minus before a zero
    return f"{mean:.{digits}f}" + ("" if np.isnan(ci95) else f" ± {ci95:.{digits}f}")


def markdown(rows: list[dict[str, Any]]) -> str:
    """The tables as Markdown, one section per environment."""
    parts = []
    for env_id, (header, body) in tables(rows).items():
        lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *body)]
        parts.append("\n".join([f"### {env_id}", "", *lines]))
    return "\n\n".join(parts) + "\n"


def print_tables(rows: list[dict[str, Any]]) -> None:
    """A table per environment, a column per agent."""
    for env_id, (header, body) in tables(rows).items():
        print_columns(f"{env_id}: mean ± 95 % over seeds", header, body)
