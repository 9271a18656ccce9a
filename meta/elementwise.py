"""The rule's elementwise work on matrices, in two regions that a compiler can fuse: nothing but its results is written.

The algebra is that of `celo2.phases`: 18 columns an element, with their normalisers folded into the first layer; what
depends on a row or a column only comes as terms that are added. The MLP is written out unit by unit. The weights have
the axis of the problems too, of size 1 where all share one theta; `celo2.meta` gives each problem its own.

Shapes: P problems, a matrix of m rows and n columns, h and k hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from celo2.reference import (
    FEATURE_CLIP,
    GRADIENT_CLIP,
    MOMENTUM_DECAYS,
    NORM_EPS,
    RMS_EPS,
    SECOND_MOMENT_DECAY,
)


def _element_columns(
    p: Tensor, g: Tensor, momenta: list[Tensor], v: Tensor, row_scale: Tensor, column_scale: Tensor
) -> list[Tensor]:
    """Return the 18 columns [P, m, n] of `celo2.folded.ELEMENT_ROWS`, not normalised."""
    q = torch.rsqrt(v + RMS_EPS)
    factors = [row_scale[:, k, :, None] * column_scale[:, k, None, :] for k in range(3)]
    return [
        g,
        *momenta,
        *(x * q for x in (g, *momenta)),
        *(g * factor for factor in factors),
        *(m * factor for m, factor in zip(momenta, factors, strict=True)),
        g.clamp(-FEATURE_CLIP, FEATURE_CLIP),
        p,
        v,
        q,
    ]


def advance_moments(
    p: Tensor, g: Tensor, momenta: list[Tensor], v: Tensor, row_scale: Tensor, column_scale: Tensor
) -> Tensor:
    """Advance three momenta and v [P, m, n] in place; return the normalisers [P, 18] of the element columns."""
    g = g.clamp(-GRADIENT_CLIP, GRADIENT_CLIP)
    advanced = [m + (1 - decay) * (g - m) for m, decay in zip(momenta, MOMENTUM_DECAYS, strict=True)]
    v_new = SECOND_MOMENT_DECAY * v + (1 - SECOND_MOMENT_DECAY) * g * g
    columns = _element_columns(p, g, advanced, v_new, row_scale, column_scale)
    squares = torch.stack([(x * x).mean((1, 2)) for x in columns], dim=1)
    for m, new in zip(momenta, advanced, strict=True):
        m.copy_(new)
    v.copy_(v_new)
    return torch.rsqrt(squares + NORM_EPS)


def mlp(
    columns: list[Tensor],
    bias: list[Tensor],
    first: Tensor,
    hidden: Tensor,
    bias1: Tensor,
    output: Tensor,
    bias2: Tensor,
) -> Tensor:
    """Push columns through the MLP unit by unit: nothing but the direction needs to be written."""
    h, k = hidden.shape[1:]
    spread = (-1, *(1,) * (columns[0].ndim - 1))

    # the weights at once instead of one by one: a compiler traces fewer operations
    def scalars(weights: Tensor) -> tuple[Tensor, ...]:
        return weights.reshape(*spread, weights[0].numel()).unbind(-1)

    w0, w1, b1, w2 = scalars(first), scalars(hidden), scalars(bias1), scalars(output)
    first_layer = []
    for unit, total in enumerate(bias):
        for column, x in enumerate(columns):
            total = total + x * w0[h * column + unit]
        first_layer.append(torch.relu(total))
    direction = bias2.view(spread)
    for unit in range(k):
        total = b1[unit]
        for source, x in enumerate(first_layer):
            total = total + x * w1[k * source + unit]
        direction = direction + torch.relu(total) * w2[unit]
    return direction


def matrix_direction(
    p: Tensor,
    g: Tensor,
    momenta: list[Tensor],
    v: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    row_term: Tensor,
    column_term: Tensor,
    element: Tensor,
    hidden: Tensor,
    bias1: Tensor,
    output: Tensor,
    bias2: Tensor,
) -> Tensor:
    """Return the direction d [P, m, n] from the advanced accumulators.

    `element` [P, 18, h] has the normalisers of `advance_moments` folded in, and one of the terms the bias.
    """
    g = g.clamp(-GRADIENT_CLIP, GRADIENT_CLIP)
    columns = _element_columns(p, g, momenta, v, row_scale, column_scale)
    bias = [row_term[:, unit, :, None] + column_term[:, unit, None, :] for unit in range(element.shape[2])]
    return mlp(columns, bias, element, hidden, bias1, output, bias2)
