"""``textenv demo``."""

import json
from typing import Annotated

import tyro
from rich.console import Console

from agents.demo.report import summary_table
from agents.demo.run import DemoConfig, run_demo, smoke_config
from textenv.cli.common import Json


def demo(config: Annotated[DemoConfig, tyro.conf.arg(name="")], *, smoke: bool = False, as_json: Json = False) -> None:
    """Base model → SFT → rankings → reward model → PPO on the embedded world, from nothing, with a report.

    A few minutes on two cores. Ctrl-C leaves a state that the same command continues.

    Args:
        config: what to run.
        smoke: train on next to nothing, to see in less than a minute that every step works here.
    """
    summary = run_demo(smoke_config(config) if smoke else config)
    if as_json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        Console().print(summary_table(summary))
