"""Newton-Schulz on batches of directions: symmetric products by the kernel for large matrices, the rest by PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from celo2.compilation import launch
from celo2.kernels.newton_schulz import inner_block, symmetric_product_kernel
from celo2.newton_schulz import COEFFICIENTS, iterate


def orthogonalize_(d: Tensor, starts: Tensor, ns_steps: int, squares: Tensor) -> None:
    """Replace directions `d` [B, m, n] by their orthogonalised form; write the sums of its squares to `squares` [B].

    `starts` [B] has 1 / (||d|| + eps).
    """
    x = d * starts[:, None, None].to(d.dtype)
    d.copy_(orthogonalize(x, ns_steps))
    norm = torch.linalg.vector_norm(d, dim=-1, dtype=torch.float32).square()
    torch.sum(norm, dim=-1, out=squares)


# the shorter side from which half of a symmetric product is worth a kernel of our own
SYMMETRIC_FROM = 512


def orthogonalize(x: Tensor, steps: int, symmetric_from: int = SYMMETRIC_FROM, block: int = 128) -> Tensor:
    """Newton-Schulz on `x` [B, m, n], of a norm of at most 1 each, in its dtype; small ones and CPUs by PyTorch."""
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.mT, steps, symmetric_from, block).mT
    if not takes_symmetric_products(x, symmetric_from):
        return iterate(x, steps)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = symmetric_product(x, block=block)
        x = torch.baddbmm(x, symmetric_product(gram, alpha=c, add=gram, beta=b, block=block), x, beta=a)
    return x


def takes_symmetric_products(x: Tensor, symmetric_from: int = SYMMETRIC_FROM) -> bool:
    """Whether the products of `x` [B, m, n] go through the kernel of symmetric ones."""
    return min(x.shape[-2:]) >= symmetric_from and (x.device.type != "cpu" or symmetric_from != SYMMETRIC_FROM)


def rehearse_products(d: Tensor) -> None:
    """Launch the symmetric products of `orthogonalize(d, ...)` once each, in every layout that they see."""
    if not takes_symmetric_products(d):
        return
    _, b, c = COEFFICIENTS
    # a tall matrix is transposed storage in the first iteration alone
    for x in (d.mT, d.mT.contiguous()) if d.shape[-2] > d.shape[-1] else (d,):
        gram = symmetric_product(x)
        symmetric_product(gram, alpha=c, add=gram, beta=b)


def symmetric_product(
    x: Tensor, *, alpha: float = 1.0, add: Tensor | None = None, beta: float = 0.0, block: int = 128
) -> Tensor:
    """Return alpha X X^T + beta add, [B, m, m], for X [B, m, n] and a symmetric `add` [B, m, m]."""
    batch, size, inner = x.shape
    out = x.new_empty(batch, size, size)
    tiles = -(-size // block)
    launch(symmetric_product_kernel, (tiles * (tiles + 1) // 2, batch),
        x, x if add is None else add, out, size, inner, *x.stride(), ALPHA=alpha, BETA=beta, PRECISION="ieee",
        BLOCK=block, BLOCK_INNER=inner_block(x.element_size()), num_warps=8,
    )  # fmt: skip
    return out
