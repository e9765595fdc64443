"""Ctrl-C and SIGTERM, as clusters send it, taken for a request to stop."""

from __future__ import annotations

import os
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Notes the first of such signals; a second one ends the process at once.

    ``close`` puts back what handled them before.

    Attributes:
        received: the signal, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        text = f"\n{self.received.name}: ending after this step; a second one ends at once\n"
        os.write(2, text.encode())  # print could be what was interrupted

    def close(self) -> None:
        """Handle the signals as before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
