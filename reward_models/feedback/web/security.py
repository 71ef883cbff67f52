"""Who may use the page: tokens, sessions, limits, and headers that keep other sites and scripts out.

A token in the address is exchanged for a cookie that scripts cannot read and other sites cannot send. Each change also
carries a token of the session in a header, which another site cannot know or set.
"""

import hashlib
import hmac
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from reward_models.feedback.answers import Refused
from reward_models.feedback.project import Project

Role = Literal["annotator", "owner"]

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}
"""Sent with every answer: no script or style of a page's own text runs, and no other site can frame or read it."""

SESSION_SECONDS = 30 * 86_400
"""How long a cookie is good."""
WRONG_TOKENS = 10
"""Wrong tokens from one address in a minute, after which it must wait."""
REQUESTS = 120
"""Requests of one session in ten seconds."""


class Session(NamedTuple):
    """A browser that gave a right token."""

    hash: str
    """Names it in the project file, which does not hold the cookie itself."""
    role: Role
    annotator: int | None
    name: str
    csrf: str


class Gate:
    """Lets browsers in."""

    def __init__(self, project: Project, tokens: Mapping[Role, str], *, clock: Callable[[], float] = time.time) -> None:
        self.project, self.tokens, self.clock = project, tokens, clock
        self._wrong, self._asked = Limit(WRONG_TOKENS, 60.0, clock), Limit(REQUESTS, 10.0, clock)

    def enter(self, token: str, address: str) -> str:
        """A cookie for a right token.

        Raises:
            Refused: 403 for a wrong token, 429 after too many of them.
        """
        self._wrong.check(address, "wrong tokens")
        role: Role | None = None
        for name, own in self.tokens.items():  # all are compared, so that the time tells nothing
            if hmac.compare_digest(token.encode(), own.encode()):
                role = name
        if role is None:
            self._wrong.add(address)
            raise Refused(403, "the token in the address is wrong. Ask for the link that the server printed.")
        cookie = secrets.token_urlsafe(32)
        with self.project.write() as database:
            values = (_hash(cookie), role, self.clock())
            database.execute("INSERT INTO sessions (hash, role, annotator, created) VALUES (?, ?, NULL, ?)", values)
        return cookie

    def session(self, cookie: str | None) -> Session:
        """The session of a cookie.

        Raises:
            Refused: 401 without one, 429 after too many requests.
        """
        found = self.project.rows(
            "SELECT role, annotator, name FROM sessions LEFT JOIN annotators ON annotators.id = annotator "
            "WHERE hash = ? AND sessions.created > ?",
            _hash(cookie or ""),
            self.clock() - SESSION_SECONDS,
        )
        if not cookie or not found:
            raise Refused(401, "this page needs a link with a token. Open the one that the server printed.")
        name = _hash(cookie)
        self._asked.check(name, "requests")
        self._asked.add(name)
        (row,) = found
        return Session(name, row["role"], row["annotator"], row["name"] or "", _csrf(cookie))

    def check_change(self, session: Session, headers: Mapping[str, str]) -> None:
        """Refuse a change that does not come from our own page.

        Raises:
            Refused: 403 from another site or without the session's token, 415 for anything but JSON.
        """
        if headers.get("sec-fetch-site", "same-origin") != "same-origin":
            raise Refused(403, "changes must come from this page, got a request from another site.")
        if not hmac.compare_digest(headers.get("x-csrf-token", "").encode(), session.csrf.encode()):
            raise Refused(403, "changes must carry the page's token. Load the page again.")
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise Refused(415, "changes must be JSON.")


class Limit:
    """At most so many events of a name within some seconds. Threads may share it."""

    def __init__(self, count: int, seconds: float, clock: Callable[[], float]) -> None:
        self.count, self.seconds, self.clock = count, seconds, clock
        self._events: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    def check(self, name: str, what: str) -> None:
        """Refuse (429) once there were too many."""
        with self._lock:
            events = self._events.get(name, deque())
            while events and events[0] <= self.clock() - self.seconds:
                events.popleft()
            many = len(events) >= self.count
        if many:
            raise Refused(429, f"too many {what} in {self.seconds:g} seconds. Wait a moment.")

    def add(self, name: str) -> None:
        """Count an event."""
        with self._lock:
            if len(self._events) > 10_000:  # names that are quiet are forgotten
                now = self.clock()
                self._events = {own: e for own, e in self._events.items() if e and e[-1] > now - self.seconds}
            self._events.setdefault(name, deque()).append(self.clock())


def _hash(cookie: str) -> str:
    return hashlib.sha256(cookie.encode()).hexdigest()


def _csrf(cookie: str) -> str:
    return hmac.new(cookie.encode(), b"csrf", hashlib.sha256).hexdigest()
