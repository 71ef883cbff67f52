"""Ctrl-C and SIGTERM that wait for the end of a step, so that the saved state can be resumed."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and what a scheduler like Slurm sends some time before it kills."""


@contextlib.contextmanager
def deferred_interrupt(*, active: bool = True) -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM sets the event, to be checked at the end of each step; a second one acts at once.

    Outside the main thread, where signals cannot be handled, or if not ``active``, the event stays unset.
    """
    event = threading.Event()
    if not active or threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: Any) -> None:
        event.set()
        restore()

    for number in SIGNALS:
        signal.signal(number, on_signal)
    try:
        yield event
    finally:
        restore()
