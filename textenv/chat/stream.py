"""Tokens as text, one by one."""

from typing import Any


class TextStream:
    """Tokens that come one by one, as text. A character of several tokens comes with its last one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = ""

    def add(self, token: int) -> str:
        """What a token adds to the text; empty for special tokens and unfinished characters."""
        self._ids.append(token)
        return "" if self._text().endswith("\ufffd") else self.rest()

    def rest(self) -> str:
        """What was held back, a character that stayed unfinished as "\ufffd"."""
        new = self._text()[len(self._given) :]
        self._given += new
        return new

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text of a response, or its name where that is nothing (``<eos>``)."""
    stream = TextStream(tokenizer)
    return [stream.add(token) or str(tokenizer.convert_ids_to_tokens(token)) for token in ids]
