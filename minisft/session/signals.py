"""SIGTERM, SIGINT and SIGHUP: when a run stops, and what it says. Standard library only."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Preempted(BaseException):
    """A signal ended the run, nothing finished being lost: exit code 75.

    No Exception, as KeyboardInterrupt is none: `except Exception` must not take it for a failure.
    """


class Stop:
    """What a signal does: it raises Preempted where it arrives, or waits for the end of `held`.

    name is that of the signal that came, "" before. where completes the message "stopped ...".
    """

    def __init__(self, where: str) -> None:
        self.name = ""
        self.where = where
        self._held = False

    def raise_if_asked(self) -> None:
        """Raises Preempted if a signal came, also one whose exception was swallowed on its way."""
        if self.name:
            raise Preempted(f"{self.name}: stopped {self.where}")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, a signal is only noted: what is under way is finished first."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """A part of `held` that a signal breaks off without ending more than that part."""
        self._held = False
        try:
            yield
        except Preempted:
            pass
        finally:
            self._held = True

    def arrived(self, name: str) -> None:
        """The handler's part: note the signal, and raise it unless it has to wait."""
        self.name = name
        # Not print: the signal may have come inside one, and a stream does not take two at once.
        with suppress(OSError):
            when = "after this step" if self._held else "now"
            os.write(2, f"{name}: stopping {when} (again: at once)\n".encode())
        if not self._held:
            self.raise_if_asked()


@contextmanager
def stop_signals(where: str) -> Iterator[Stop]:
    """Let the signals end what runs inside; a second one acts at once, whatever is under way.

    A signal that is ignored (SIGHUP under nohup) stays ignored. Outside the main thread, where
    Python takes no handlers, nothing is installed.
    """
    stop = Stop(where)
    previous = {}

    def handler(number, frame):
        for n in previous:
            signal.signal(n, signal.SIG_DFL)
        stop.arrived(signal.Signals(number).name)

    with suppress(ValueError):  # not the main thread
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number, old in previous.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
