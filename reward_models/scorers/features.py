"""Features of a frozen trunk, kept on disk: runs that name the same file pass each text through the trunk once.

On one core a trunk of 135 M parameters reads some 300 tokens a second: an hour for a thousand pairs of dialogues and
their cross-validation, and a second once they are read.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reward_models.scorers.heads import features_of_rows, score_head
from reward_models.scorers.store import Store
from reward_models.scorers.texts import EncodedTexts
from reward_models.scorers.transformer import TransformerRewardModel
from textenv.lm import length_buckets

OnTexts = Callable[[int, int], None]
"""``(texts done, texts in all)``."""


def trunk_features(
    model: TransformerRewardModel, texts: EncodedTexts, file: str | Path | None = None, on_texts: OnTexts | None = None
) -> Float[Tensor, "n H"]:
    """Inputs of the head for every text, in order, on the CPU, in float32.

    With a ``file`` (SQLite), texts that this trunk has read before are looked up, and new ones are written after every
    batch, so that an interrupted run continues from there. A feature is filed under a SHA-256 of the trunk's weights
    and settings and the tokens of the text.

    Raises:
        ValueError: the file is no SQLite database, or damaged.
    """
    store = None if file is None else Store(file, "features", what="feature file")
    keys = [] if store is None else _keys(model.trunk_identity, texts)
    width = score_head(model.model).in_features
    found = {} if store is None else store.read(keys, lambda row: isinstance(row, bytes) and len(row) == 4 * width)
    rows = {i: np.frombuffer(found[key], dtype=np.float32) for i, key in enumerate(keys) if key in found}
    missing = torch.tensor([i for i in range(len(texts.lengths)) if i not in rows], dtype=torch.int64)
    for batch in length_buckets(texts.lengths[missing], model.batch_size, max_padding=0.1):
        index = missing[batch]
        features = features_of_rows(model.model, **texts.batch(index, model.model.device)).float().cpu().numpy()
        fresh = dict(zip(index.tolist(), features, strict=True))
        if store is not None:
            store.write({keys[i]: row.tobytes() for i, row in fresh.items()})
        rows |= fresh
        if on_texts is not None:
            on_texts(len(rows), len(texts.lengths))
    if on_texts is not None and not len(missing):
        on_texts(len(rows), len(rows))
    return torch.from_numpy(np.stack([rows[i] for i in range(len(rows))]) if rows else np.zeros((0, width), np.float32))


def _keys(trunk: str, texts: EncodedTexts) -> list[bytes]:
    """One key per text: its trunk, its tokens and, where there are any, their segments."""
    parts = [texts] if texts.types is None else [texts, texts.types]
    tokens = [part.flat.split(part.lengths.tolist()) for part in parts]
    return [
        hashlib.sha256(trunk.encode() + b"".join(ids.numpy().tobytes() for ids in text)).digest()
        for text in zip(*tokens, strict=True)
    ]
