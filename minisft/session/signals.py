"""SIGTERM, SIGINT and SIGHUP: when they stop a run. Standard library only."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Preempted(BaseException):
    """A signal stopped the run; no completed step is lost. Exit code 75.

    Not a subclass of Exception, like KeyboardInterrupt: `except Exception` must not catch it.
    """


@dataclass
class Stop:
    """What a signal does: raise Preempted immediately, or inside `held` only be noted."""

    where: str  # completes the message "stopped ..."
    name: str = ""  # of the signal received
    _held: bool = False

    def raise_if_asked(self) -> None:
        """Raises Preempted if a signal came, even if some library swallowed its exception."""
        if self.name:
            raise Preempted(f"{self.name}: stopped {self.where}")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, a signal is only noted, so that the current operation completes."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """A section inside `held` that a signal aborts; execution continues after the section."""
        self._held = False
        try:
            yield
        except Preempted:
            pass
        finally:
            self._held = True

    def arrived(self, number: int, _frame: object) -> None:
        """The handler: note the signal, and raise Preempted unless held."""
        for n in SIGNALS:
            if signal.getsignal(n) == self.arrived:
                signal.signal(n, signal.SIG_DFL)
        self.name = name = signal.Signals(number).name
        # Not print: the signal may arrive inside a print, and streams are not reentrant.
        with suppress(OSError):
            when = "after this step" if self._held else "now"
            os.write(2, f"{name}: stopping {when} (a second signal stops at once)\n".encode())
        if not self._held:
            self.raise_if_asked()


@contextmanager
def stop_signals(where: str) -> Iterator[Stop]:
    """Handle SIGTERM, SIGINT and SIGHUP inside with the Stop that is yielded.

    A second signal has its default action: it ends the process at once. A signal that is ignored
    (SIGHUP under nohup) stays ignored. Outside the main thread nothing is installed, because Python
    accepts no handlers there.
    """
    stop = Stop(where)
    previous = {}
    with suppress(ValueError):  # not the main thread
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, stop.arrived)
    try:
        yield stop
    finally:
        for number, old in previous.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
