"""Signals that end a run: noted at once, agreed between ranks where all of them are at the same point."""

import signal

from celo2.pretrain.parallel import World


class Interruption:
    """SIGTERM, SIGUSR1, SIGINT and SIGHUP (where nohup does not ignore it) of any rank: save, then stop.

    A handler only takes note. `poll` is collective, and so is what brings `flags` to all ranks for `agree`: afterwards
    `signal` is the same on every rank, so all of them leave the same loop. A second SIGINT of the same process raises
    KeyboardInterrupt.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

    def __init__(self, world: World) -> None:
        self.signal = 0
        """The signal that was agreed on, 0 for none."""
        self._world = world
        self._noted = 0
        for number in self.SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def poll(self) -> bool:
        """Ask all ranks; return whether one has received a signal."""
        self.signal = self._world.largest(self._noted)
        return self.signal != 0

    def flags(self) -> list[float]:
        """A 1 for the signal that this rank has received, among SIGNALS: to travel with other numbers."""
        return [float(number == self._noted) for number in self.SIGNALS]

    def agree(self, counts: list[float]) -> None:
        """Take what all ranks' flags add up to, or their mean."""
        self.signal = next((number for number, count in zip(self.SIGNALS, counts, strict=True) if count), 0)

    @property
    def name(self) -> str:
        return signal.Signals(self.signal).name if self.signal else "none"

    def _note(self, number: int, frame: object) -> None:
        if self._noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._noted = number
