"""When the Hugging Face hub is unreachable, the local cache answers at once instead of after a minute of retries."""

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
"""Seconds to connect to each address of the hub (there are about eight)."""


@contextmanager
def hub_or_cache(name: str | Path) -> Iterator[str]:
    """A block in which to load ``name``: in offline mode if it is not a path and the hub is unreachable.

    Yields:
        Why the hub was not asked, as the last sentence of an error; empty if it may be asked.
    """
    problem = None if looks_like_path(str(name)) or Path(name).exists() else why_unreachable()
    if problem is None:
        yield ""
        return
    _log.warning("%s: looking for %r among cached files.", problem, str(name))
    switches: list[Any] = [constants, *([sys.modules["datasets.config"]] if "datasets.config" in sys.modules else [])]
    before = [module.HF_HUB_OFFLINE for module in switches]
    for module in switches:
        module.HF_HUB_OFFLINE = True
    try:
        yield f" {problem}: only cached files were searched. Name a folder on this machine instead."
    finally:
        for module, value in zip(switches, before, strict=True):
            module.HF_HUB_OFFLINE = value


def why_unreachable() -> str | None:
    """Why the hub is unreachable; None if it is reachable, behind a proxy, or if offline mode is already on."""
    hub = urlsplit(constants.ENDPOINT)
    proxies = urllib.request.getproxies()
    if constants.HF_HUB_OFFLINE or proxies.get(hub.scheme) or proxies.get("all"):
        return None
    try:
        socket.create_connection((hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)), _TIMEOUT).close()
    except OSError as error:
        return f"The hub ({constants.ENDPOINT}) cannot be reached ({error})"
    return None
