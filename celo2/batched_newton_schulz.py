"""Newton-Schulz on batches of directions on a GPU: who computes what, by shape.

A matrix whose shorter side is at most 128 is taken whole by one program. Of larger ones the symmetric products go
through the kernel from a size on, below it through PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from celo2 import newton_schulz
from celo2.compilation import launch
from celo2.kernels.newton_schulz import (
    inner_block,
    small_block,
    small_orthogonalize_kernel,
    symmetric_product_kernel,
)
from celo2.newton_schulz import (
    COEFFICIENTS,
    EPS,
    FIRST_SEGMENT,
    SYMMETRIC_FROM,
    SymmetricProduct,
    padded_rows,
    product,
    segments,
)


def orthogonalize_(d: Tensor, starts: Tensor, ns_steps: int, squares: Tensor) -> None:
    """Replace directions `d` [B, m, n] by their orthogonalised form; write the sums of its squares to `squares` [B].

    `starts` [B] has 1 / (||d|| + eps).
    """
    if takes_one_program(d, ns_steps):
        orthogonalize_small_(d, ns_steps, squares)
        return
    # in float32: the start of a matrix of zeros is beyond float16
    torch.mul(d, starts[:, None, None], out=d)
    d.copy_(newton_schulz.orthogonalize(d, ns_steps, products_for(d)))
    # of what is stored: of the Gram matrix it would cost a product of its own, and have that one's rounding
    norm = torch.linalg.vector_norm(d, dim=-1, dtype=torch.float32).square()
    torch.sum(norm, dim=-1, out=squares)


def takes_one_program(d: Tensor, ns_steps: int) -> bool:
    """Whether directions [B, m, n] are taken whole, a program each: in float16, on a GPU."""
    small = newton_schulz.takes_one_program(min(d.shape[-2:]), ns_steps)
    return small and d.dtype == torch.float16 and d.device.type != "cpu"


def orthogonalize_small_(d: Tensor, ns_steps: int, squares: Tensor) -> None:
    """Replace `d` [B, m, n], the shorter side at most `SMALL`, by one program each; write sums of squares."""
    x = d.mT if d.shape[-2] > d.shape[-1] else d
    batch, m, n = x.shape
    a, b, c = COEFFICIENTS
    launch(small_orthogonalize_kernel, (batch,),
        x, squares, m, n, *x.stride(), A=a, B=b, C=c, EPS=EPS, FIRST=FIRST_SEGMENT, REST=ns_steps - FIRST_SEGMENT,
        **small_block(padded_rows(m)),
    )  # fmt: skip


def takes_symmetric_products(d: Tensor) -> bool:
    """Whether all symmetric products of directions [B, m, n] go through the kernel."""
    return min(d.shape[-2:]) >= SYMMETRIC_FROM and d.device.type != "cpu"


def products_for(d: Tensor) -> SymmetricProduct | None:
    """Return what computes the symmetric products of directions [B, m, n]; None for PyTorch."""
    if takes_symmetric_products(d):
        return symmetric_product
    return None if d.device.type == "cpu" else _small_product


def _small_product(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """A product of small matrices by PyTorch, but for what rounding takes: the kernel has it in float32."""
    return symmetric_product(x, y, **options) if options.get("low") is not None else product(x, y, **options)


def rehearse_products(d: Tensor, ns_steps: int, squares: Tensor) -> None:
    """Launch the kernels of `orthogonalize_(d, ...)` once each, in every layout that they see."""
    if takes_one_program(d, ns_steps):
        orthogonalize_small_(d, ns_steps, squares)
        return
    symmetric = products_for(d)
    if symmetric is None:
        return
    a, b, c = COEFFICIENTS
    x = d.mT if d.shape[-2] > d.shape[-1] else d
    is_gram = newton_schulz.takes_gram_form(x)
    # only the first X is a tall matrix's transposed storage
    for length in segments(ns_steps) if is_gram else range(min(ns_steps, 2)):
        low = None
        if is_gram and length > FIRST_SEGMENT and x.itemsize == 2:
            low = x.new_empty(x.shape[0], x.shape[1], x.shape[1])
        gram = symmetric(x, x.mT, low=low)
        symmetric(gram, gram, alpha=c, add=gram, beta=b, diagonal=a if is_gram else 0.0)
        if is_gram:
            symmetric(gram, gram)
        if low is not None:
            symmetric(gram, gram, add=low, beta=a)
        x = x.contiguous()


def symmetric_product(
    x: Tensor,
    y: Tensor,
    *,
    add: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    diagonal: float = 0.0,
    low: Tensor | None = None,
    block: int = 128,
) -> Tensor:
    """Return a symmetric product by the kernel, as `celo2.newton_schulz.SymmetricProduct`; `add` is contiguous."""
    batch, size, inner = x.shape
    out = x.new_empty(batch, size, size)
    tiles = -(-size // block)
    alpha, beta = (1.0, 0.0) if add is None else (alpha, beta)
    launch(symmetric_product_kernel, (tiles * (tiles + 1) // 2, batch),
        x, y, out if add is None else add, out, out if low is None else low, size, inner, *x.stride(), *y.stride(),
        ALPHA=alpha, BETA=beta, DIAGONAL=diagonal, LOW=low is not None, PRECISION="ieee", BLOCK=block,
        BLOCK_INNER=inner_block(x.element_size()), num_warps=8,
    )  # fmt: skip
    return out
