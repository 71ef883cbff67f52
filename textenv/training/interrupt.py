"""Ctrl-C that waits for the end of a step, so that the saved state can be resumed."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def deferred_interrupt(*, active: bool = True) -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, to be checked at the end of each step; a second one acts at once.

    Outside the main thread, where signals cannot be handled, or if not ``active``, the event stays unset.
    """
    event = threading.Event()
    if not active or threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def on_interrupt(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
