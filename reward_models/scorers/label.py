"""A classifier of several labels as a reward model: the probability of one of them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from reward_models.scorers import heads
from textenv.lm import disable_dropout, length_buckets


class LabelProbability:
    """``P(label | prompt + completion)``, in [0, 1], by a sequence classifier such as one of sentiment or toxicity.

    Prompt and completion are one text; its beginning is cut where it is too long for the model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, label: str, *, batch_size: int = 64) -> None:
        """Raises ValueError if the model has no such label."""
        names = {str(name): number for number, name in (model.config.id2label or {}).items()}
        if label not in names:
            raise ValueError(f"label must be one of {', '.join(names)}, got {label!r}. Name one that the model has.")
        disable_dropout(model)
        tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
        self.model, self.tokenizer, self.column, self.batch_size = model, tokenizer, names[label], batch_size
        positions = getattr(model.config, "max_position_embeddings", math.inf) - heads.unused_positions(model)
        self._limit = min(positions, tokenizer.model_max_length)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        ids = self.tokenizer(texts, truncation=True, max_length=self._limit).input_ids
        out = torch.zeros(len(texts))
        for index in length_buckets(torch.tensor([len(row) for row in ids]), self.batch_size):
            batch = self.tokenizer.pad({"input_ids": [ids[i] for i in index]}, return_tensors="pt")
            batch = batch.to(self.model.device)
            logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            out[index] = logits.float().softmax(-1)[:, self.column].cpu()
        return out.tolist()
