"""Serving a project to browsers: one server per file, on this machine unless told otherwise."""

import os
import secrets
import socket
import threading

import uvicorn

from reward_models.feedback.web.app import App, build_app
from reward_models.feedback.web.security import Role

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def tokens_from(variable: str | None, host: str) -> dict[Role, str]:
    """The annotators' and the owner's token: made up, or for annotators what an environment variable holds.

    Raises:
        ValueError: other machines could reach the host and no token was chosen, or the variable is not set.
    """
    if variable is None and host not in LOOPBACK:
        raise ValueError(
            f"a page that other machines can reach must have a token that you chose, got host {host!r} and none. "
            "Everyone with the token can read the prompts and answer, and without TLS everyone on the way can read it: "
            "put a proxy with TLS in front, export a long random token, and name it with --token-variable."
        )
    chosen = secrets.token_urlsafe() if variable is None else os.environ.get(variable, "")
    if len(chosen) < 16:
        raise ValueError(
            f"token_variable must name an environment variable with 16 characters or more, got {variable!r} with "
            f"{len(chosen)}. Export a long random token there."
        )
    return {"annotator": chosen, "owner": secrets.token_urlsafe()}


class Server:
    """Serves an :class:`App` in a thread of its own, or in this one with :meth:`run`."""

    def __init__(self, app: App, *, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen at once; port 0 takes a free one.

        Raises:
            ValueError: it cannot listen there.
        """
        self.app = app
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # With the protocol named, asyncio sends small answers at once; else each waits 40 ms for an acknowledgement.
        self._socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
            self._socket.listen(128)
        except (OSError, OverflowError) as error:
            self._socket.close()
            raise ValueError(
                f"a server must be able to listen at its address, got host {host!r} and port {port}: {error}. Use an "
                "address of this machine and a free port (0 finds one)."
            ) from error
        bound = self._socket.getsockname()[1]
        self.url = f"http://[{host}]:{bound}/" if ":" in host else f"http://{host}:{bound}/"
        hosts = [*LOOPBACK, "[::1]"] if host in LOOPBACK else ["*"]
        config = uvicorn.Config(
            build_app(app, hosts=hosts), log_level="error", access_log=False, server_header=False, lifespan="off",
            timeout_graceful_shutdown=3,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def link(self, role: Role, path: str = "") -> str:
        """The address to open in a browser."""
        return f"{self.url}{path}?token={self.app.gate.tokens[role]}"

    def run(self) -> None:
        """Serve until Ctrl-C."""
        self._server.run(sockets=[self._socket])

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()
