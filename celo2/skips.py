"""A warning when steps are skipped in a row: gradients that are not finite from some step on train nothing."""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor

# modules between a caller and the step: wrappers of torch.optim, and the package
_INNER = ("torch", "celo2")

# skipped steps in a row that are no accident; a loss scale that is found takes fewer, or says so itself
IN_A_ROW = 3
# steps between two looks at a counter on a GPU
LOOK_EVERY = 8


def warn_caller(message: str) -> None:
    """Warn in the name of whoever called the step, outside of PyTorch and this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INNER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level + 1)


class SkipWatch:
    """Counts skipped steps in a row, on the host or from a counter on a device, and warns once."""

    def __init__(self) -> None:
        self._warned = False
        self._in_a_row = 0
        self._seen = 0  # of the counter
        self._steps = 0  # since it was seen
        self._copy: tuple[Tensor, torch.cuda.Event, int] | None = None

    def note(self, skipped: bool, *, scaled: bool = False) -> None:
        """Note a step; with `scaled` a GradScaler skips it to find its scale, which is its own affair."""
        self._in_a_row = self._in_a_row + 1 if skipped and not scaled else 0
        if self._in_a_row == IN_A_ROW:
            self._warn(IN_A_ROW)

    def look(self, counter: Tensor, *, scaled: bool = False) -> None:
        """Note a step that counts on the device, int64 [1]; on a GPU now and then, without waiting for it."""
        if counter.device.type != "cuda":
            value = int(counter)
            self.note(value > self._seen, scaled=scaled)
            self._seen = value
            return
        if scaled or torch.cuda.is_current_stream_capturing():
            return
        self._steps += 1
        if self._copy is not None and self._copy[1].query():  # type: ignore[no-untyped-call]
            value, steps = int(self._copy[0]), self._copy[2]
            if value - self._seen >= steps:
                self._warn(steps)
            self._seen, self._copy = value, None
        if self._copy is None and self._steps >= LOOK_EVERY:
            host = torch.empty(counter.shape, dtype=counter.dtype, pin_memory=True)
            host.copy_(counter, non_blocking=True)
            event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._copy, self._steps = (host, event, self._steps), 0

    def _warn(self, steps: int) -> None:
        if not self._warned:
            self._warned = True
            warn_caller(
                f"{steps} steps in a row were skipped: a gradient is not finite, and nothing is trained. Look at the "
                "loss, lower the learning rate, or go back to a checkpoint; optimizer.skipped_steps counts them"
            )
