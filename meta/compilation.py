"""Regions of the inner step that `torch.compile` fuses, and their compilation ahead of the first outer step.

Most of a compilation is Python of one process. So processes share the regions: each takes the same rehearsal of a step,
compiles those that it claims and runs the others eagerly. All put them into the compiler's cache on the disk, from
which the process of the run then loads what others have compiled.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

# of a rehearsal; more would wait for the longest region
MOST_PROCESSES = 8
# seconds that a process has to end in when it is told to
GRACE = 3.0


class Claims:
    """Which regions this process compiles, of those of a rehearsal that several processes share.

    The first process to make a region's file in `folder` has it. Without a folder nothing is claimed, only counted.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.seen: dict[str, bool] = {}
        """Whether this process has the region, by the region's name and the layout of its arguments."""

    def claim(self, name: str, arguments: tuple[Any, ...]) -> bool:
        """Return whether this process compiles the region for arguments like these."""
        layout = [(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in pytree.tree_leaves(arguments)]
        key = f"{name}{layout}"
        if key not in self.seen:
            self.seen[key] = self.folder is not None and self._first(self.folder, key)
        return self.seen[key]

    def _first(self, folder: Path, key: str) -> bool:
        try:
            (folder / hashlib.sha256(key.encode()).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


_claims: ContextVar[Claims | None] = ContextVar("celo2_claims", default=None)


class Region:
    """A function that runs compiled; in a rehearsal with claims, eagerly where another process compiles it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.compiled = function, torch.compile(function, dynamic=False)

    def __call__(self, *arguments: Any) -> Any:
        claims = _claims.get()
        if claims is None or claims.claim(self.function.__qualname__, arguments):
            return self.compiled(*arguments)
        return self.function(*arguments)


@cache
def region(function: Callable[..., Any]) -> Region:
    """Return the compiled region of a function, one for all who ask."""
    return Region(function)


@contextmanager
def claiming(claims: Claims) -> Iterator[Claims]:
    """Within it regions are compiled as `claims` says."""
    token = _claims.set(claims)
    try:
        yield claims
    finally:
        _claims.reset(token)


def count_regions(rehearse: Callable[[], None]) -> int:
    """Return how many regions a rehearsal would compile."""
    with claiming(Claims()) as claims:
        rehearse()
    return len(claims.seen)


def compile_ahead(rehearse: Callable[[], None], elsewhere: Callable[[], None], processes: int) -> None:
    """Compile what `rehearse` runs, in up to `processes` processes as soon as the cache lacks a region.

    `elsewhere` is the same rehearsal for another process, so it can be pickled. What fails there is compiled here, and
    raises here. No helper is left when this ends, however it ends; a compiler of this process may be.
    """
    if processes > 1:
        with (
            tempfile.TemporaryDirectory(prefix="celo2-regions-") as folder,
            _Helpers(elsewhere, Path(folder), processes - 1) as helpers,
            claiming(Claims(Path(folder))),
        ):
            rehearse()
            helpers.finish()
    rehearse()


def processes_for(device: torch.device) -> int:
    """Return how many processes compile: one for each idle CPU, and one for a GPU, whose compiler has its own pool."""
    if device.type != "cpu":
        return 1
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # another process repeats the imports, which it must not do at the expense of this one
    return max(1, min(MOST_PROCESSES, round(cpus - os.getloadavg()[0])))


class _Helpers:
    """Processes that rehearse as well, started when the cache first lacks a region; they end with the context."""

    def __init__(self, rehearse: Callable[[], None], folder: Path, number: int) -> None:
        self._job = pickle.dumps((rehearse, folder, torch.get_num_threads()))
        self._number = number
        self._processes: list[subprocess.Popen[bytes]] = []
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._start_when_needed, daemon=True)

    def __enter__(self) -> _Helpers:
        self._watch.start()
        return self

    def _start_when_needed(self) -> None:
        before = counters["inductor"]["fxgraph_cache_miss"]
        while counters["inductor"]["fxgraph_cache_miss"] == before:
            if self._over.wait(0.05):
                return
        program = f"import sys; sys.path[:] = {sys.path!r}; from celo2.meta.compilation import help_out; help_out()"
        for _ in range(self._number):
            # a session of its own: a Ctrl-C is for the run, which ends them
            process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._processes.append(process)
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(self._job)
                process.stdin.flush()

    def finish(self) -> None:
        """Wait until all have compiled what they have claimed."""
        self._over.set()
        self._watch.join()
        for process in self._processes:
            process.wait()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._watch.join()
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        deadline = time.monotonic() + 2 * GRACE
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def help_out() -> None:
    """Be one of the helpers: the rehearsal comes from standard input, whose end is that of the run."""
    rehearse, folder, threads = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    torch.set_num_threads(threads)
    with claiming(Claims(folder)):
        rehearse()


def _end_with_the_run() -> None:
    # not by the buffer, whose lock the end of the program would wait for
    os.read(0, 1)
    end_descendants(set())
    os.killpg(0, signal.SIGTERM)


def end_descendants(but: Collection[int]) -> None:
    """End the processes that this one has started, but some, from the leaves on.

    A compiler's driver removes its temporary files when what it has started ends, which it cannot when it ends first.
    """
    deadline = time.monotonic() + GRACE
    while (found := {process: leaf for process, leaf in descendants().items() if process not in but}) and (
        time.monotonic() < deadline
    ):
        for process, leaf in found.items():
            if leaf:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)
        time.sleep(0.05)


def descendants() -> dict[int, bool]:
    """Return the processes below this one, and whether each has started none itself; nothing without a /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # the name may hold spaces and parentheses
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(path.parent.name))
    found = [os.getpid()]
    for process in found:
        found += children.get(process, [])
    return {process: process not in children for process in found[1:]}
