"""``textenv run``."""

import json
import sys
from pathlib import Path

import tyro

from agents.experiments.page import write_summary
from agents.experiments.run import cells_of, print_tables, run_experiment, summarise
from textenv.cli.common import Json
from textenv.data.folders import check_collection
from textenv.registry.experiment import load_experiment


def run(experiment: tyro.conf.Positional[Path], *, as_json: Json = False) -> None:
    """Run an experiment file: every agent in every environment with every seed, compared at the end.

    Finished parts are not run again. Ctrl-C finishes the update and saves; the same command continues from there.

    Args:
        experiment: YAML file (docs/experiments.md) with a section "run".
    """
    loaded = load_experiment(experiment)
    if loaded.run is None:
        raise ValueError(f"an experiment must have the section 'run', got {str(experiment)!r} without one. Add it.")
    check_collection(loaded.run.output)
    loaded.register()
    results = run_experiment(cells_of(loaded.run, loaded.agents), loaded.run.output)
    page = write_summary(results, loaded.run.output)
    rows = summarise(results)
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        print_tables(rows)
    print(f"summary: {page}", file=sys.stderr)
