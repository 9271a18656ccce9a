"""The Celo2 rule, written out: the oracle that every fast path is tested against.

Nothing is folded, fused or chunked here: 30 feature columns are materialised, normalised and pushed through the MLP in
the order of the paper (arXiv 2602.19142). It runs in the dtype of its inputs, float32 or float64, slow on purpose.
The one-dimensional form of the rule is short enough that `FusedCelo2` uses it as it stands.

One deviation from the authors' code: a matrix or a vector that never had a gradient (an expert to which nothing was
routed) does not move. There it moves at the full rate, because the parameter itself is a feature, and the MLP has
biases. Here the factors stay exactly zero until a gradient comes; from then on the 1e-30 of every step keeps them above
zero, so they tell for good, and where they are zero the direction is zero. Nothing else differs by a bit.

Shapes: a batch of matrices is [..., m, n]; the three decays are a last axis of size 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from celo2.newton_schulz import COEFFICIENTS, EPS

GRADIENT_CLIP = 1000.0
FEATURE_CLIP = 0.1
MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
SECOND_MOMENT_DECAY = 0.95
FACTOR_DECAYS = (0.9, 0.99, 0.999)
SQUARE_EPS = 1e-30  # added to g^2 before the factored means
FACTOR_EPS = 1e-9  # floor and denominators of the factored second moment
RMS_EPS = 1e-8  # inside rsqrt(v + eps), rsqrt(R + eps), rsqrt(C + eps)
NORM_EPS = 1e-9  # inside every rsqrt(mean(x^2) + eps)


class MatrixState(NamedTuple):
    """Accumulators of matrices: momentum [..., m, n, 3], second moment [..., m, n], factors [..., m|n, 3]."""

    momentum: Tensor
    second_moment: Tensor
    row_factor: Tensor
    column_factor: Tensor

    @classmethod
    def zeros_like(cls, p: Tensor) -> MatrixState:
        *batch, m, n = p.shape
        return cls(p.new_zeros(*p.shape, 3), p.new_zeros(p.shape), p.new_zeros(*batch, m, 3), p.new_zeros(*batch, n, 3))


class VectorState(NamedTuple):
    """Accumulators of a vector: momentum [n, 3], second moment [n], unfactored second moments [n, 3]."""

    momentum: Tensor
    second_moment: Tensor
    factor: Tensor

    @classmethod
    def zeros_like(cls, p: Tensor) -> VectorState:
        return cls(p.new_zeros(*p.shape, 3), p.new_zeros(p.shape), p.new_zeros(*p.shape, 3))


def _ema(old: Tensor, new: Tensor, decays: tuple[float, ...]) -> Tensor:
    decay = torch.tensor(decays, dtype=old.dtype, device=old.device)
    return decay * old + (1 - decay) * new


def _normalise(columns: Tensor, dims: tuple[int, ...]) -> Tensor:
    return columns * torch.rsqrt(columns.square().mean(dims, keepdim=True) + NORM_EPS)


def had_gradient(factor: Tensor) -> Tensor:
    """Whether a gradient was ever there, bool [..., 1, 1], given a factor [..., length, 3] of the matrix or vector."""
    return factor.sum((-2, -1), keepdim=True) > 0


def mlp(theta: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Map normalised columns [..., 15 or 30] to the direction [...]; only the first output is used (exp_mult = 0)."""
    first = torch.cat([theta[f"w0__{group}"] for group in range(14)])[: features.shape[-1]]
    hidden = torch.relu(features @ first + theta["b0"])
    hidden = torch.relu(hidden @ theta["w1"] + theta["b1"])
    return (hidden @ theta["w2"] + theta["b2"])[..., 0]


def matrix_columns(p: Tensor, g: Tensor, state: MatrixState) -> tuple[Tensor, MatrixState]:
    """Return the 30 feature columns [..., m, n, 30], not normalised, and the new accumulators."""
    m, n = p.shape[-2:]
    g = g.clamp(-GRADIENT_CLIP, GRADIENT_CLIP)
    momentum = _ema(state.momentum, g[..., None], MOMENTUM_DECAYS)
    v = SECOND_MOMENT_DECAY * state.second_moment + (1 - SECOND_MOMENT_DECAY) * g * g
    square = g * g + SQUARE_EPS
    row = _ema(state.row_factor, square.mean(-1)[..., None], FACTOR_DECAYS)
    column = _ema(state.column_factor, square.mean(-2)[..., None], FACTOR_DECAYS)
    started = (g * g).sum((-2, -1))[..., None, None] > 0
    started = started | had_gradient(state.row_factor)
    row, column = torch.where(started, row, 0.0), torch.where(started, column, 0.0)
    new_state = MatrixState(momentum, v, row, column)

    # the shorter axis carries R, the longer one C; a square matrix counts axis 0 as the shorter
    row_ij, column_ij = row[..., :, None, :], column[..., None, :, :]
    short, long = (row, column_ij) if m <= n else (column, row_ij)
    short_ij = row_ij if m <= n else column_ij
    mean_short = short.mean(-2)[..., None, None, :]
    rf = torch.rsqrt((short_ij / (mean_short + FACTOR_EPS)).clamp_min(FACTOR_EPS))
    cf = torch.rsqrt(long.clamp_min(FACTOR_EPS))
    q = torch.rsqrt(v + RMS_EPS)[..., None]
    g1 = g[..., None]
    wide = (*p.shape, 3)
    columns = torch.cat(
        [
            g1,
            g1.clamp(-FEATURE_CLIP, FEATURE_CLIP),
            p[..., None],
            momentum,
            v[..., None],
            momentum * q,
            q,
            g1 * rf * cf,
            g1 * q,
            short_ij.expand(wide),
            long.expand(wide),
            torch.rsqrt(short_ij + RMS_EPS).expand(wide),
            torch.rsqrt(long + RMS_EPS).expand(wide),
            momentum * rf * cf,
        ],
        dim=-1,
    )
    return columns, new_state


def matrix_update(
    theta: Mapping[str, Tensor], p: Tensor, g: Tensor, state: MatrixState, *, orthogonalize: bool, ns_steps: int = 5
) -> tuple[Tensor, MatrixState]:
    """Return the update direction u [..., m, n] of RMS 1 and the new accumulators; inputs are left untouched.

    It is zero for a matrix that never had a gradient. `theta` maps the 19 names to tensors of p's dtype. Apply as
    `p - lr * (u + weight_decay * p)`.
    """
    columns, new_state = matrix_columns(p, g, state)
    direction = mlp(theta, _normalise(columns, (-3, -2)))
    if orthogonalize:
        direction = _orthogonalize(direction, ns_steps)
    direction = torch.where(had_gradient(new_state.row_factor), direction, 0.0)
    return _normalise(direction, (-2, -1)), new_state


def _orthogonalize(direction: Tensor, steps: int) -> Tensor:
    """Newton-Schulz as it is defined; `celo2.newton_schulz` has forms of less work."""
    if direction.shape[-2] > direction.shape[-1]:
        return _orthogonalize(direction.mT, steps).mT
    x = direction / (torch.linalg.vector_norm(direction, dim=(-2, -1), keepdim=True) + EPS)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def vector_columns(p: Tensor, g: Tensor, state: VectorState) -> tuple[Tensor, VectorState]:
    """Return the 15 feature columns [n, 15] of a vector, not normalised, and its accumulators after a gradient."""
    g = g.clamp(-GRADIENT_CLIP, GRADIENT_CLIP)
    momentum = _ema(state.momentum, g[..., None], MOMENTUM_DECAYS)
    v = SECOND_MOMENT_DECAY * state.second_moment + (1 - SECOND_MOMENT_DECAY) * g * g
    factor = _ema(state.factor, (g * g + SQUARE_EPS)[..., None], FACTOR_DECAYS)
    q = torch.rsqrt(v + RMS_EPS)[..., None]
    g1 = g[..., None]
    columns = torch.cat(
        [
            g1,
            g1.clamp(-FEATURE_CLIP, FEATURE_CLIP),
            p[..., None],
            momentum,
            v[..., None],
            momentum * q,
            q,
            g1 * torch.rsqrt((factor + FACTOR_EPS).clamp_min(FACTOR_EPS)),
            g1 * q,
        ],
        dim=-1,
    )
    return columns, VectorState(momentum, v, factor)


def vector_has_started(old_factor: Tensor, square: Tensor) -> Tensor:
    """Whether a vector has a gradient now or had one, bool [1], given its factor [n, 3] and the sum of g^2."""
    return (square > 0) | had_gradient(old_factor)[..., 0]


def vector_update(theta: Mapping[str, Tensor], p: Tensor, g: Tensor, state: VectorState) -> tuple[Tensor, VectorState]:
    """Return the update direction u [n] of RMS 1 and the new accumulators of a vector (0-D counts as [1]).

    It is zero for a vector that never had a gradient in any element: as for a matrix, a whole is what the rule takes
    its means over.
    """
    columns, new_state = vector_columns(p, g, state)
    started = vector_has_started(state.factor, columns[..., 0].square().sum(-1))
    direction = torch.where(started, mlp(theta, _normalise(columns, (-2,))), 0.0)
    return _normalise(direction, (-1,)), new_state._replace(factor=new_state.factor * started)
