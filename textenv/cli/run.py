"""``textenv run`` and ``textenv plot``."""

import json
import sys
from pathlib import Path

import tyro

from agents.experiments.bounds import with_bounds
from agents.experiments.page import write_summary
from agents.experiments.plot import compare_curves, read_runs
from agents.experiments.run import cells_of, print_tables, run_experiment, summarise
from textenv.cli.common import Json
from textenv.data.folders import check_collection
from textenv.pages.figures import save
from textenv.registry.experiment import load_experiment
from textenv.training.trackers import Tracker, check_trackers


def run(experiment: tyro.conf.Positional[Path], *, report_to: tuple[Tracker, ...] = (), as_json: Json = False) -> None:
    """Run an experiment file: every agent in every environment with every seed, compared at the end.

    Finished parts are not run again. Ctrl-C finishes the update and saves; the same command continues from there.

    Args:
        experiment: YAML file (docs/experiments.md) with a section "run".
        report_to: trackers that get the figures of each training as well.
    """
    check_trackers(report_to)
    loaded = load_experiment(experiment)
    if loaded.run is None:
        raise ValueError(f"an experiment must have the section 'run', got {str(experiment)!r} without one. Add it.")
    check_collection(loaded.run.output)
    loaded.register()
    output = loaded.run.output
    results = with_bounds(run_experiment(cells_of(loaded.run, loaded.agents), output, report_to=report_to), output)
    page = write_summary(results, output)
    rows = summarise(results)
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        print_tables(rows)
    print(f"summary: {page}", file=sys.stderr)


def plot(runs: tyro.conf.Positional[tuple[Path, ...]], *, output: Path = Path("curves.png")) -> None:
    """Draw the curves of runs in one picture: the objective first, then scores, KL, length and endings.

    Args:
        runs: folders of learners, of `textenv run` (an agent's seeds become a line and a band) or of the demo.
        output: the picture, PNG or SVG; one that is there is replaced.
    """
    if not runs:
        raise ValueError("runs must name at least one folder, got none. Give the --output of a training.")
    kind = output.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ValueError(f"output must end in .png or .svg, got {str(output)!r}. Name a picture.")
    figure = compare_curves(read_runs(runs))
    output.parent.mkdir(parents=True, exist_ok=True)
    save(figure, output, kind)
    print(output)
