"""(prompt, completion) as the tokens that a reward model reads.

A decoder reads prompt + completion + ending: EOS, or what its chat template puts after an assistant's message. An
encoder reads a pair of texts with its own special tokens between. A prompt that is too long loses its left part; a
completion that is too long by itself loses its end, but not the ending.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor

from reward_models.preferences import Turns, prompt_key
from textenv.lm.chat import chat_text, prompt_text, template_ending
from textenv.training.batches import Ragged, encode_texts


def in_template(tokenizer: Any, prompt: Any, completion: str) -> str:
    """A response of several turns as the chat template continues its prompt, up to the last turn's text."""
    if not isinstance(completion, Turns) or isinstance(prompt, str):
        return completion
    head = prompt_text(tokenizer, prompt)
    whole = chat_text(tokenizer, [*prompt, *completion.messages])
    last = completion.messages[-1]["content"].strip()
    end = whole.rfind(last) + len(last) if last else -1
    if not whole.startswith(head) or end < len(head):
        raise ValueError(
            "a chat template must write a response of several turns as a continuation of its prompt, got another "
            f"beginning for {completion[:60]!r}. Drop its record or use another model."
        )
    return whole[len(head) : end]


class EncodedTexts(Ragged):
    """Texts as token ids, with the segment of each token for models that read it."""

    def __init__(self, sequences: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None) -> None:
        super().__init__(sequences)
        self.types = None if types is None else Ragged(types)

    def batch(self, index: Int[Tensor, " B"], device: Any = "cpu") -> dict[str, Tensor]:
        """The rows ``index`` as arguments of :func:`reward_models.scorers.heads.score_rows`."""
        input_ids, lengths = self.padded(index)
        batch = {"input_ids": input_ids.to(device), "lengths": lengths}
        if self.types is not None:
            batch["token_type_ids"] = self.types.padded(index)[0].to(device)
        return batch


class Encoded(NamedTuple):
    texts: EncodedTexts
    cut: int
    """Prompts that lost their left part, each counted once however many completions it has."""
    cut_completions: list[int]
    """Numbers of the texts whose completion lost its end."""


def encode_for_decoder(
    tokenizer: Any, prompts: Sequence[Any], completions: Sequence[str], limit: int | None
) -> Encoded:
    """Prompt tokens + completion tokens + ending; a chat goes through the tokenizer's template."""
    prompt_ids, completion_ids = encode_texts(tokenizer, prompts, completions, rendered=True)
    eos = [tokenizer.eos_token_id]
    after_chat = template_ending(tokenizer) or eos
    texts: list[list[int]] = []
    cut = set()
    cut_completions = []
    for row, (prompt, head, tail) in enumerate(zip(prompts, prompt_ids, completion_ids, strict=True)):
        ending = eos if isinstance(prompt, str) else after_chat
        if limit is not None and len(tail) + len(ending) > limit:
            cut_completions.append(row)
            tail = tail[: limit - len(ending)]
        tail = [*tail, *ending]
        room = len(head) if limit is None else limit - len(tail)
        if room < len(head):
            cut.add(prompt_key(prompt))
        texts.append([*head[max(len(head) - room, 0) :], *tail])
    return Encoded(EncodedTexts(texts), len(cut), cut_completions)


def encode_for_encoder(
    tokenizer: Any, prompts: Sequence[Any], completions: Sequence[str], limit: int | None
) -> Encoded:
    """Prompt and completion as a pair, with the special tokens and segments that the tokenizer gives a pair; at least
    one token of the prompt stays."""
    rendered = [prompt_text(tokenizer, prompt) for prompt in prompts]
    completions = list(completions)
    if not rendered:
        return Encoded(EncodedTexts([]), 0, [])
    pairs = tokenizer(rendered, completions, verbose=False)
    ids, types = [list(row) for row in pairs.input_ids], pairs.get("token_type_ids")
    long = [] if limit is None else [row for row, text in enumerate(ids) if len(text) > limit]
    cut_completions = []
    if limit is not None and long:
        room = limit - tokenizer.num_special_tokens_to_add(pair=True) - 1
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        spans = tokenizer([completions[row] for row in long], **options).offset_mapping
        for row, span in zip(long, spans, strict=True):
            if len(span) > room:
                cut_completions.append(row)
                completions[row] = completions[row][: span[room - 1][1]]
        side, tokenizer.truncation_side = tokenizer.truncation_side, "left"
        try:
            texts = [rendered[row] for row in long], [completions[row] for row in long]
            short = tokenizer(*texts, truncation="only_first", max_length=limit)
        finally:
            tokenizer.truncation_side = side
        for place, row in enumerate(long):
            ids[row] = short.input_ids[place]
            if types is not None:
                types[row] = short.token_type_ids[place]
    return Encoded(EncodedTexts(ids, types), len({rendered[row] for row in long}), cut_completions)
