"""A reward model in another process or on another machine, called over HTTP.

POST {"prompts": […], "completions": […], <column>: […]}  →  {"scores": […]}
"""

import functools
import json
import os
import sys
import threading
import urllib.parse
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, final

import httpx2
import tenacity

from textenv.settings import Count, NonNegative, Positive, PositiveInt, check_value

_EXCERPT = 200
"""Characters of an answer that an error quotes."""


@final
class HTTPRewardModel:
    """Scores by POSTing batches to a URL; all columns go along, so they must be JSON.

    A timeout, a broken connection and a status of 5xx or 429 are transient: the request is retried up to ``retries``
    times, after ``backoff · 2^k`` seconds. Anything else is an error at once. Redirects are not followed: they would
    lose the texts and send the token elsewhere.
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
        """Check the settings; nothing is sent yet.

        Args:
            url: where to POST.
            timeout: seconds from the start of a request to the end of its answer.
            batch_size: texts per request.
            retries: further attempts after a transient error.
            backoff: seconds before the first retry; doubled each time.
            token_variable: environment variable with a bearer token, so that no secret enters a spec.
            version: tells one model behind the URL from the next, for caches.

        Raises:
            ValueError: the URL is not http(s) or cannot be valid, or a number is out of range.
        """
        if not _is_url(url):
            raise ValueError(
                "url must start with http:// or https:// and name a host, without a user, a space or a port above "
                f"65535, got {url!r}. Percent-encode what is not ASCII; put a secret into token_variable."
            )
        check_value("timeout", timeout, Positive)
        check_value("batch_size", batch_size, PositiveInt)
        check_value("retries", retries, Count)
        check_value("backoff", backoff, NonNegative)
        if token_variable is not None and not os.environ.get(token_variable):
            rule = "token_variable must name an environment variable that is set"
            raise ValueError(f"{rule}, got {token_variable!r}. Export the server's token there.")
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
                raise ValueError(
                    f"columns must be JSON values to be sent to {self.url}, got another type: {error}. Leave the "
                    "column out of the prompts' records, or convert it."
                ) from None
            scores += self._scores(self._ask(body), len(prompts[part]))
        return scores

    def _ask(self, body: bytes) -> bytes:
        """The answer to one batch, retried while errors are transient."""
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_transient),
            stop=tenacity.stop_after_attempt(self.retries + 1),
            wait=tenacity.wait_exponential(multiplier=self.backoff),
            reraise=True,
        )
        try:
            return attempts(_within, self.timeout, lambda: self._post(body))
        except (httpx2.HTTPError, TimeoutError) as error:
            rule, found = "accept the request", self._described(error)
            remedy = "Check the URL, the token and the server's log."
            if _is_transient(error):
                rule, found = "answer", f"{found} in the last of {self.retries + 1} attempts"
                remedy = "Is the server up? Raise timeout or retries if it is only slow."
            raise ValueError(f"the reward model at {self.url} must {rule}, got {found}. {remedy}") from error

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._token_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(self._token_variable, '')}"
        answer = _client(os.getpid()).post(self.url, content=body, headers=headers, timeout=self.timeout)
        return answer.raise_for_status().content

    def _described(self, error: Exception) -> str:
        if isinstance(error, httpx2.HTTPStatusError):
            return f"status {error.response.status_code} with body {_excerpt(error.response.content)!r}"
        if isinstance(error, httpx2.TimeoutException | TimeoutError):
            return f"no answer within {self.timeout} s"
        return f"{type(error).__name__}: {error}"

    def _scores(self, answer: bytes, count: int) -> list[float]:
        try:
            scores = json.loads(answer)["scores"]
        except (ValueError, KeyError, TypeError):
            scores = None
        rule, found = f"the reward model at {self.url} must answer", f"{_excerpt(answer)!r}. Fix the server."
        if not isinstance(scores, list) or not all(type(score) in (int, float) for score in scores):
            raise ValueError(f'{rule} {{"scores": [numbers]}}, got {found}')
        if len(scores) != count or not all(abs(score) <= sys.float_info.max for score in scores):
            raise ValueError(f"{rule} one finite score per text, got {len(scores)} scores for {count} texts: {found}")
        return [float(score) for score in scores]


@functools.cache
def _client(process: int) -> httpx2.Client:
    """The connections of this process, shared by its threads; a fork must not use those of its parent."""
    return httpx2.Client(limits=httpx2.Limits(max_connections=None))


def _is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, httpx2.HTTPStatusError):
        return error.response.status_code >= 500 or error.response.status_code == 429
    return isinstance(error, httpx2.TransportError | TimeoutError)


def _within(seconds: float, work: Callable[[], bytes]) -> bytes:
    """Return or raise what ``work()`` does, or raise TimeoutError.

    The client's own timeout holds for each read: a server that sends a byte now and then would hold the caller for
    ever. So the work is left to a thread, which ends with its connection.
    """
    result: Future[bytes] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result(timeout=seconds)


def _excerpt(answer: bytes) -> str:
    return answer[: _EXCERPT * 4].decode("utf-8", "replace")[:_EXCERPT]


def _is_url(url: str) -> bool:
    """Whether a request to it can be made at all."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = (parts.hostname or "").encode("idna")  # ValueError for an impossible name or port
        valid = parts.scheme in ("http", "https") and host and parts.port != 0 and parts.username is None
        return bool(valid) and url.isascii() and url.isprintable() and " " not in url
    except ValueError:
        return False
