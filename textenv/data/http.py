"""Requests to an HTTP server that may be slow, busy or gone for a moment."""

import functools
import os
import threading
import urllib.parse
from collections.abc import Callable
from concurrent.futures import Future
from typing import final

import httpx2
import tenacity

from textenv.settings import Count, NonNegative, Positive, check_value

_EXCERPT = 200
"""Characters of an answer that an error quotes."""


@final
class Endpoint:
    """A URL to POST to.

    A timeout, a broken connection and a status of 5xx or 429 are transient: the request is retried up to ``retries``
    times, after ``backoff · 2^k`` seconds. Anything else is an error at once. Redirects are not followed: they would
    lose the body and send the token elsewhere.
    """

    def __init__(
        self,
        url: str,
        *,
        called: str,
        timeout: float,
        retries: int = 4,
        backoff: float = 0.5,
        token_variable: str | None = None,
    ) -> None:
        """Check the settings; nothing is sent yet.

        Args:
            url: where to POST.
            called: what stands behind it, for errors.
            timeout: seconds from the start of a request to the end of its answer.
            retries: further attempts after a transient error.
            backoff: seconds before the first retry; doubled each time.
            token_variable: environment variable with a bearer token, so that no secret enters a config.

        Raises:
            ValueError: the URL is not http(s) or cannot be valid, or a number is out of range.
        """
        if not _is_url(url):
            raise ValueError(
                "url must start with http:// or https:// and name a host, without a user, a space or a port above "
                f"65535, got {url!r}. Percent-encode what is not ASCII; put a secret into token_variable."
            )
        check_value("timeout", timeout, Positive)
        check_value("retries", retries, Count)
        check_value("backoff", backoff, NonNegative)
        if token_variable is not None and not os.environ.get(token_variable):
            rule = "token_variable must name an environment variable that is set"
            raise ValueError(f"{rule}, got {token_variable!r}. Export the server's token there.")
        self.url, self.called, self.timeout, self.retries, self.backoff = url, called, timeout, retries, backoff
        self._token_variable = token_variable

    def post(self, body: bytes, path: str = "") -> bytes:
        """The answer to a JSON body sent to ``path`` below the URL.

        Raises:
            ValueError: the server refuses the request, or does not answer in any attempt.
        """
        attempts = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_transient),
            stop=tenacity.stop_after_attempt(self.retries + 1),
            wait=tenacity.wait_exponential(multiplier=self.backoff),
            reraise=True,
        )
        try:
            return attempts(_within, self.timeout, lambda: self._post(body, path))
        except (httpx2.HTTPError, TimeoutError) as error:
            rule, found = "accept the request", self._described(error)
            remedy = "Check the URL, the token and the server's log."
            if _is_transient(error):
                rule, found = "answer", f"{found} in the last of {self.retries + 1} attempts"
                remedy = "Is the server up? Raise timeout or retries if it is only slow."
            raise ValueError(f"{self.called} at {self.url}{path} must {rule}, got {found}. {remedy}") from error

    def _post(self, body: bytes, path: str) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._token_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(self._token_variable, '')}"
        answer = _client(os.getpid()).post(self.url + path, content=body, headers=headers, timeout=self.timeout)
        return answer.raise_for_status().content

    def _described(self, error: Exception) -> str:
        if isinstance(error, httpx2.HTTPStatusError):
            return f"status {error.response.status_code} with body {excerpt(error.response.content)!r}"
        if isinstance(error, httpx2.TimeoutException | TimeoutError):
            return f"no answer within {self.timeout} s"
        return f"{type(error).__name__}: {error}"


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


def excerpt(answer: bytes) -> str:
    """The beginning of an answer, for an error."""
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
