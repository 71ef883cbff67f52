"""The Hugging Face hub out of reach: the local cache answers at once, instead of an error after a minute of retries."""

import logging
import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants

from textenv.data.records import looks_like_path

_log = logging.getLogger(__name__)

_TIMEOUT = 2.0
"""Seconds that each address of the hub (there are about eight) has to take a connection."""


@contextmanager
def hub_or_cache(name: str | Path) -> Iterator[str]:
    """Read ``name`` inside. If it is no path and the hub takes no connection, the block is in the hub's offline mode.

    Yields:
        Why the hub was not asked, as a sentence for an error to end with; empty when it may be asked.
    """
    problem = None if looks_like_path(str(name)) or Path(name).exists() else _problem()
    if problem is None:
        yield ""
        return
    _log.warning("%s: looking for %r among cached files.", problem, str(name))
    switches: list[Any] = [constants, *([sys.modules["datasets.config"]] if "datasets.config" in sys.modules else [])]
    before = [module.HF_HUB_OFFLINE for module in switches]
    for module in switches:
        module.HF_HUB_OFFLINE = True
    try:
        yield f" {problem}: only cached files were looked at."
    finally:
        for module, value in zip(switches, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _problem() -> str | None:
    """Why the hub cannot be reached; None when it can, when a proxy stands between, or offline mode is on anyway."""
    hub = urlsplit(constants.ENDPOINT)
    proxies = urllib.request.getproxies()
    if constants.HF_HUB_OFFLINE or proxies.get(hub.scheme) or proxies.get("all"):
        return None
    try:
        socket.create_connection((hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)), _TIMEOUT).close()
    except OSError as error:
        return f"The hub ({constants.ENDPOINT}) cannot be reached ({error})"
    return None
