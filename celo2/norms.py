"""The global norm of gradients of mixed dtypes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def foreach_norm(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the 2-norm of each tensor, 0-d: in float64 for those of float64, in float32 for the rest."""
    norms: list[Tensor] = [torch.empty(0)] * len(tensors)
    for wide in (False, True):
        chosen = [index for index, tensor in enumerate(tensors) if (tensor.dtype == torch.float64) == wide]
        if chosen:
            dtype = torch.float64 if wide else torch.float32
            some = torch._foreach_norm([tensors[index] for index in chosen], 2, dtype)
            for index, norm in zip(chosen, some, strict=True):
                norms[index] = norm
    return norms


def global_norm(totals: Sequence[float], gradients: Sequence[Tensor]) -> float:
    """Global norm of the gradients, given the sums of squares of the first ones; NaN when an element is not finite."""
    square = sum(totals) + sum(float(norm) ** 2 for norm in foreach_norm(gradients[len(totals) :]))
    if math.isfinite(square):
        return math.sqrt(square)
    if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
        return math.nan
    # finite elements whose squares overflow
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    square = sum(float((gradient.to(torch.float64) / largest).square().sum()) for gradient in gradients)
    return largest * math.sqrt(square)
