"""The model hub, when it cannot be reached: an answer within seconds, from the local cache or as an error."""

import functools
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 5.0
"""Seconds to wait for a connection."""


@contextmanager
def quick_hub(name: str | Path) -> Iterator[None]:
    """Inside, a hub id is looked up in the local cache alone where the hub does not answer.

    The libraries would ask again and again: a minute and a half for a model, with every file tried five times. A folder
    asks nobody.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not (Path(name).exists() or _answers())
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@functools.cache
def _answers() -> bool:
    """Whether a connection to the hub can be made; taken for granted behind a proxy, which alone can tell."""
    from huggingface_hub import constants

    if urllib.request.getproxies():
        return True
    endpoint = urllib.parse.urlsplit(constants.ENDPOINT)
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=PATIENCE).close()
    except OSError:
        return False
    return True
