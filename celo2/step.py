"""One step of Celo2 (arXiv 2602.19142), the same for one process and for many, through PyTorch or the Triton kernels.

A backend does the phases on what this rank has of each parameter; a `Comm` adds up sums over ranks in between, and
sends directions to the ranks that orthogonalise them. On one process there are no messages, and every parameter is
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from celo2.comm import Comm


class Messages(NamedTuple):
    """The messages of a plan (`celo2.plan`), of which every backend has its own."""

    gradients: Tensor
    features: Tensor
    directions: Tensor  # empty where no rank reads it
    sent: Tensor
    received: Tensor


@dataclass
class Inputs:
    """What a step is given beside the parameters of the learned rule that its backend has."""

    groups: Sequence[dict[str, Any]]
    """Options of the optimizer's groups: rates, decays and limits of the norm."""
    whole: list[Tensor]
    """Gradients of the other parameters that every rank has whole: part of the global norm."""
    shards: list[Tensor]
    """This rank's part of the others."""
    grad_scale: Tensor | None = None
    """What a GradScaler has multiplied the gradients by, 0-d."""
    found_inf: Tensor | None = None
    """Whether it has found an element that is not finite, 0-d."""


class Backend(Protocol):
    """The phases of a step, on slices of matrices that are divided among ranks and on whole ones."""

    messages: Messages
    device: torch.device

    def begin(self, inputs: Inputs) -> None:
        """Take what this step is given, and clear the messages."""

    def gradient_moments(self, *, clipped: bool = False) -> None:
        """Phase 1: sums of g^2 by row and column; `clipped` counts elements beyond the clip as the clip."""

    def decide(self, comm: Comm) -> bool:
        """From the global norm: what gradients are multiplied by, and whether to skip the step (then False).

        A backend that must not wait for its device returns True, and decides there.
        """

    def must_clip(self) -> bool:
        """Whether the sums of phase 1 must be taken again, clipped."""

    def feature_moments(self) -> None:
        """Phase 2 of slices: new factors, and the sums of squares of the 18 columns."""

    def learned_update(self) -> None:
        """Phase 3 of slices: accumulators, and the direction, which goes into the message where it is sent."""

    def step_whole(self) -> None:
        """Phases 2 to 4 of whole parameters."""

    def orthogonalize(self, comm: Comm) -> None:
        """Newton-Schulz on the matrices that this rank owns, and an RMS of 1, in place of what it received."""

    def apply(self) -> None:
        """Phase 4 of slices."""


def take_step(backend: Backend, comm: Comm, inputs: Inputs, overlapped_work: Callable[[], None]) -> bool:
    """Step all parameters of a backend; returns whether that was not skipped, True where only the device knows.

    `overlapped_work` steps the AdamW side, while directions travel.
    """
    with on(backend.device):
        backend.begin(inputs)
        messages = backend.messages
        backend.gradient_moments()
        comm.all_reduce(0, messages.gradients)
        if not backend.decide(comm):
            return False
        if backend.must_clip():
            backend.gradient_moments(clipped=True)
            comm.all_reduce(0, messages.gradients)
        backend.feature_moments()
        comm.all_reduce(1, messages.features)
        backend.learned_update()
        comm.all_reduce(2, messages.directions)
        travelling = comm.to_owners(messages.received, messages.sent)
        backend.step_whole()
        overlapped_work()
        if travelling is not None:
            travelling.wait()
            backend.orthogonalize(comm)
            comm.from_owners(messages.received, messages.sent).wait()
        backend.apply()
        comm.gather_rows()
        return True


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the present one: Triton launches there, whatever the tensors' device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
