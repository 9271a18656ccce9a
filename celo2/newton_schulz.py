"""Newton-Schulz orthogonalisation: the five quintic iterations that Celo2 shares with Muon."""

from __future__ import annotations

import torch
from torch import Tensor

# quintic coefficients of Muon (https://kellerjordan.github.io/posts/muon/), used unchanged by Celo2
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-8


def newton_schulz(direction: Tensor, steps: int = 5) -> Tensor:
    """Approximately orthogonalise each matrix of `direction`.

    `direction` is `[..., rows, columns]` in float32 or float64, and so is the result (a new tensor, or a transposed
    view of one). Works on the shorter side: a tall matrix is transposed first. An all-zero matrix stays zero.
    Source: Celo2, section 4 of the update rule.
    """
    shape = direction.shape
    x = direction.reshape(-1, *shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + EPS)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    if tall:
        x = x.mT
    return x.reshape(shape)
