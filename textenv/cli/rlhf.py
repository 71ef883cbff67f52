"""``textenv rlhf``."""

import json
from typing import Annotated

import tyro
from rich.console import Console

from agents.demo.report import summary_table
from agents.rlhf.run import RLHFConfig, run_rlhf
from textenv.cli.common import Json


def rlhf(config: Annotated[RLHFConfig, tyro.conf.arg(name="")], *, as_json: Json = False) -> None:
    """SFT → reward model → PPO on a pretrained model and people's comparisons of replies, with a report.

    For a model of 135 M parameters it takes half an hour or more on a CPU. Ctrl-C leaves a state that the same command
    continues.

    Args:
        config: what to run.
    """
    summary = run_rlhf(config)
    if as_json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        Console().print(summary_table(summary))
