"""Two whole dialogues as a prompt and two responses: their common start, and all that follows in each."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

ASSISTANT, HUMAN = "\n\nAssistant:", "\n\nHuman:"


class Turns(str):
    """A response of several turns of a chat. As a string it is their text, with ``Human:`` and ``Assistant:`` between;
    a reward model with a chat template reads ``messages`` in the template's words."""

    messages: tuple[Mapping[str, Any], ...]

    def __new__(cls, messages: Sequence[Mapping[str, Any]]) -> "Turns":
        marks = [ASSISTANT if message["role"] == "assistant" else HUMAN for message in messages]
        texts = [f"{mark} {message['content']}" for mark, message in zip(marks, messages, strict=True)]
        self = super().__new__(cls, "".join(texts).removeprefix(f"{ASSISTANT} "))
        self.messages = tuple(messages)
        return self

    def __getnewargs__(self) -> tuple[Any]:
        return (self.messages,)


def response_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """What follows a prompt: the text of one assistant's message, or several turns."""
    for message in messages:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(f"a chat message must have the strings 'role' and 'content', got {message!r}.")
    return messages[0]["content"] if len(messages) == 1 else Turns(messages)


def of_several_turns(response: str) -> bool:
    """Whether a person speaks within a response, given as messages or as text."""
    return isinstance(response, Turns) or HUMAN in response


def beside_prompt(prompt: Any, chats: Sequence[list[Any]]) -> list[list[Any]]:
    """Whole chats that stand beside a prompt, which repeats messages of each; a system turn that the prompt alone holds
    is put before them.

    Raises:
        ValueError: the prompt holds anything else that a chat does not hold before its last message.
    """
    if not prompt:
        return list(chats)
    text = [{"role": "user", "content": prompt}]
    before = prompt if isinstance(prompt, list) else as_messages(prompt) if HUMAN in str(prompt) else text
    said = _said(before)
    rest = said[next((i for i, (role, _) in enumerate(said) if role != "system"), len(said)) :]
    out = []
    for chat in chats:
        told = _said(chat[:-1])
        if not _holds(told, said):
            if not _holds(told, rest) or (told and told[0][0] == "system"):
                rule = "a prompt beside whole chats must repeat what they begin with"
                raise ValueError(f"{rule}, got {prompt!r} beside {chat[:-1]!r}. Correct one, or drop the prompt.")
            chat = [*before[: len(said) - len(rest)], *chat]
        out.append(chat)
    return out


def _said(chat: Sequence[Any]) -> list[tuple[str, str]]:
    """Who says what in a chat."""
    messages = [message if isinstance(message, Mapping) else {"content": message} for message in chat]
    return [(str(message.get("role")), str(message.get("content")).strip()) for message in messages]


def _holds(told: list[Any], said: list[Any]) -> bool:
    """Whether one list stands in another as it is."""
    return any(told[place : place + len(said)] == said for place in range(len(told) - len(said) + 1))


def split_messages(chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], str, str]:
    """``(prompt messages, chosen response, rejected response)`` of two chats.

    The prompt is the longest common start after which the assistant speaks in both.

    Raises:
        ValueError: a last message is not the assistant's, or the chats have no such start, or do not differ.
    """
    for name, chat in (("chosen", chosen), ("rejected", rejected)):
        last = chat[-1] if chat else None
        if not (isinstance(last, Mapping) and last.get("role") == "assistant" and isinstance(last.get("content"), str)):
            raise ValueError(f"a chat must end with an assistant's message, got {name!r} ending with {last!r}.")
    if chosen == rejected:
        raise ValueError(f"two chats must differ, got the same ending with {chosen[-1]['content'][:60]!r} twice.")
    common = _common_start(chosen, rejected)
    starts = [
        place
        for place in range(1, min(common + 1, len(chosen), len(rejected)))
        if all(
            isinstance(chat[place], Mapping) and chat[place].get("role") == "assistant" for chat in (chosen, rejected)
        )
    ]
    if not starts:
        raise ValueError(
            "two chats must begin with the same messages up to an assistant's, got others: "
            f"{chosen[0]!r} and {rejected[0]!r}."
        )
    return chosen[: starts[-1]], response_of(chosen[starts[-1] :]), response_of(rejected[starts[-1] :])


def split_dialogue(chosen: str, rejected: str) -> tuple[str, str, str]:
    """``(prompt, chosen response, rejected response)`` of two dialogues as text.

    The prompt is the longest common start that ends with ``Assistant:``, and a response all that follows, its space
    included, so that prompt + response is the dialogue again.

    Raises:
        ValueError: a dialogue does not end with an assistant turn, or the two have no such start, or do not differ.
    """
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        _, found, reply = text.rpartition(ASSISTANT)
        if not found or HUMAN in reply:
            raise ValueError(
                f"without a 'prompt', a dialogue must end with an assistant turn ({ASSISTANT!r}), got {name!r} ending "
                f"with {text[-60:]!r}. Add the prompt, or the whole dialogue."
            )
    if chosen == rejected:
        raise ValueError(f"two dialogues must differ, got the same ending with {chosen[-60:]!r} twice.")
    place = _common_start(chosen, rejected)
    before, found, _ = chosen[:place].rpartition(ASSISTANT)
    if not found:
        raise ValueError(
            "two dialogues must be the same up to an assistant turn, got "
            f"{chosen[place : place + 40]!r} and {rejected[place : place + 40]!r} from character {place} on."
        )
    prompt = before + found
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def as_messages(dialogue: str) -> list[dict[str, str]]:
    """A dialogue in ``Human:`` and ``Assistant:`` form as the messages of a chat, without the answer that is still to
    come.

    Raises:
        ValueError: it does not begin with ``Human:``, or a turn is empty.
    """
    names = {HUMAN: "user", ASSISTANT: "assistant"}
    start, *parts = re.split(f"({re.escape(HUMAN)}|{re.escape(ASSISTANT)})", dialogue)
    turns = [(names[mark], text.strip()) for mark, text in zip(parts[::2], parts[1::2], strict=True)]
    if turns and turns[-1] == ("assistant", ""):
        turns.pop()
    if start.strip() or not turns or turns[0][0] != "user" or not all(text for _, text in turns):
        raise ValueError(
            f"a dialogue must have turns that begin with {HUMAN!r} or {ASSISTANT!r}, the first a person's and none "
            f"empty, got {dialogue[:60]!r}. Drop it."
        )
    return [{"role": role, "content": text} for role, text in turns]


def _common_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements two sequences begin with alike."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)
