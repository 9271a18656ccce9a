"""One run a folder: a lock that the kernel gives back when its process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from celo2.pretrain.parallel import World

LOCK = ".lock"
_held: set[int] = set()


def _forget() -> None:
    """In a forked child: the lock is its parent's, and does not outlive that."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget)


@contextmanager
def locked(folder: Path, world: World) -> Iterator[None]:
    """Hold the lock of a folder, which is made when it is missing; rank 0 takes it, all ranks call this.

    Raises ValueError on all ranks when another process holds it, naming that one, or when the folder cannot be written.
    """
    problem, handle = None, None
    if world.main:
        try:
            handle = _take(folder)
        except (OSError, ValueError) as error:
            problem = str(error)
    problem = world.broadcast_object(problem)
    if problem is not None:
        raise ValueError(problem)
    try:
        yield
    finally:
        if handle is not None:
            # first the name, so that whoever waits for the lock sees that it is of a file that is gone
            (folder / LOCK).unlink(missing_ok=True)
            _held.discard(handle)
            os.close(handle)


def _take(folder: Path) -> int | None:
    """Lock the file; None on a file system without locks. Raises ValueError naming who has it."""
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _is_there(handle, path):
                    # of a run that has ended in between
                    os.close(handle)
                    continue
                holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T%z")}
                os.ftruncate(handle, 0)
                os.write(handle, json.dumps(holder).encode())
            except OSError as error:
                text = os.pread(handle, 1000, 0)
                os.close(handle)
                if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                    warnings.warn(f"{folder} has no locks ({error.strerror}): start one run there", stacklevel=4)
                    return None
                if not isinstance(error, BlockingIOError):
                    raise
                raise ValueError(
                    f"{folder} is in use by {_holder(text)}: wait for it or stop it, or give another --out-dir"
                ) from error
            _held.add(handle)
            return handle
    except OSError as error:
        raise OSError(f"cannot write {folder}: {error.strerror}; give another --out-dir") from error


def _is_there(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(text: bytes) -> str:
    try:
        holder = json.loads(text)
        return f"process {int(holder['pid'])} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
