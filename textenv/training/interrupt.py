"""Ctrl-C that waits for the end of a step, so that what is saved is a state that can be resumed."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def deferred_interrupt(*, active: bool = True) -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, which the end of the running step reads; a second one acts at once.

    Outside the main thread, where signals cannot be handled, and with ``active=False``, the event stays unset.
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
