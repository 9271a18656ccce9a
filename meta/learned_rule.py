"""The Celo2 rule for many small problems, each with a theta of its own, in regions that a compiler can fuse.

The elementwise work on matrices is `celo2.meta.elementwise`, with theta along the problem axis; here are factors, the
terms of rows and columns, and vectors. `celo2.reference` is the oracle.

Shapes: P problems, a matrix of m rows and n columns with m <= n (so that R lies along the rows), h and k hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celo2.folded import FirstLayer
from celo2.meta.elementwise import mlp
from celo2.reference import (
    FACTOR_DECAYS,
    FACTOR_EPS,
    FEATURE_CLIP,
    GRADIENT_CLIP,
    MOMENTUM_DECAYS,
    NORM_EPS,
    RMS_EPS,
    SECOND_MOMENT_DECAY,
    SQUARE_EPS,
)
from celo2.theta import GROUP_COLUMNS, NAMES, OUTPUTS, Theta

COLUMNS = sum(GROUP_COLUMNS)


def theta_size(hidden: int = 8) -> int:
    """Return how many floats theta has: 347 at the published sizes."""
    return COLUMNS * hidden + hidden + hidden * hidden + hidden + hidden * OUTPUTS + OUTPUTS


def flatten(theta: Theta) -> NDArray[np.float32]:
    """Return theta as one vector (347 floats at the published sizes), in the order of `celo2.theta.NAMES`."""
    return np.concatenate([theta.arrays[name].ravel() for name in NAMES])


def unflatten(vector: NDArray[np.float32], hidden: int = 8, card: dict[str, str] | None = None) -> Theta:
    """Return the theta that `flatten` gave; raises ValueError for a vector of another length."""
    shapes = [*((columns, hidden) for columns in GROUP_COLUMNS), (hidden,), (hidden, hidden), (hidden,)]
    shapes += [(hidden, OUTPUTS), (OUTPUTS,)]
    sizes = [int(np.prod(shape)) for shape in shapes]
    if vector.shape != (sum(sizes),):
        raise ValueError(f"theta vector has shape {vector.shape}, expected ({sum(sizes)},) for {hidden} hidden units")
    pieces = np.split(vector, np.cumsum(sizes)[:-1])
    arrays = {name: piece.reshape(shape) for name, piece, shape in zip(NAMES, pieces, shapes, strict=True)}
    return Theta.from_arrays(arrays, card)


@dataclass(frozen=True)
class ThetaBatch:
    """One theta a problem, laid out for the folded rule."""

    element: Tensor  # [P, 18, h]
    short: Tensor  # [P, h, 6]
    long: Tensor  # [P, h, 6]
    vector: Tensor  # [P, 15, h] - first layer of a vector
    bias0: Tensor  # [P, h]
    hidden: Tensor  # [P, h, k]
    bias1: Tensor  # [P, k]
    output: Tensor  # [P, k]
    bias2: Tensor  # [P]

    def repeated(self, count: int) -> ThetaBatch:
        """Return the batch with each theta `count` times in turn, for problems that have that many matrices."""
        if count == 1:
            return self
        return ThetaBatch(*(x.repeat_interleave(count, 0) for x in vars(self).values()))

    @classmethod
    def from_vectors(cls, vectors: Tensor, hidden: int = 8) -> ThetaBatch:
        """Lay out theta vectors [P, 347], each in the order of `flatten`."""
        h = hidden
        sizes = [COLUMNS * h, h, h * h, h, h * OUTPUTS, OUTPUTS]
        first, bias0, middle, bias1, last, bias2 = torch.split(vectors, sizes, dim=1)
        layer = FirstLayer.of(first.reshape(-1, COLUMNS, h))
        return cls(
            element=layer.element,
            short=layer.short.mT.contiguous(),
            long=layer.long.mT.contiguous(),
            vector=layer.vector,
            bias0=bias0.contiguous(),
            hidden=middle.reshape(-1, h, h).contiguous(),
            bias1=bias1.contiguous(),
            output=last.reshape(-1, h, OUTPUTS)[..., 0].contiguous(),
            bias2=bias2[:, 0].contiguous(),
        )


def _decays(like: Tensor) -> Tensor:
    return torch.tensor(FACTOR_DECAYS, dtype=like.dtype, device=like.device)[:, None]


def factor_moments(g: Tensor, row_factor: Tensor, column_factor: Tensor) -> tuple[Tensor, Tensor]:
    """Advance the factors [P, 3, m] and [P, 3, n] in place; return rf [P, 3, m] and cf [P, 3, n]."""
    square = g.clamp(-GRADIENT_CLIP, GRADIENT_CLIP).square()
    decay = _decays(g)
    row = decay * row_factor + (1 - decay) * (square.mean(2) + SQUARE_EPS)[:, None]
    column = decay * column_factor + (1 - decay) * (square.mean(1) + SQUARE_EPS)[:, None]
    row_factor.copy_(row)
    column_factor.copy_(column)
    row_scale = torch.rsqrt((row / (row.mean(2, keepdim=True) + FACTOR_EPS)).clamp_min(FACTOR_EPS))
    return row_scale, torch.rsqrt(column.clamp_min(FACTOR_EPS))


def vector_contribution(factor: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """First-layer contribution [P, h, length] of F_k and rsqrt(F_k + eps) of a factor [P, 3, length], plus bias."""
    columns = torch.cat([factor, torch.rsqrt(factor + RMS_EPS)], dim=1)
    columns = columns * torch.rsqrt(columns.square().mean(2, keepdim=True) + NORM_EPS)
    return torch.bmm(weights, columns) + bias[..., None]


def vector_direction(
    p: Tensor,
    g: Tensor,
    momenta: list[Tensor],
    v: Tensor,
    factor: Tensor,
    first: Tensor,
    bias0: Tensor,
    hidden: Tensor,
    bias1: Tensor,
    output: Tensor,
    bias2: Tensor,
) -> Tensor:
    """The rule for vectors p [P, n]: advance three momenta, v and factor [P, 3, n] in place, return d [P, n]."""
    g = g.clamp(-GRADIENT_CLIP, GRADIENT_CLIP)
    decay = _decays(g)
    advanced = [m + (1 - b) * (g - m) for m, b in zip(momenta, MOMENTUM_DECAYS, strict=True)]
    v_new = SECOND_MOMENT_DECAY * v + (1 - SECOND_MOMENT_DECAY) * g * g
    factor_new = decay * factor + (1 - decay) * (g * g + SQUARE_EPS)[:, None]
    q = torch.rsqrt(v_new + RMS_EPS)
    columns = [
        g,
        g.clamp(-FEATURE_CLIP, FEATURE_CLIP),
        p,
        *advanced,
        v_new,
        *(m * q for m in advanced),
        q,
        *(g * torch.rsqrt((factor_new[:, k] + FACTOR_EPS).clamp_min(FACTOR_EPS)) for k in range(3)),
        g * q,
    ]
    columns = [x * torch.rsqrt((x * x).mean(1, keepdim=True) + NORM_EPS) for x in columns]
    bias = [bias0[:, unit, None] for unit in range(bias0.shape[1])]
    direction = mlp(columns, bias, first, hidden, bias1, output, bias2)
    for m, new in zip(momenta, advanced, strict=True):
        m.copy_(new)
    v.copy_(v_new)
    factor.copy_(factor_new)
    return direction
