"""Ctrl-C and SIGTERM, as clusters send it, taken for a request to stop."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

ECHO_SECONDS = 3.0
"""Within this time a further signal is the first one: launchers pass on what all processes got."""


class StopRequest:
    """Notes the first of such signals; a second one ends the process at once.

    ``close`` puts back what handled them before.

    Attributes:
        received: the signal, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._time = 0.0
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._time = signal.Signals(number), time.monotonic()
            text = f"\n{self.received.name}: ending after this step; a second one ends at once\n"
            os.write(2, text.encode())  # print could be what was interrupted
        elif time.monotonic() - self._time > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def close(self) -> None:
        """Handle the signals as before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
