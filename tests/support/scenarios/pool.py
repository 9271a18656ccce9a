"""Processes that meet on gloo and wait for scenarios: started once for a number of ranks, they run many."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from scenarios.interpreter import patch_once

TIMEOUT = 600  # seconds that a scenario may take
GRACE = 5  # seconds in which other ranks say why they failed too


class RankFailure(Exception):
    """A scenario raised on some rank; the message has the tracebacks."""


class RankPool:
    """`ranks` processes with a process group; `store` is a file that does not exist, through which they meet."""

    def __init__(self, ranks: int, store: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(ranks):
            own, other = context.Pipe()
            process = context.Process(target=serve, args=(other, rank, ranks, str(store)), daemon=True)
            process.start()
            other.close()
            self.connections.append(own)
            self.processes.append(process)

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def run(self, scenario: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What `scenario(mesh, *arguments, **options)` returns on rank 0; a RankFailure ends the processes."""
        message = pickle.dumps((scenario, arguments, options))
        for connection in self.connections:
            connection.send_bytes(message)
        waiting, failures, result = dict(enumerate(self.connections)), [], None
        deadline = time.monotonic() + TIMEOUT
        while waiting and (left := deadline - time.monotonic()) > 0:
            ready = wait(waiting.values(), left)
            for rank in [rank for rank, connection in waiting.items() if connection in ready]:
                try:
                    failure, returned = pickle.loads(waiting.pop(rank).recv_bytes())
                except EOFError:
                    failure, returned = "the process has ended", None
                result = returned if rank == 0 else result
                if failure:
                    failures.append(f"rank {rank}: {failure}")
                    # the others may wait for it in a collective
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failures or waiting:
            self.close()
            raise RankFailure("\n".join(failures) or f"{sorted(waiting)} did not answer in {TIMEOUT} s")
        return result

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def serve(connection: Connection, rank: int, ranks: int, store: str) -> None:
    """Run one rank's part of every scenario that comes in, until the tests have ended."""
    threading.Thread(target=leave_with_parent, daemon=True).start()
    # read when the kernels are imported, with the first scenario; parameters are on the CPU
    os.environ["TRITON_INTERPRET"] = "1"
    patch_once()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    while True:
        scenario, arguments, options = pickle.loads(connection.recv_bytes())
        torch.manual_seed(0)
        try:
            result = scenario(mesh, *arguments, **options)
            answer = pickle.dumps(("", result if rank == 0 else None))
        except BaseException:
            answer = pickle.dumps((traceback.format_exc(), None))
        connection.send_bytes(answer)


def leave_with_parent() -> None:
    """End this process with the tests', wherever it is: a collective may wait for half an hour."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
