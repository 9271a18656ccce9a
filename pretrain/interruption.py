"""Signals that save a run or end it: noted at once, agreed between ranks where all of them are at the same point."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from celo2.pretrain.parallel import World

HELP = """signals: SIGTERM, SIGUSR1 and Ctrl-C (SIGINT) save and stop, and stop at once while meta-training
compiles; a second Ctrl-C, and SIGTERM again after a second, leave at once; SIGHUP (a closed terminal)
saves and goes on, but under torchrun, which then ends its processes, saves and stops"""
# seconds in which a SIGTERM that comes again is the same one: a launcher passes it on to processes that have it already
TWICE = 1.0


class Stop(KeyboardInterrupt):
    """A signal to stop for that came where there was nothing to save."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


class Interruption:
    """SIGTERM, SIGUSR1 and SIGINT of any rank: save, then stop. SIGHUP (where nohup does not ignore it): save, go on.

    A handler only takes note. `poll` and `settle` are collective, and so is what brings `flags` to all ranks for
    `agree`: afterwards `signal` and `hangup` are the same on every rank, so all of them do the same. SIGINT after
    another signal, and SIGTERM more than a second after one, leave at once with 128 + the signal, whatever the process
    is doing: files are whole or as they were. Under torchrun SIGHUP stops as SIGTERM does, since torchrun passes it on
    when it has it itself, and then kills its ranks. Within `at_once` a signal to stop for raises `Stop`.
    """

    STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    SIGNALS = (*STOPS, signal.SIGHUP)

    def __init__(self, world: World) -> None:
        self.signal = 0
        """The signal to stop for that was agreed on, 0 for none."""
        self.hangup = False
        """Whether `agree` or `settle` has just found that a rank had a SIGHUP."""
        self._world = world
        self._noted, self._since, self._hangup = 0, 0.0, False
        self._before_stop: Callable[[], None] | None = None
        self._stops = {*self.STOPS}
        handled = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT").split(",")
        if "TORCHELASTIC_RUN_ID" in os.environ and "SIGHUP" in handled:
            self._stops.add(signal.SIGHUP)
        for number in self.SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    @contextmanager
    def at_once(self, before: Callable[[], None]) -> Iterator[None]:
        """Within it there is nothing to save, and the program is long at one place: a signal to stop for ends that.

        It calls `before` and raises Stop, in the process that the signal is of; nothing is agreed on. A signal that was
        noted before, or whose Stop was swallowed, raises at the context's beginning or end.
        """
        self._before_stop = before
        try:
            self._raise_noted()
            yield
            self._raise_noted()
        finally:
            self._before_stop = None

    def _raise_noted(self) -> None:
        if self._noted:
            raise Stop(self._noted)

    def poll(self) -> bool:
        """Ask all ranks; return whether one has received a signal to stop for."""
        self.signal = self._world.all_reduce_max(self._noted)
        return self.signal != 0

    def settle(self) -> bool:
        """Between steps: agree on everything; return whether to stop."""
        self.agree(self._world.all_reduce_sum(*self.flags()))
        return self.signal != 0

    def flags(self) -> list[float]:
        """A 1 for each signal that this rank has received, among SIGNALS: to travel with other numbers to `agree`."""
        flags = [float(number == self._noted) for number in self.SIGNALS]
        if self._hangup:
            self._hangup, flags[-1] = False, 1.0
        return flags

    def agree(self, counts: list[float]) -> None:
        """Take what all ranks' flags add up to, or their mean."""
        seen = [number for number, count in zip(self.SIGNALS, counts, strict=True) if count]
        self.signal = next((number for number in seen if number in self._stops), 0)
        self.hangup = signal.SIGHUP in seen

    @property
    def name(self) -> str:
        return signal.Signals(self.signal).name if self.signal else "none"

    def _note(self, number: int, frame: object) -> None:
        if number not in self._stops:
            self._hangup = True
        elif not self._noted:
            self._noted, self._since = number, time.monotonic()
            # the next one ends even what does not come back to the interpreter; said when it is so
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if self._before_stop is not None:
                self._before_stop()
                raise Stop(number)
            if number == signal.SIGINT and self._world.main:
                _tell("SIGINT: saves and stops after this step; a second one leaves at once\n")
        elif number == signal.SIGTERM and self._noted != signal.SIGUSR1 and time.monotonic() - self._since > TWICE:
            _tell("SIGTERM again: leaves at once; checkpoints are as they were\n")
            os._exit(128 + number)


def _tell(text: str) -> None:
    """Write to standard error from within a handler, which may have interrupted a write."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


@contextmanager
def signals_restored() -> Iterator[None]:
    """Give signals the handlers back that they had before."""
    handlers = {number: signal.getsignal(number) for number in Interruption.SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
