"""SIGTERM and SIGINT: a run in training ends its step, saves, and exits with a code that asks to be started again."""

from __future__ import annotations

import signal
import threading

EXIT = 75  # EX_TEMPFAIL of sysexits.h: try again


class Interrupted(BaseException):
    """A signal asked the process to end; no handler of damaged files may take it for damage."""


class Interrupt:
    """What signals have asked. While `deferred`, the first is only noted; else, or a second time, it ends the run."""

    def __init__(self):
        self.signal, self.deferred, self.before = "", False, {}

    def listen(self) -> None:
        """From now until forget()."""
        self.signal, self.deferred = "", False
        if threading.current_thread() is threading.main_thread():  # others may not
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before.setdefault(number, signal.signal(number, self._hear))

    def forget(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _hear(self, number: int, frame: object) -> None:
        again, self.signal = bool(self.signal), signal.Signals(number).name
        if again or not self.deferred:
            raise Interrupted(self.signal)

    def check(self) -> None:
        """Raises Interrupted if a signal has been noted."""
        if self.signal:
            raise Interrupted(self.signal)


interrupt = Interrupt()
