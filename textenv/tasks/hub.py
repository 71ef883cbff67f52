"""Prompt sets of published experiments, read from the hub when an environment is first made.

* ``textenv/HH-v0``: dialogues up to the assistant's last turn (Bai et al. 2022, arXiv:2204.05862).
* ``textenv/TLDR-v0``: Reddit posts to summarise (Stiennon et al. 2020, arXiv:2009.01325), with the split, the models
  and the settings of the reproduction by Huang et al. 2024 (arXiv:2403.17031).
* ``textenv/IMDB-v0``: ends of film reviews to continue cheerfully (Ramamurthy et al. 2023, arXiv:2210.01241).
"""

import functools
from typing import Any

import numpy as np

from textenv.data.datasets import read_records

HH, TLDR, IMDB = "Anthropic/hh-rlhf", "trl-lib/tldr", "stanfordnlp/imdb"
_ASSISTANT = "\n\nAssistant:"


def _records(dataset: str, split: str) -> list[dict[str, Any]]:
    try:
        return list(read_records(dataset, split=split).values())
    except ValueError as error:
        raise ValueError(
            f"these prompts must come from the data set {dataset!r} of the hub, got no access: {error} Or give "
            'others, prompts="prompts.jsonl" or {"dataset": folder, "column": name}; models may be '
            "folders too."
        ) from error


def hh(split: str) -> list[str]:
    """Each beginning of a dialogue once, up to ``Assistant:``; the paper's "train" or "test" split."""
    beginnings = (record["chosen"].rpartition(_ASSISTANT)[0] for record in _records(HH, split))
    return [beginning + _ASSISTANT for beginning in dict.fromkeys(beginnings)]


def tldr(split: str) -> list[str]:
    """Posts up to ``TL;DR:``; "train", "validation" or "test"."""
    return list(dict.fromkeys(record["prompt"] for record in _records(TLDR, split)))


def imdb(split: str) -> list[str]:
    """Reviews: 20,000 of the training set for "train", the other 5,000 for "validation", 5,000 of the test set for
    "test", drawn at random once and for all."""
    reviews = [record["text"] for record in _records(IMDB, "test" if split == "test" else "train")]
    order = np.random.default_rng(0).permutation(len(reviews))
    fifth = len(reviews) // 5
    chosen = {"train": order[fifth:], "validation": order[:fifth], "test": order[:fifth]}[split]
    return [reviews[i] for i in chosen]


hh_train, hh_test = (functools.partial(hh, split) for split in ("train", "test"))
tldr_train, tldr_validation, tldr_test = (functools.partial(tldr, split) for split in ("train", "validation", "test"))
imdb_train, imdb_validation, imdb_test = (functools.partial(imdb, split) for split in ("train", "validation", "test"))
