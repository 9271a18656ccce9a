"""Phases 2 and 3 of whole float32 matrices on a CPU through `torch.compile`: two passes over memory, no scratch planes.

A region is compiled once for all shapes, but for a few kinds of layout: one matrix or several, contiguous or the slices
of a wider one. The compiler keeps what it makes on the disk, so that only the first process waits for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from celo2.elementwise import advance_moments, matrix_direction
from celo2.phases import Matrices, MatrixStep

logger = logging.getLogger(__name__)


def _advance(p: Tensor, g: Tensor, scale: Tensor, momenta: list[Tensor], v: Tensor, *factors: Tensor) -> Tensor:
    return advance_moments(p, g * scale, momenta, v, *factors)


def _direction(p: Tensor, g: Tensor, scale: Tensor, momenta: list[Tensor], v: Tensor, *others: Tensor) -> Tensor:
    return matrix_direction(p, g * scale, momenta, v, *others)


# not as one region: the terms of rows and columns would be computed anew at every element, at twice the time
@cache
def _regions() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    # beyond PyTorch's limit of layouts a region runs eagerly: as exact, slower than the path that it replaces
    return torch.compile(_advance, dynamic=True), torch.compile(_direction, dynamic=True)


@cache
def can_compile() -> bool:
    """Whether `torch.compile` works here, tried once: it needs a C++ compiler. Says so in the log where it does not."""
    begun = time.monotonic()
    try:
        torch.compile(lambda x: x.relu() + 1.0)(torch.zeros(64))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        logger.warning("backend='compiled' steps through plain PyTorch: torch.compile fails here (%s)", reason)
        return False
    logger.info("torch.compile works, tried in %.1f s", time.monotonic() - begun)
    return True


def takes(matrices: Matrices) -> bool:
    """Whether the compiled regions can take these: float32 on a CPU, with elements."""
    tensors = (matrices.p, matrices.g, *matrices.momenta, matrices.v)
    plain = all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)
    return plain and matrices.p.numel() > 0 and can_compile()


def learned_update(step: MatrixStep) -> Tensor:
    """Phases 2 and 3: write momenta and second moment, return the direction d [B, m, n], a new tensor."""
    matrices, theta = step.matrices, step.theta
    # numbers as tensors: the compiler would take them for constants
    numbers = torch.tensor([step.scale, theta.bias2])
    arguments = matrices.p, matrices.g, numbers[0], list(matrices.momenta), matrices.v
    factors = step.row_scale.transpose(0, 1), step.column_scale.transpose(0, 1)
    advance, direct = _regions()
    scales = advance(*arguments, *factors)
    terms = (term.transpose(0, 1) for term in step.vector_terms())
    weights = theta.element * scales[..., None], theta.hidden.T[None], theta.bias1.T, theta.output, numbers[1:]
    return direct(*arguments, *factors, *terms, *weights)
