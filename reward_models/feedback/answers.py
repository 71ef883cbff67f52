"""What an annotator's page may say about an item, checked."""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args

from annotated_types import Ge, Le

from textenv.settings import fits

FLAGS = ("harmful", "nonsense")
SCALES = ("helpful", "accurate", "safe")
COMMENT_LIMIT = 4_000
"""Characters of a comment."""
NAME_LIMIT = 40
"""Characters of an annotator's name."""

Stars = Annotated[int, Ge(1), Le(5)]
Action = Literal["rank", "skip"]


class Refused(Exception):
    """A request that cannot be done, with its HTTP status and what to do."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Answer(NamedTuple):
    """What a page sends. Responses are numbered in the order in which they were shown, so nothing tells their model."""

    action: Action
    ranking: list[list[int]]
    flags: dict[str, str]
    scores: dict[str, dict[str, int]]
    comment: str
    seconds: float
    request: str

    @classmethod
    def checked(cls, fields: Mapping[str, Any], count: int) -> "Answer":
        """The answer in a JSON object about an item with ``count`` responses.

        Raises:
            Refused: 413 for a comment that is too long, 422 for any other field.
        """

        def field(name: str, default: Any, rule: str, good: Callable[[Any], bool]) -> Any:
            value = fields.get(name, default)
            if not good(value):
                raise Refused(422, f"{name} must be {rule}, got {str(value)[:200]!r}. Nothing was saved.")
            return value

        def place(key: Any) -> bool:
            return key in {str(number) for number in range(count)}

        if unknown := sorted(fields.keys() - {*cls._fields, "item"}):
            raise Refused(422, f"an answer must have the fields {', '.join(cls._fields)}, got {unknown[0][:40]!r} too.")
        action = field("action", "rank", "rank or skip", lambda value: value in get_args(Action))
        whole = f"a permutation of 0 to {count - 1}, best first, each rank a list"
        comment = field("comment", "", "text", lambda value: isinstance(value, str) and _is_text(value))
        if len(comment) > COMMENT_LIMIT:
            raise Refused(
                413, f"a comment must have {COMMENT_LIMIT} characters or less, got {len(comment)}. Shorten it."
            )
        return cls(
            action,
            field("ranking", [], whole, lambda value: value == [] if action == "skip" else _is_ranking(value, count)),
            field(
                "flags", {}, f"responses by number, each {' or '.join(FLAGS)}",
                lambda value: isinstance(value, dict) and all(place(k) and v in FLAGS for k, v in value.items()),
            ),
            field(
                "scores", {}, f"responses by number, each with some of {', '.join(SCALES)} from 1 to 5",
                lambda value: isinstance(value, dict) and all(place(k) and _is_scores(v) for k, v in value.items()),
            ),
            comment,
            field("seconds", 0, "0 or more", lambda value: fits(value, Annotated[float, Ge(0)])),
            fields["request"],
        )  # fmt: skip


def _is_ranking(value: Any, count: int) -> bool:
    if not isinstance(value, list) or not all(isinstance(group, list) and group for group in value):
        return False
    places = [place for group in value for place in group]
    return all(type(place) is int for place in places) and sorted(places) == list(range(count))


def _is_scores(value: Any) -> bool:
    return isinstance(value, dict) and all(scale in SCALES and fits(stars, Stars) for scale, stars in value.items())


_REQUEST = "a name of 8 to 64 letters, digits and dashes"


def checked_request(value: Any) -> str:
    """The name of a request.

    Raises:
        Refused: 422 for anything that is no such name.
    """
    if not isinstance(value, str) or not re.fullmatch("[A-Za-z0-9-]{8,64}", value):
        raise Refused(422, f"request must be {_REQUEST}, got {str(value)[:80]!r}. Nothing was saved.")
    return value


def _is_text(value: str) -> bool:
    """No lone surrogates, which SQLite could not store."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
