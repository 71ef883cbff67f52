"""TRL's trainers on the rewards of an environment.

GRPO and RLOO of TRL draw, count the KL and learn themselves; of an environment they need what it pays before the KL:

>>> trainer = GRPOTrainer(model="my-sft", reward_funcs=reward_function("textenv/Assistant-v0"), train_dataset=prompts)

Set TRL's ``beta`` yourself: it multiplies an estimate of the KL per token beside advantages that GRPO has normalised,
so it is not the environment's ``kl_coef``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from textenv import registry
from textenv.config import Precision
from textenv.lm.chat import prompt_text
from textenv.scoring import score_texts

Texts = Sequence[str] | Sequence[Sequence[Mapping[str, Any]]]
"""Strings, or chats: lists of messages."""


def reward_function(
    id_or_model: str | Mapping[str, Any],
    *,
    reference: str | None = None,
    device: str | None = None,
    dtype: Precision | None = None,
) -> Callable[..., list[float]]:
    """What ``reward_funcs`` of TRL's trainers takes: ``f(prompts, completions, **columns) -> list[float]``.

    Texts may be strings or chats. The columns of the data set reach the reward model, as those of a prompt set do. A
    completion ended by itself if ``completion_ids`` say so or are not given; an environment's ``missing_eos_penalty``
    is subtracted where it did not.

    Args:
        id_or_model: a registered id, whose reward model scores; or a reward model: a registered name,
            "module:callable", the folder or hub id of a sequence classifier, or a JSON object.
        reference: language model that knows the ending tokens and renders chats; None: that of the id, and for a reward
            model its own tokenizer, if it has one.
        device, dtype: where the reward model runs, and its precision; None: as the id says, else cpu and float32.

    Raises:
        ValueError: the name stands for neither.
    """
    found: dict[str, Any] = {"reward_model": id_or_model}
    if isinstance(id_or_model, str) and id_or_model in registry.registered_ids():
        found = registry.environment_spec(id_or_model).kwargs
    how = (device or found.get("device", "cpu"), dtype or found.get("dtype", "float32"))
    penalty, named = found.get("missing_eos_penalty") or 0.0, reference or found.get("reference")
    if found["reward_model"] is None:
        raise ValueError(f"an id must have a reward model, got {id_or_model!r} without one. Name the reward model.")
    reward_model = registry.reward_model(found["reward_model"], *how)
    language = None if named is None else registry.language_model(named, *how)
    tokenizer = getattr(reward_model, "tokenizer", None) if language is None else language.tokenizer

    def text(prompt: Any) -> str:
        if not isinstance(prompt, str) and getattr(tokenizer, "chat_template", None) is None:
            rule = "a chat must be rendered by a chat template"
            raise ValueError(f"{rule}, got none for {prompt!r}. Give reference=, a model that has one.")
        return prompt_text(tokenizer, prompt)

    def score(
        prompts: Texts, completions: Texts, completion_ids: Sequence[Sequence[int]] | None = None, **columns: Any
    ) -> list[float]:
        cut = [False] * len(prompts)
        if completion_ids is not None and language is not None:
            cut = [not ids or ids[-1] not in language.ending_ids for ids in completion_ids]
        known = {name: c for name, c in columns.items() if isinstance(c, list) and len(c) == len(prompts)}
        known["finish_reason"] = ["length" if is_cut else "eos" for is_cut in cut]
        if not all(isinstance(prompt, str) for prompt in prompts):
            known["chat"] = [None if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        scores = score_texts(reward_model, list(map(text, prompts)), list(map(_answer, completions)), known)
        return [float(s) - penalty * is_cut for s, is_cut in zip(scores, cut, strict=True)]

    score.__name__ = re.split("[/:]", id_or_model.rstrip("/"))[-1] if isinstance(id_or_model, str) else "reward_model"
    return score


def _answer(completion: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(completion, str):
        return completion
    contents = [message.get("content") for message in completion]
    if len(contents) != 1 or not isinstance(contents[0], str):
        raise ValueError(f"a completion must be a text or one message with one, got {completion!r}. Drop the others.")
    return contents[0]
