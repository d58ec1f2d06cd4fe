"""Stop a run on SIGTERM, SIGINT or SIGHUP. Imports the standard library only."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Preempted(BaseException):
    """A signal stopped the run (exit code 75). A BaseException: `except Exception` misses it."""


@dataclass
class Stop:
    """Signal handler that raises Preempted immediately or, inside `held`, only stores the name."""

    where: str  # completes the message "stopped ..."
    name: str = ""  # of the signal received
    _held: bool = False

    def raise_if_asked(self) -> None:
        """Raises Preempted if a signal has arrived, even if a library swallowed the first raise."""
        if self.name:
            raise Preempted(f"{self.name}: stopped {self.where}")

    @contextmanager
    def held(self, held: bool = True) -> Iterator[None]:
        """Context in which a signal is only stored, so that the current operation completes."""
        before, self._held = self._held, held
        try:
            yield
        finally:
            self._held = before

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """Context, inside `held`, that a signal aborts; execution continues after the block."""
        with suppress(Preempted), self.held(False):
            yield

    def arrived(self, number: int, _frame: object) -> None:
        """Handle a signal: store its name, restore default actions, raise Preempted unless held."""
        for n in SIGNALS:
            if signal.getsignal(n) == self.arrived:
                signal.signal(n, signal.SIG_DFL)
        self.name = name = signal.Signals(number).name
        # Use os.write: the signal may arrive inside a print, and streams are not reentrant.
        with suppress(OSError):
            when = "after this step" if self._held else "now"
            os.write(2, f"{name}: stopping {when} (a second signal stops at once)\n".encode())
        if not self._held:
            self.raise_if_asked()


@contextmanager
def stop_signals(where: str) -> Iterator[Stop]:
    """Install a Stop as the handler of SIGTERM, SIGINT and SIGHUP; yield the Stop.

    A second signal has its default action, which ends the process immediately. A signal that was
    ignored before (SIGHUP under nohup) stays ignored.
    """
    stop = Stop(where)
    previous = {}
    with suppress(ValueError):  # outside the main thread Python accepts no handlers
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, stop.arrived)
    try:
        yield stop
    finally:
        for number, old in previous.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
