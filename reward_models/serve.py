"""A reward model as a small HTTP service, for ``scorers.remote.HTTPRewardModel``; standard library only."""

import hmac
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from textenv.protocols import RewardModel
from textenv.scoring import score_texts

MAX_BODY = 64 * 2**20
"""Largest request that is read, bytes."""


class RewardServer(ThreadingHTTPServer):
    """Answers POSTs at any path, one batch at a time; ``with server: server.serve_forever()``.

    Without a ``token`` it listens on this machine only. It speaks plain HTTP: put a proxy with TLS in front of it.
    """

    daemon_threads = True

    def __init__(self, model: RewardModel, *, host: str = "127.0.0.1", port: int = 0, token: str | None = None) -> None:
        """Listen at once; requests are answered from ``serve_forever`` on.

        Args:
            model: what gives the scores.
            host: a name or an address, IPv6 (``::1``) too.
            port: 0 takes a free one.
            token: the bearer token that clients must send; None lets everybody in.

        Raises:
            ValueError: other machines could reach it without a token, or it cannot listen there.
        """
        if token is None and host not in ("127.0.0.1", "::1", "localhost"):
            rule = "a server that other machines can reach must have a token"
            raise ValueError(f"{rule}, got host {host!r} and none. Pass token=, or listen at 127.0.0.1.")
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"a server must be able to listen at its address, got host {host!r} and port {port}: {error}. Use an "
                "address of this machine and a free port (0 finds one)."
            ) from error
        self.model, self.token, self.lock = model, token, threading.Lock()

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://[{host!s}]:{port}/score" if ":" in str(host) else f"http://{host!s}:{port}/score"


class _Handler(BaseHTTPRequestHandler):
    server: Any
    protocol_version = "HTTP/1.1"  # a connection serves many requests
    timeout = 60
    """Seconds that an idle connection is kept open."""

    def do_POST(self) -> None:
        token = self.server.token
        given = self.headers.get("Authorization", "")
        length = self.headers.get("Content-Length", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            self._refuse(401, "the bearer token is missing or wrong")
        elif not length.isdigit() or int(length) > MAX_BODY:
            self._refuse(413, f"Content-Length must be given, up to {MAX_BODY} bytes")
        else:
            body = self.rfile.read(int(length))
            try:
                self._answer(200, {"scores": self._scores(json.loads(body))})
            except json.JSONDecodeError as error:
                self._answer(400, {"error": f"the body must be JSON: {error}"})
            except ValueError as error:
                self._answer(400, {"error": str(error)})
            except (KeyError, TypeError, AttributeError) as error:
                self._answer(400, {"error": f"{type(error).__name__}: {error}"})
            except Exception as error:  # tell the client and go on
                self._answer(500, {"error": f"{type(error).__name__}: {error}"})

    def _scores(self, batch: Any) -> list[float]:
        if not isinstance(batch, dict) or not {"prompts", "completions"} <= batch.keys():
            given = f"the keys {sorted(batch)}" if isinstance(batch, dict) else str(batch)[:60]
            raise ValueError(f"a request must be an object with 'prompts' and 'completions', got {given}. Send both.")
        _check("prompts", batch["prompts"], str | list, "strings or chats")
        _check("completions", batch["completions"], str, "strings")
        prompts, completions = batch.pop("prompts"), batch.pop("completions")
        for name, values in {"completions": completions, **batch}.items():
            if not isinstance(values, list) or len(values) != len(prompts):
                rule = f"{name} must be a list with one value per prompt ({len(prompts)})"
                raise ValueError(f"{rule}, got {str(values)[:60]}. Send them all.")
        with self.server.lock:
            return score_texts(self.server.model, prompts, completions, batch).tolist()

    def _refuse(self, status: int, reason: str) -> None:
        """Answer without reading the body, which would pass for the next request: the connection ends."""
        self.close_connection = True
        self._answer(status, {"error": reason})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a training run makes many requests."""


def _check(name: str, values: Any, kind: Any, what: str) -> None:
    wrong = [value for value in values if not isinstance(value, kind)] if isinstance(values, list) else [values]
    if wrong:
        rule = f"{name} must be a list of {what}"
        raise ValueError(f"{rule}, got {json.dumps(wrong[0])[:60]}. Send one for each text to score.")
