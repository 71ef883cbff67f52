"""``textenv reward``."""

from pathlib import Path
from typing import Annotated

import tyro

from reward_models.preferences import layout_list, load_rankings
from reward_models.training.start import start_reward_model
from reward_models.training.trainer import RewardConfig, train_reward_model
from textenv.cli.common import Json, check_device, check_unfinished, show, show_loss
from textenv.training.progress import progress_bar
from textenv.training.trackers import Tracker, check_trackers


def reward(
    model: str,
    data: str,
    output: Path,
    config: Annotated[RewardConfig, tyro.conf.arg(name="")],
    *,
    eval_data: str | None = None,
    split: str | None = None,
    eval_split: str | None = None,
    format: str | None = None,
    device: str = "cpu",
    resume: bool = False,
    report_to: tuple[Tracker, ...] = (),
    skip_malformed: bool = False,
    as_json: Json = False,
) -> None:
    """Train a reward model on rankings or pairs; the result is a Hugging Face sequence-classification folder.

    LAYOUTS

    Args:
        model: language model or encoder that lends its trunk, or a reward model to train on: a registered name, a
            folder or a hub id.
        data: JSONL (.gz too), JSON, CSV or Parquet file, data set folder or hub id, in one of the layouts above.
        output: folder for the result; an interrupted run leaves its checkpoint there.
        config: how to train.
        eval_data: held-out records; accuracy and NLL are printed at the end.
        split: of a data set that has several; default "train".
        eval_split: of the held-out data set.
        format: layout of the records, as name or name:option; default: the one that their keys show.
        device: where to train, like cpu or cuda:0.
        resume: continue the interrupted run in the output folder.
        report_to: trackers that get the loss and the held-out figures.
        skip_malformed: leave malformed records out, and say how many, instead of stopping at the first.
    """
    check_unfinished(output)
    check_device(device)
    check_trackers(report_to)
    rankings = load_rankings(data, split=split, format=format, skip_malformed=skip_malformed)
    held_out = None
    if eval_data is not None:
        held_out = load_rankings(eval_data, split=eval_split, format=format, skip_malformed=skip_malformed)
    start = start_reward_model(model, device)
    with progress_bar("reward model") as advance:
        result = train_reward_model(
            start,
            rankings,
            config,
            output,
            eval_rankings=held_out,
            resume=resume,
            report_to=report_to,
            on_progress=show_loss(advance),
        )
    show({**result.metrics, "output": str(output)}, as_json)


assert reward.__doc__ is not None
reward.__doc__ = reward.__doc__.replace("LAYOUTS", layout_list().replace("\n", "\n    "))
