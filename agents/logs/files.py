"""``curves.jsonl`` and ``samples.jsonl`` of a run: one line per update, and sample texts every few updates;
``bounds.json``: objective of the reference and of the best policy, where somebody has asked for them.

They lie in the checkpoint's folder and go with it: each save writes the curves anew from the learner's history, lines
are added in between, and a resumed run drops what was logged after its checkpoint.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from agents.core.rollout import Rollout
from textenv.lm import LanguageModel
from textenv.training.checkpoint import CURVES

__all__ = ["BOUNDS", "CURVES", "SAMPLES", "append", "drop_after", "read_bounds", "sample_texts"]

BOUNDS = "bounds.json"
SAMPLES = "samples.jsonl"


def read_bounds(folder: Path) -> dict[str, float] | None:
    """``reference, optimum, low, high, unclear_prompts`` of a run (:func:`agents.experiments.bounds.bounds_of`)."""
    path = folder / BOUNDS
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add lines, in one write."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with path.open("ab", buffering=0) as file:
        file.write(lines.encode())


def drop_after(path: Path, episodes: int) -> None:
    """Keep the lines of the first so many episodes; later ones, and one that a kill has cut, are dropped in place."""
    kept = 0
    with path.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["episodes"] > episodes:
                break
            kept += len(line)
        file.truncate(kept)


def sample_texts(rollout: Rollout, model: LanguageModel, update: int, episodes: int, count: int = 4) -> list[dict]:
    """A few episodes of a batch, spread over it, as records of ``samples.jsonl``."""
    index = torch.linspace(0, len(rollout.rewards) - 1, count).long().unique().tolist()
    tokens = rollout.tokens
    prompts = [tokens.prompt_ids[i, -int(tokens.prompt_lengths[i]) :].tolist() for i in index]
    responses = [tokens.response_ids[i, : int(tokens.response_lengths[i])].tolist() for i in index]
    texts = zip(index, model.decode_batch(prompts), model.response_texts(responses), strict=True)
    return [
        {
            "update": update,
            "episodes": episodes,
            "prompt": prompt,
            "response": response,
            "reward": float(rollout.rewards[i]),
            "rm_score": float(rollout.rm_scores[i]),
            "kl": float(rollout.kl_per_token[i].sum()),
            "response_tokens": int(tokens.response_lengths[i]),
            "ended": bool(rollout.ended[i]),
        }
        for i, prompt, response in texts
    ]
