"""Ctrl-C and SIGTERM while a run goes on: it stops where nothing is half done, and saves."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Interrupted(KeyboardInterrupt):
    """A signal has stopped the run.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class StopSignals:
    """Inside the `with` block, a signal asks the run to stop instead of ending the process.

    A second Ctrl-C ends it at once. Signals that the process ignores (`nohup`) stay ignored.

    Args:
        immediate: Whether `at_once` may raise. It may not where other processes would wait for
            this one.
    """

    def __init__(self, immediate: bool) -> None:
        self.immediate = immediate
        self.requested: int | None = None
        self._at_once = False
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # Python lets only the main thread handle signals.
        if threading.current_thread() is threading.main_thread():
            # Windows has no SIGHUP.
            for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._earlier[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # A job scheduler may well send SIGTERM twice; only a person insists.
        insists = self.requested is not None and number == signal.SIGINT
        self.requested = number
        if self._at_once or insists:
            self._at_once = False
            raise Interrupted(number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise `Interrupted` for a signal, now or inside the `with` block.

        Elsewhere a signal only sets `requested`.
        """
        self._at_once = self.immediate
        try:
            if self.immediate and self.requested is not None:
                raise Interrupted(self.requested)
            yield
        finally:
            self._at_once = False
