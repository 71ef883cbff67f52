"""Texts of demonstrations and preferences that the model would read otherwise than they were meant."""

import re
from collections.abc import Iterator
from typing import Any

from agents.doctor.data import FEW, Demonstrations, Preferences
from agents.doctor.finding import Check, Level, Seen
from agents.doctor.parts import Text, has_system_turn, refusal, refuses_system_turn
from textenv.lm import LanguageModel

MOST = 0.5
"""Share of responses that begin with their prompt, from which that is the layout and no chance."""
PYTHON_CHAT = re.compile(r"\s*(array\()?\[?\s*\{\s*'(role|content|from|value)'\s*:")
"""How ``str`` writes a chat or a message; JSON has other quotes."""
PROBE = (
    {"role": "user", "content": "QUESTION"},
    {"role": "assistant", "content": "ANSWER"},
    {"role": "user", "content": "QUESTION"},
)


def template(part: Demonstrations | Preferences) -> Iterator[Seen]:
    """The chat template writes every chat."""
    known = refuses_system_turn(part.model)  # a check of the model says so
    pairs = zip(part.prompts, part.refusals, strict=True)
    found = [reason for prompt, reason in pairs if reason and not (known and has_system_turn(prompt))]
    if found:
        yield Seen("error", f"{len(found)} of {len(part.prompts)} prompts are refused: {found[0]}")


def python_chats(part: Demonstrations | Preferences) -> Iterator[Seen]:
    """No text is a chat that Python has printed."""
    found = [text for pair in part.texts if (text := _printed(pair))]
    if found:
        level: Level = "error" if len(found) > FEW * len(part.texts) else "warning"
        what = f"{len(found)} of {len(part.texts)} texts are chats as Python prints them"
        yield Seen(level, f"{what}: {found[0][:60]!r}")


def _printed(pair: Text) -> str:
    return next((text for text in pair if isinstance(text, str) and PYTHON_CHAT.match(text)), "")


def repeated_prompt(part: Demonstrations | Preferences) -> Iterator[Seen]:
    """Responses do not begin with their prompt."""
    found = [pair.response for pair in part.texts if _repeats(pair)]
    share = len(found) / max(1, len(part.texts))
    if share > MOST:
        what = f"{len(found)} of {len(part.texts)} responses ({share:.0%}) begin with their whole prompt"
        yield Seen("warning", f"{what}: {found[0][:60]!r}")


def _repeats(pair: Text) -> bool:
    """Whether a response is its prompt, or the last turn of it, and more."""
    prompt, response = (_contents(pair.prompt) or [""])[-1].strip(), pair.response.strip()
    return bool(prompt) and response != prompt and response.startswith(prompt)


def control_tokens(part: Demonstrations | Preferences) -> Iterator[Seen]:
    """No turn of a chat and no response holds a control token of the model as text."""
    tokens = control_words(part.model)
    found = [hits for pair in part.texts if (hits := _hits(part, pair, tokens))]
    if found:
        share = len(found) / len(part.texts)
        names = ", ".join(dict.fromkeys(token for hits in found for token in hits))
        what = f"{len(found)} of {len(part.texts)} texts ({share:.0%}) hold {names}, which are read as control tokens"
        yield Seen("warning" if share > FEW else "note", what)


def _hits(part: Demonstrations | Preferences, pair: Text, tokens: list[str]) -> list[str]:
    """Control tokens in a text. A prompt that is no chat may be a rendered one, which has them by right; and a
    demonstration that ends with one is the business of another check."""
    response = pair.response
    if isinstance(part, Demonstrations):
        for token in tokens:
            response = response.rstrip().removesuffix(token)
    turns = [] if isinstance(pair.prompt, str) else _contents(pair.prompt)
    return [token for token in tokens if any(token in text for text in (*turns, response))]


def _contents(prompt: Any) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [str(message.get("content", "")) for message in prompt]


def control_words(lm: LanguageModel) -> list[str]:
    """Those that begin, part or end texts and turns. Others, such as those around the call of a tool, belong to
    answers."""
    tokenizer: Any = lm.tokenizer
    used = {*lm.ending_ids, tokenizer.bos_token_id, tokenizer.pad_token_id}
    if tokenizer.chat_template is not None and not refusal(lm, PROBE):
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        used |= special & set(lm.encode_prompt(list(PROBE)))
    used -= {None, tokenizer.unk_token_id}
    words = tokenizer.convert_ids_to_tokens(sorted(used))
    return [word for word in words if tokenizer(word, add_special_tokens=False).input_ids in [[n] for n in used]]


TEXT_CHECKS = {
    "template": Check(
        template,
        "Training stops at the first chat that cannot be written (unsloth 334; alignment-handbook 93).",
        "Let users and assistants take turns as the template wants them, or use a model with another template.",
    ),
    "printed chats": Check(
        python_chats,
        "Brackets, quotes and role names are learned as the answer: pandas.to_csv prints lists, and nothing reads them "
        "back.",
        "Write JSONL or Parquet; for CSV, pass each chat through json.dumps.",
    ),
    "prompt in the response": Check(
        repeated_prompt,
        "Every text contains the prompt twice, and the policy learns to repeat it: some trainers want prompt and "
        "response as one text, here they are apart.",
        "Cut the prompt from the response: response.removeprefix(prompt).",
    ),
    "control tokens": Check(
        control_tokens,
        "Tokenizers read their special tokens wherever they stand: a text can close its own turn and open another one "
        "(prompt injection), and a response ends in its middle (transformers 29279; tokenizers 1347).",
        "Remove them from the texts; where texts are about such tokens, write them with a space inside.",
    ),
}
