"""``textenv sft``."""

from pathlib import Path
from typing import Annotated

import tyro

from agents.sft import SFTConfig, load_demonstrations, train_sft
from textenv.cli.common import Json, check_device, check_unfinished, show, show_loss
from textenv.training.progress import progress_bar
from textenv.training.trackers import Tracker, check_trackers


def sft(
    model: str,
    data: str,
    output: Path,
    config: Annotated[SFTConfig, tyro.conf.arg(name="")],
    *,
    eval_data: str | None = None,
    split: str | None = None,
    eval_split: str | None = None,
    device: str = "cpu",
    resume: bool = False,
    report_to: tuple[Tracker, ...] = (),
    as_json: Json = False,
) -> None:
    """Fine-tune a language model on demonstrations; the result is a Hugging Face folder.

    Args:
        model: where to start: a registered name, a folder or a hub id.
        data: JSONL (.gz too), JSON, CSV or Parquet file, data set folder or hub id, of {"prompt", "completion"} or
            {"messages"} records.
        output: folder for the result; an interrupted run leaves its checkpoint there.
        config: how to train.
        eval_data: held-out records; their NLL is printed at the end.
        split: of a data set that has several; default "train".
        eval_split: of the held-out data set.
        device: where to train, like cpu or cuda:0.
        resume: continue the interrupted run in the output folder.
        report_to: trackers that get the loss and the held-out figures.
    """
    check_unfinished(output)
    check_device(device)
    check_trackers(report_to)
    records = load_demonstrations(data, split)
    held_out = None if eval_data is None else load_demonstrations(eval_data, eval_split)
    with progress_bar("supervised fine-tuning") as advance:
        options = {"device": device, "resume": resume, "report_to": report_to, "on_progress": show_loss(advance)}
        result = train_sft(model, records, config, output, eval_records=held_out, **options)
    show({**result.metrics, "output": str(output)}, as_json)
