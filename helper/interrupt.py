"""Signals that end a run: it ends its step, saves, and exits with a code that asks to be started again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from helper.ranks import ranks

EXIT = 75  # EX_TEMPFAIL of sysexits.h: try again
IN_USE = 73  # EX_CANTCREAT: another process holds the run's folder
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")  # schedulers warn by the last two; Windows has two


class Interrupted(BaseException):
    """A signal asked the process to end; not an Exception, so that no handler takes it for a damaged file."""


class Interrupt:
    """The signal that has arrived. Inside `deferred()` the first one is only noted; otherwise, or a second time, it
    ends the process at once."""

    def __init__(self) -> None:
        self.signal, self._deferred = "", False
        self._handlers: dict[int, Any] = {}

    def listen(self) -> None:
        """Handle signals from now until forget()."""
        self.signal, self._deferred = "", False
        if threading.current_thread() is threading.main_thread():  # only this one may
            for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks for
                    self._handlers.setdefault(number, signal.signal(number, self._handle))

    def forget(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _handle(self, number: int, frame: object) -> None:
        again, self.signal = bool(self.signal), signal.Signals(number).name
        if not self._deferred or (again and ranks.world == 1):  # torchrun forwards what a scheduler may send to all
            raise Interrupted(self.signal)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals wait for the next check()."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self) -> None:
        """Raise Interrupted if a signal has arrived, in any process of the run."""
        if ranks.any(bool(self.signal)):
            raise Interrupted(self.signal or "a signal to another process")


interrupt = Interrupt()
