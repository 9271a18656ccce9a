"""Launch kernels, and compile those of a step before its first launch, several at once.

A first step needs twenty to forty kernels, and Triton compiles each where it is first launched, one after another. Most
of a compilation is outside of Python's lock, so threads share the work.
"""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import triton
from torch import Tensor

logger = logging.getLogger(__name__)
MOST_THREADS = 16
_rehearsing: ContextVar[bool] = ContextVar("celo2_rehearsing", default=False)


@contextmanager
def rehearsal() -> Iterator[None]:
    """Within it kernels are compiled instead of launched; leaving it waits for all of them.

    What the compiler cannot do is raised where it is launched.
    """
    threads = max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    begun, token = time.monotonic(), _rehearsing.set(True)
    try:
        with ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            yield
    finally:
        _rehearsing.reset(token)
    logger.info("kernels are ready after %.1f s, with %d threads", time.monotonic() - begun, threads)


def can_rehearse(kernel: Any) -> bool:
    """Whether a kernel can be compiled ahead: not in the interpreter, and by Triton 3.6 or newer."""
    mode = getattr(triton, "AsyncCompileMode", None)
    threads = mode is not None and "ignore_errors" in inspect.signature(mode).parameters
    return threads and isinstance(kernel, triton.JITFunction)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    table: Tensor,
    *arguments: Any,
    maxnreg: int | None = None,
    num_warps: int = 4,
    **constants: Any,
) -> None:
    """Launch a kernel with the options of its device's compiler; within a rehearsal compile it for these arguments."""
    if not grid[0]:
        return
    # AMD's waves are twice as wide, and the limit on registers is NVIDIA's; the interpreter reads neither
    options = {"num_warps": num_warps // 2 if torch.version.hip else num_warps}
    if maxnreg is not None and not torch.version.hip:
        options["maxnreg"] = maxnreg
    if _rehearsing.get():
        kernel.warmup(table, *arguments, grid=grid, **constants, **options)
    else:
        kernel[grid](table, *arguments, **constants, **options)
