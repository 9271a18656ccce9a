"""Signals that end a run: noted at once, agreed between ranks where all of them are at the same point."""

import signal

from celo2.pretrain.parallel import World


class Interruption:
    """SIGTERM, SIGUSR1, SIGINT and SIGHUP (where nohup does not ignore it) of any rank: save, then stop.

    A handler only takes note. `poll` is collective: afterwards `signal` is the same on every rank, so all of them
    leave the same loop. A second SIGINT of the same process raises KeyboardInterrupt.
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

    @property
    def name(self) -> str:
        return signal.Signals(self.signal).name if self.signal else "none"

    def _note(self, number: int, frame: object) -> None:
        if self._noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._noted = number
