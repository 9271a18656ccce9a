"""What an outer step draws beforehand: perturbations of theta, and the examples of every batch of its window.

Both are functions of the seed and the outer step alone, so that other processes can make them while this one advances
trajectories: they take several times as long as a window is predicted to take the kernel.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from celo2.meta.randomness import Purpose, generator


@dataclass(frozen=True)
class Stream:
    """The order of the batches of a task: shuffled epochs of whole batches, the same for all particles.

    `index` is the task's place in the run.
    """

    size: int
    batch: int
    index: int
    seed: int

    @property
    def batches_per_epoch(self) -> int:
        return self.size // self.batch

    def batches(self, start: int, count: int) -> NDArray[np.int64]:
        """Return the examples [count, B] of batches `start` .. `start + count - 1`."""
        first, skipped = divmod(start, self.batches_per_epoch)
        last = (start + count - 1) // self.batches_per_epoch
        epochs = [_epoch(self, number) for number in range(first, last + 1)]
        return np.concatenate(epochs)[skipped : skipped + count]


# the next window of a large set goes on in the same epoch
@lru_cache(maxsize=32)
def _epoch(stream: Stream, number: int) -> NDArray[np.int64]:
    """Return the examples [batches, B] of an epoch."""
    order = generator(stream.seed, Purpose.DATA_ORDER, stream.index, number).permutation(stream.size)
    return order[: stream.batches_per_epoch * stream.batch].reshape(-1, stream.batch)


@dataclass(frozen=True)
class Batches:
    """The batches of a family's particles: of task after task, at `offset` in the bank, those of `mine`.

    At inner step `t` of a run, particle `i` of the `particles` of a task takes batch `particles t + i` of its stream.
    """

    parts: tuple[tuple[Stream, int, tuple[int, ...]], ...]
    particles: int

    def of(self, first_step: int, steps: int) -> NDArray[np.int32]:
        """Return rows of the bank [steps, n, B] for the steps from `first_step` on."""
        columns = []
        for stream, offset, mine in self.parts:
            batches = stream.batches(first_step * self.particles, steps * self.particles)
            columns.append(batches.reshape(steps, self.particles, stream.batch)[:, mine] + offset)
        return np.concatenate(columns, axis=1, dtype=np.int32)


class Drawn(NamedTuple):
    """What one outer step draws."""

    perturbations: NDArray[np.float32]
    """[n, d], of standard deviation `std`."""
    batches: tuple[NDArray[np.int32], ...]
    """[window, n, B] of each family."""


@dataclass(frozen=True)
class Draws:
    """What the outer steps of a run draw, for the particles (numbers of the whole run) of a rank."""

    seed: int
    particles: tuple[int, ...]
    dimension: int
    std: float
    window: int
    families: tuple[Batches, ...]

    def perturbations(self, outer_step: int) -> NDArray[np.float32]:
        """Return the perturbations of a step, [n, d]."""
        normals = [
            generator(self.seed, Purpose.PERTURBATION, particle, outer_step).standard_normal(self.dimension)
            for particle in self.particles
        ]
        # rounded to float32, so that what multiplies the difference is what moved theta
        return (self.std * np.stack(normals)).astype(np.float32)

    def __call__(self, outer_step: int) -> Drawn:
        first = outer_step * self.window
        batches = tuple(family.of(first, self.window) for family in self.families)
        return Drawn(self.perturbations(outer_step), batches)


# what a terminal, torchrun or a scheduler sends to all processes: it is for the run, which ends the others itself
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Ahead:
    """The same draws, made by processes for the steps that follow the one that is asked for.

    Steps are dealt out in turn, each process one at a time. A process ends with this one, however that ends. Raises
    RuntimeError when one has ended by itself.
    """

    def __init__(self, draws: Draws, processes: int) -> None:
        self.draws, self._processes = draws, processes
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self._next: int | None = None  # the step that was asked for beforehand

    def __call__(self, outer_step: int) -> Drawn:
        if outer_step != self._next:
            self.close()
            self._start(outer_step)
        worker = self._workers[outer_step % self._processes][1]
        try:
            drawn: Drawn = worker.recv()
            worker.send(outer_step + self._processes)
        except (EOFError, OSError) as error:
            self.close()
            raise RuntimeError("a process that makes batches has ended (killed, or out of memory?)") from error
        self._next = outer_step + 1
        return drawn

    def _start(self, first: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        # before `multiprocessing` ends with its processes, which do not listen to signals
        atexit.register(self.close)
        # its start unblocks signals
        resource_tracker.ensure_running()
        for _ in range(self._processes):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_draw, args=(self.draws, there), daemon=True)
            # blocked from its first moment on: it imports for seconds
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            # the process sees the end of the pipe when this one, whose end is the only one left, is gone
            there.close()
            self._workers.append((process, here))
        for step in range(first, first + self._processes):
            self._workers[step % self._processes][1].send(step)

    def close(self) -> None:
        """End the processes; the next step that is asked for starts others."""
        for _, connection in self._workers:
            connection.close()
        for process, _ in self._workers:
            process.join()
        atexit.unregister(self.close)
        self._workers, self._next = [], None


def _draw(draws: Draws, connection: Connection) -> None:
    """Be one of the processes: a step comes in, what it draws goes out."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(draws(connection.recv()))


def batches_of(streams: Sequence[tuple[Stream, int]], particles: Sequence[int], each: int) -> Batches:
    """Return the batches of some particles (numbers of the whole run), `each` to a stream, with offsets in a bank."""
    parts = []
    for stream, offset in streams:
        mine = tuple(p - stream.index * each for p in particles if p // each == stream.index)
        if mine:
            parts.append((stream, offset, mine))
    return Batches(tuple(parts), each)
