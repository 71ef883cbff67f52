"""Texts as token lists, and the batches that training draws from them."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from textenv.lm.chat import chat_text, prompt_text, template_turn_end
from textenv.lm.load import unknown_word

_log = logging.getLogger(__name__)

_POOL = 50
"""Steps whose examples are sorted by length together: enough for little padding, few enough to stay random."""


class Ragged:
    """Token lists of different lengths, end to end in one tensor; padding is added on use."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.lengths: Int[Tensor, " N"] = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
        self.flat: Int[Tensor, " n"] = torch.tensor([i for sequence in sequences for i in sequence], dtype=torch.int64)
        self._starts = self.lengths.cumsum(0) - self.lengths

    def padded(self, index: Int[Tensor, " B"], *, left: bool = False) -> tuple[Int[Tensor, "B W"], Int[Tensor, " B"]]:
        """The lists numbered ``index`` as ``(ids, lengths)``, padded with 0 on the right (or ``left``)."""
        lengths = self.lengths[index]
        column = torch.arange(max(int(lengths.max()), 1))[None, :]
        if left:
            column = column - (column.shape[1] - lengths)[:, None]
        real = (column >= 0) & (column < lengths[:, None])
        source = (self._starts[index][:, None] + column).clamp(0, max(len(self.flat) - 1, 0))
        return self.flat[source].masked_fill(~real, 0), lengths

    def digest(self) -> str:
        """A fingerprint of the tokens and of where each list ends."""
        return hashlib.sha256(self.flat.numpy().tobytes() + self.lengths.numpy().tobytes()).hexdigest()[:16]


def epoch_windows(lengths: Int[Tensor, " N"], window: int, seed: int, epoch: int) -> Iterator[Int[Tensor, " n"]]:
    """The examples of each optimizer step of an epoch, of similar length within a step.

    The order depends only on seed and epoch: shuffle, sort by length within pools of many windows, shuffle the windows
    of each pool. Examples that do not fill a window come last.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    full = len(order) // window * window
    for start in range(0, full, _POOL * window):
        pool = order[start : min(start + _POOL * window, full)]
        windows = pool[np.argsort(lengths.numpy()[pool], kind="stable")].reshape(-1, window)
        yield from torch.from_numpy(rng.permutation(windows))
    if full < len(order):
        yield torch.from_numpy(order[full:])


def encode_texts(
    tokenizer: Any, prompts: Sequence[Any], responses: Sequence[str], *, rendered: bool = False
) -> tuple[list[list[int]], list[list[int]]]:
    """``(prompt tokens, response tokens)`` of many texts at once, without EOS; special tokens in prompts only.

    The tokens are those of ``LanguageModel.encode_prompt`` and ``encode_response``: a chat goes through the tokenizer's
    template, which adds its own special tokens. With ``rendered``, a string that starts with BOS is a rendered chat.
    """
    keys: list[tuple[str, bool]] = []
    for prompt in prompts:
        text, bos = prompt_text(tokenizer, prompt), tokenizer.bos_token
        keys.append((text, isinstance(prompt, str) and not (rendered and bos and text.startswith(bos))))
    encoded: dict[tuple[str, bool], list[int]] = {}
    for special in (True, False):
        texts = [key for key in dict.fromkeys(keys) if key[1] is special]
        encoded |= zip(texts, _encode(tokenizer, [text for text, _ in texts], special), strict=True)
    return [encoded[key] for key in keys], _encode(tokenizer, list(responses), False)


def encode_answers(
    tokenizer: Any, prompts: Sequence[Any], answers: Sequence[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """As :func:`encode_texts`, for what a policy is taught: the answer to a chat has the tokens with which the template
    continues the generation prompt, up to the token that closes the turn. Some write a space, or an empty thinking
    part, before it.

    An answer keeps its own tokens where the template closes it with no token of its own, or writes the prompt otherwise
    once there is an answer; the latter is logged.
    """
    prompt_ids, answer_ids = encode_texts(tokenizer, prompts, answers)
    chats = [row for row, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    end = template_turn_end(tokenizer) if chats else None
    if end is None:
        return prompt_ids, answer_ids
    texts = [chat_text(tokenizer, [*prompts[row], {"role": "assistant", "content": answers[row]}]) for row in chats]
    other = 0
    for row, whole in zip(chats, _encode(tokenizer, texts, False), strict=True):
        head, tail = whole[: len(prompt_ids[row])], whole[len(prompt_ids[row]) :]
        if head == prompt_ids[row] and end in tail:
            answer_ids[row] = tail[: len(tail) - 1 - tail[::-1].index(end)]
        else:
            other += 1
    if other:
        _log.warning("%d of %d chats: with an answer, the template writes another prompt.", other, len(chats))
    return prompt_ids, answer_ids


def _encode(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    ids_alone = {"add_special_tokens": special, "return_attention_mask": False, "return_token_type_ids": False}
    if not texts:
        return []
    try:
        return tokenizer(texts, **ids_alone).input_ids
    except Exception as error:
        if len(texts) == 1:
            raise (unknown_word("the tokenizer", texts[0], error) or error) from None
        for text in texts:  # which of them
            _encode(tokenizer, [text], special)
        raise
