"""A reward model in another process or on another machine, asked over HTTP.

POST {"prompts": […], "completions": […], <column>: […]}  →  {"scores": […]}
"""

import http.client
import json
import os
import queue
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, final

_EXCERPT = 200
"""Characters of an answer that an error quotes."""


class _Passing(Exception):
    """A failure that may be over when asked again."""


@final
class HTTPRewardModel:
    """Scores by POSTing batches to a URL; all columns go along, so they must be JSON.

    A time-out, a broken connection and a status of 5xx or 429 are tried again, ``retries`` times, after
    ``backoff · 2^k`` seconds; anything else is an error at once. A redirect is not followed.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 10.0,
        batch_size: int = 64,
        retries: int = 4,
        backoff: float = 0.5,
        token_variable: str | None = None,
        version: str | None = None,
    ) -> None:
        """``timeout`` in seconds, of one request from its start to the end of its answer. ``token_variable`` names the
        environment variable that holds a bearer token, so that no secret enters a spec. ``version`` tells one model
        behind the URL from the next, for caches.

        Raises:
            ValueError: the URL is not http(s) or cannot be right, or a number is out of range.
        """
        if not _is_url(url):
            raise ValueError(
                "a reward model's URL must start with http:// or https:// and name a host, without a user, a space or "
                f"a port above 65535, with url (={url!r}). Percent-encode what is not ASCII; a secret goes into "
                "token_variable."
            )
        if not (timeout > 0 and batch_size >= 1 and retries >= 0 and backoff >= 0):
            raise ValueError(
                "timeout must be > 0, batch_size ≥ 1, retries ≥ 0 and backoff ≥ 0, with "
                f"timeout (={timeout}), batch_size (={batch_size}), retries (={retries}), backoff (={backoff})."
            )
        if token_variable is not None and not os.environ.get(token_variable):
            raise ValueError(
                f"token_variable must name an environment variable that is set, with token_variable "
                f"(={token_variable!r}). Export the server's token there."
            )
        self.url, self.timeout, self.batch_size, self.retries, self.backoff = url, timeout, batch_size, retries, backoff
        self._token_variable = token_variable
        self.identity = None if version is None else json.dumps({"http": url, "version": version})
        """None without a version: what stands behind a URL can change."""

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            rows = {"prompts": prompts, "completions": completions, **columns}
            try:
                body = json.dumps({name: list(values[part]) for name, values in rows.items()}).encode()
            except TypeError as error:
                raise ValueError(f"columns must be JSON values to be sent to {self.url}: {error}.") from None
            scores += self._ask(body, len(prompts[part]))
        return scores

    def _ask(self, body: bytes, count: int) -> list[float]:
        """One batch, tried again while failures may pass."""
        for attempt in range(self.retries + 1):
            try:
                return self._scores(_within(self.timeout, lambda: self._post(body)), count)
            except _Passing as error:
                if attempt == self.retries:
                    raise ValueError(
                        f"the reward model at {self.url} must answer, with attempts (={attempt + 1}), last: {error}. "
                        "Is the server up? Raise timeout or retries if it is only slow."
                    ) from error
                time.sleep(self.backoff * 2**attempt)
        raise AssertionError("unreachable")

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._token_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(self._token_variable, '')}"
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        try:
            with _opener.open(request, timeout=self.timeout) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            with error:
                excerpt = error.read(_EXCERPT * 4).decode("utf-8", "replace")[:_EXCERPT]
            problem = f"status {error.code} with body {excerpt!r}"
            if error.code >= 500 or error.code == 429:
                raise _Passing(problem) from error
            raise ValueError(f"the reward model at {self.url} must accept the request, with {problem}.") from error
        except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out, cut short
            reason = getattr(error, "reason", error)
            raise _Passing(f"no answer within {self.timeout} s ({type(reason).__name__}: {reason})") from error

    def _scores(self, answer: bytes, count: int) -> list[float]:
        excerpt = answer[: _EXCERPT * 4].decode("utf-8", "replace")[:_EXCERPT]
        try:
            scores = json.loads(answer)["scores"]
        except (ValueError, KeyError, TypeError):
            scores = None
        if not isinstance(scores, list) or not all(type(score) in (int, float) for score in scores):
            raise ValueError(
                f'the reward model at {self.url} must answer {{"scores": [numbers]}}, with body (={excerpt!r}). '
                "Mend the server."
            )
        if len(scores) != count or not all(abs(score) <= sys.float_info.max for score in scores):
            raise ValueError(
                f"the reward model at {self.url} must answer one finite score a text, with scores (={len(scores)}) "
                f"for texts (={count}) and body (={excerpt!r})."
            )
        return [float(score) for score in scores]


def _is_url(url: str) -> bool:
    """Whether a request to it can be made at all."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = (parts.hostname or "").encode("idna")  # where a name or the port is impossible: ValueError
        right = parts.scheme in ("http", "https") and host and parts.port != 0 and parts.username is None
        return bool(right) and url.isascii() and url.isprintable() and " " not in url
    except ValueError:
        return False


def _within(seconds: float, work: Callable[[], bytes]) -> bytes:
    """What ``work()`` returns or raises. A socket's own time-out is for each read: a server that answers a byte now and
    then would hold the caller for ever, so the work is left to a thread, which ends with its connection."""
    done: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put(work())
        except Exception as error:
            done.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        result = done.get(timeout=seconds)
    except queue.Empty:
        raise _Passing(f"no answer within {seconds} s") from None
    if isinstance(result, Exception):
        raise result
    return result


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would turn the POST into a GET, and carry the token elsewhere."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)
