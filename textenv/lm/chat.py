"""Chats as text, as the chat template writes them, and where a model's turn ends: the tokens that close it.

The one place where a template is applied. A policy continues the *generation prompt*, the text up to where an answer
begins; what trains it learns what the template writes from there on. That needs no ``{% generation %}`` marks in the
template.

Published instruct models name several ending tokens: all of ``generation_config.eos_token_id`` (Llama 3, Gemma 3,
Phi 3.5, Qwen 3), and the token with which the chat template closes an assistant turn. Each of them ends an episode.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedModel

_PROBE = "ANSWER"


def prompt_text(tokenizer: Any, prompt: Any) -> str:
    """A string itself, or chat messages rendered by the chat template.

    Raises:
        ValueError: there is no template, or it refuses the messages.
    """
    if isinstance(prompt, str):
        return prompt
    return _rendered(tokenizer, prompt, add_generation_prompt=True)


def chat_text(tokenizer: Any, messages: Sequence[Any]) -> str:
    """A whole chat as the template writes it, its last answer closed.

    Raises:
        ValueError: there is no template, or it refuses the messages.
    """
    return _rendered(tokenizer, list(messages))


def _rendered(tokenizer: Any, messages: Any, **options: Any) -> str:
    if tokenizer.chat_template is None:
        rule = f"a chat prompt needs a chat template, which the tokenizer of {tokenizer.name_or_path!r} lacks"
        raise ValueError(f"{rule}. Set tokenizer.chat_template before saving it, or give prompts as strings.")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, TypeError) as error:
        said = [message.get("role") if isinstance(message, dict) else message for message in messages]
        raise ValueError(
            f"a chat must be one that the model's chat template accepts, got turns of {said}, and the template says: "
            f"{error}. Change the chat (where a template knows no system turn, put its text into the first person's "
            "turn), or use another model."
        ) from error


@contextlib.contextmanager
def placed_chats(tokenizer: Any, prompts: Sequence[Any], place: Callable[[int], str]) -> Iterator[None]:
    """A block that encodes prompts; its error names the ``place`` of a chat that the template cannot write.

    Raises:
        ValueError: what is wrong, with the place.
    """
    try:
        yield
    except ValueError:
        for number, prompt in enumerate(prompts):
            try:
                prompt_text(tokenizer, prompt)
            except ValueError as error:
                raise ValueError(f"{place(number)}: {error}") from None
        raise


def template_ending(tokenizer: Any) -> list[int]:
    """Tokens that the chat template puts after an assistant's answer; empty without a template.

    Chat models were trained with them: ``<|im_end|>`` and a line break for Qwen.
    """
    if tokenizer.chat_template is None:
        return []
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}]
    _, found, tail = chat_text(tokenizer, messages).rpartition(_PROBE)
    return list(tokenizer(tail, add_special_tokens=False).input_ids) if found and tail.strip() else []


def turn_end_id(tokenizer: Any) -> int:
    """The token that closes an assistant turn of a chat: the template's own, or EOS where it has none.

    It is the first added token (``<|im_end|>``, ``<end_of_turn>``, ``<|eot_id|>``) of :func:`template_ending`. Plain
    words in a template do not count: an answer may use them too.
    """
    ending = template_turn_end(tokenizer)
    return tokenizer.eos_token_id if ending is None else ending


def template_turn_end(tokenizer: Any) -> int | None:
    """The first added token that the template puts after an answer; None without any."""
    added = tokenizer.added_tokens_decoder.keys() | set(tokenizer.all_special_ids)
    return next((token for token in template_ending(tokenizer) if token in added), None)


def ending_ids(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a turn of ``model``, the tokenizer's EOS first.

    Ids beyond the LM head, which can never be drawn, are left out.
    """
    named = getattr(model.generation_config, "eos_token_id", None)
    listed = [] if named is None else [named] if isinstance(named, int) else list(named)
    actions = model.get_output_embeddings().weight.shape[0]  # type: ignore[union-attr]
    ids = dict.fromkeys([tokenizer.eos_token_id, *listed, turn_end_id(tokenizer)])
    return tuple(int(token) for token in ids if token < actions)
