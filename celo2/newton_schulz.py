"""Newton-Schulz orthogonalisation: the five quintic iterations that Celo2 shares with Muon."""

from __future__ import annotations

import torch
from torch import Tensor

# quintic coefficients of Muon (https://kellerjordan.github.io/posts/muon/), used unchanged by Celo2
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-8
# rows computed at once of a symmetric product: few enough to skip most of the half above the diagonal, enough for
# matrix products at full speed
STRIP = 128


def _symmetric_baddbmm(add: Tensor, x: Tensor, y: Tensor, *, beta: float, alpha: float) -> Tensor:
    """Return beta * add + alpha * x @ y, [B, m, m], known to be symmetric: strips up to the diagonal, mirrored.

    `x` is [B, m, n], `y` [B, n, m]; `add` is [B, m, m], or anything of three axes when beta is 0.
    """
    m = x.shape[-2]
    if m <= STRIP:
        return torch.baddbmm(add, x, y, beta=beta, alpha=alpha)
    out = x.new_empty(x.shape[0], m, m)
    for start in range(0, m, STRIP):
        stop = min(start + STRIP, m)
        term = add[:, start:stop, :stop] if beta else add
        out[:, start:stop, :stop] = torch.baddbmm(term, x[:, start:stop], y[..., :stop], beta=beta, alpha=alpha)
        out[:, :start, start:stop] = out[:, start:stop, :start].mT
    return out


def newton_schulz(direction: Tensor, steps: int = 5) -> Tensor:
    """Approximately orthogonalise each matrix of `direction`.

    `direction` is `[..., rows, columns]` in float32 or float64, and so is the result (a new tensor, or a transposed
    view of one). Works on the shorter side: a tall matrix is transposed first. An all-zero matrix stays zero.
    Source: Celo2 (arXiv 2602.19142); the iteration is Muon's (Keller Jordan, 2024).
    """
    shape = direction.shape
    x = direction.reshape(-1, *shape[-2:])
    # row by row: a norm over all elements at once is one long float32 sum, which loses digits
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1, keepdim=True), dim=-2, keepdim=True)
    return iterate(x / (norm + EPS), steps).reshape(shape)


def iterate(x: Tensor, steps: int) -> Tensor:
    """Return `x` [B, m, n], of a norm of at most 1 each, after the iterations; a tall matrix is taken transposed."""
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    a, b, c = COEFFICIENTS
    nothing = x.new_zeros(1, 1, 1)
    for _ in range(steps):
        gram = _symmetric_baddbmm(nothing, x, x.mT, beta=0, alpha=1)
        polynomial = _symmetric_baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
