"""``textenv sft``, ``textenv reward`` and ``textenv dpo``: what learns from demonstrations, rankings or pairs."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from agents.dpo import DPOConfig, train_dpo
from agents.sft import SFTConfig, load_demonstrations, train_sft
from reward_models.preferences import Ranking, layout_list, load_rankings
from reward_models.training.start import start_reward_model
from reward_models.training.trainer import RewardConfig, train_reward_model
from textenv.cli.common import (
    Json,
    PushToHub,
    check_device,
    check_unfinished,
    publish,
    show,
    show_loss,
    skipping_named,
)
from textenv.data.cards import Card, check_push
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
    push_to_hub: PushToHub = None,
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
    check_push(push_to_hub)
    records = load_demonstrations(data, split, turns=config.turns)
    held_out = None if eval_data is None else load_demonstrations(eval_data, eval_split, turns=config.turns)
    with progress_bar("supervised fine-tuning") as advance:
        options = {"device": device, "resume": resume, "report_to": report_to, "on_progress": show_loss(advance)}
        result = train_sft(model, records, config, output, eval_records=held_out, **options)
    card = Card("supervised fine-tuning", "text-generation", model, data, asdict(config), result.metrics)
    pushed = publish(output, card, push_to_hub)
    show({**result.metrics, "output": str(output), **pushed}, as_json)


@dataclass(frozen=True, kw_only=True)
class PreferenceArgs:
    """Which preferences."""

    data: str
    """JSONL (.gz too), JSON, CSV or Parquet file, data set folder or hub id, in one of the layouts above."""
    eval_data: str | None = None
    """Held-out records; accuracy and NLL are printed at the end."""
    split: str | None = None
    """Of a data set that has several; default "train"."""
    eval_split: str | None = None
    """Of the held-out data set."""
    format: str | None = None
    """Layout of the records, as name or name:option; default: the one that their keys show."""
    skip_malformed: bool = False
    """Leave malformed records out, and say how many, instead of stopping at the first."""

    def read(self) -> tuple[list[Ranking], list[Ranking] | None]:
        """The rankings to learn from, and the held-out ones."""
        how = {"format": self.format, "skip_malformed": self.skip_malformed}
        with skipping_named():
            rankings = load_rankings(self.data, split=self.split, **how)
            if self.eval_data is None:
                return rankings, None
            return rankings, load_rankings(self.eval_data, split=self.eval_split, **how)


def reward(
    model: str,
    preferences: Annotated[PreferenceArgs, tyro.conf.arg(name="")],
    output: Path,
    config: Annotated[RewardConfig, tyro.conf.arg(name="")],
    *,
    device: str = "cpu",
    resume: bool = False,
    report_to: tuple[Tracker, ...] = (),
    push_to_hub: PushToHub = None,
    as_json: Json = False,
) -> None:
    """Train a reward model on rankings or pairs; the result is a Hugging Face sequence-classification folder.

    LAYOUTS

    Args:
        model: language model or encoder that lends its trunk, or a reward model to train on: a registered name, a
            folder or a hub id.
        preferences: the data.
        output: folder for the result; an interrupted run leaves its checkpoint there.
        config: how to train.
        device: where to train, like cpu or cuda:0.
        resume: continue the interrupted run in the output folder.
        report_to: trackers that get the loss and the held-out figures.
    """
    check_unfinished(output)
    check_device(device)
    check_trackers(report_to)
    check_push(push_to_hub)
    rankings, held_out = preferences.read()
    start = start_reward_model(model, device)
    with progress_bar("reward model") as advance:
        options = {"resume": resume, "report_to": report_to, "on_progress": show_loss(advance)}
        result = train_reward_model(start, rankings, config, output, eval_rankings=held_out, **options)
    card = Card("reward model", "text-classification", model, preferences.data, asdict(config), result.metrics)
    pushed = publish(output, card, push_to_hub)
    show({**result.metrics, "output": str(output), **pushed}, as_json)


def dpo(
    model: str,
    preferences: Annotated[PreferenceArgs, tyro.conf.arg(name="")],
    output: Path,
    config: Annotated[DPOConfig, tyro.conf.arg(name="")],
    *,
    device: str = "cpu",
    resume: bool = False,
    report_to: tuple[Tracker, ...] = (),
    push_to_hub: PushToHub = None,
    as_json: Json = False,
) -> None:
    """Train a policy on rankings or pairs by direct preference optimisation; the result is a Hugging Face folder.

    LAYOUTS

    Args:
        model: where to start, and what the KL is measured against: a registered name, a folder or a hub id.
        preferences: the data.
        output: folder for the result; an interrupted run leaves its checkpoint there.
        config: how to train.
        device: where to train, like cpu or cuda:0.
        resume: continue the interrupted run in the output folder.
        report_to: trackers that get the loss and the held-out figures.
    """
    check_unfinished(output)
    check_device(device)
    check_trackers(report_to)
    check_push(push_to_hub)
    rankings, held_out = preferences.read()
    with progress_bar("DPO") as advance:
        options = {"device": device, "resume": resume, "report_to": report_to, "on_progress": show_loss(advance)}
        result = train_dpo(model, rankings, config, output, eval_rankings=held_out, **options)
    method = "direct preference optimisation"
    card = Card(method, "text-generation", model, preferences.data, asdict(config), result.metrics)
    pushed = publish(output, card, push_to_hub)
    show({**result.metrics, "output": str(output), **pushed}, as_json)


for command in (reward, dpo):
    assert command.__doc__ is not None
    command.__doc__ = command.__doc__.replace("LAYOUTS", layout_list().replace("\n", "\n    "))
