"""Two small regions and rehearsals of them, for processes that share a compilation."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor

from celo2.meta.compilation import region


def first(x: Tensor) -> Tensor:
    return (x + 1).sin()


def second(x: Tensor) -> Tensor:
    return (x * 2).cos()


def rehearse(folder: Path, wait: bool) -> None:
    """Run both regions; the process that does not wait says when it has."""
    x = torch.zeros(64)
    region(first)(x)
    if wait:
        wait_for(folder / "helped")
    region(second)(x)
    if not wait:
        (folder / "helped").write_text(str(os.getpid()))


def fail(folder: Path, wait: bool) -> None:
    raise RuntimeError("no")


def sleep(folder: Path) -> None:
    (folder / "asleep").touch()
    time.sleep(120)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.05)


def processes_with(text: str) -> list[int]:
    """Processes whose environment has the text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found
