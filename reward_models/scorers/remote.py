"""A reward model in another process or on another machine, called over HTTP.

POST {"prompts": […], "completions": […], <column>: […]}  →  {"scores": […]}
"""

import json
import sys
from typing import Any, final

from textenv.data.http import Endpoint, excerpt
from textenv.settings import PositiveInt, check_value


@final
class HTTPRewardModel:
    """Scores by POSTing batches to a URL; all columns go along, so they must be JSON.

    What is retried and what is an error at once: :class:`textenv.data.http.Endpoint`.
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
        check_value("batch_size", batch_size, PositiveInt)
        how = {"timeout": timeout, "retries": retries, "backoff": backoff, "token_variable": token_variable}
        self._endpoint = Endpoint(url, called="the reward model", **how)
        self.url, self.batch_size = url, batch_size
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
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
            scores += self._scores(self._endpoint.post(body), len(prompts[part]))
        return scores

    def _scores(self, answer: bytes, count: int) -> list[float]:
        try:
            scores = json.loads(answer)["scores"]
        except (ValueError, KeyError, TypeError):
            scores = None
        rule, found = f"the reward model at {self.url} must answer", f"{excerpt(answer)!r}. Fix the server."
        if not isinstance(scores, list) or not all(type(score) in (int, float) for score in scores):
            raise ValueError(f'{rule} {{"scores": [numbers]}}, got {found}')
        if len(scores) != count or not all(abs(score) <= sys.float_info.max for score in scores):
            raise ValueError(f"{rule} one finite score per text, got {len(scores)} scores for {count} texts: {found}")
        return [float(score) for score in scores]
