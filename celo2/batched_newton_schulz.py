"""Newton-Schulz on batches of directions on a GPU: who computes what, by shape.

A matrix whose shorter side is at most 128 is taken whole by one program. Of larger ones the symmetric products go
through the kernel from a size on, below it through PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from celo2 import newton_schulz
from celo2.compilation import launch
from celo2.exchanges import Owned
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
    x = _oriented(d)
    x.copy_(newton_schulz.orthogonalize(x, ns_steps, products_for(x)))
    # of what is stored: of the Gram matrix it would cost a product of its own, and have that one's rounding
    norm = torch.linalg.vector_norm(d, dim=-1, dtype=torch.float32).square()
    torch.sum(norm, dim=-1, out=squares)


def orthogonalize_part_(
    d: Tensor, owned: Owned, squares: Tensor, add_up: Callable[[Tensor], None], *, exact: bool
) -> None:
    """Replace this rank's block `d` [B, rows, columns] of shared directions by that of their orthogonalised form.

    Writes the sums of squares of whole matrices to `squares` [B]; `add_up` adds a tensor up over the ranks, and `exact`
    says whether products of float32 are not rounded.
    """

    def sum_squares() -> None:
        torch.sum(torch.linalg.vector_norm(d, dim=-1, dtype=torch.float32).square(), dim=-1, out=squares)
        add_up(squares)

    sum_squares()
    torch.mul(d, (squares.sqrt() + EPS).reciprocal_()[:, None, None], out=d)
    x, length = (d.mT, owned.m) if owned.m > owned.n else (d, owned.n)
    wide = None if d.device.type == "cpu" else wide_gram
    x.copy_(newton_schulz.orthogonalize_part(x, length, owned.ns_steps, add_up, products_for(x), wide, exact))
    sum_squares()


def _oriented(d: Tensor) -> Tensor:
    """View directions [B, m, n] with the shorter side first."""
    return d.mT if d.shape[-2] > d.shape[-1] else d


def wide_gram(x: Tensor) -> Tensor:
    """Return X X^T in float32 by the kernel, of X [B, m, n]."""
    return symmetric_product(x, x.mT, dtype=torch.float32)


def takes_one_program(d: Tensor, ns_steps: int) -> bool:
    """Whether directions [B, m, n] are taken whole, a program each: in float16, on a GPU."""
    small = newton_schulz.takes_one_program(min(d.shape[-2:]), ns_steps)
    return small and d.dtype == torch.float16 and d.device.type != "cpu"


def orthogonalize_small_(d: Tensor, ns_steps: int, squares: Tensor) -> None:
    """Replace `d` [B, m, n], the shorter side at most `SMALL`, by one program each; write sums of squares."""
    x = _oriented(d)
    batch, m, n = x.shape
    a, b, c = COEFFICIENTS
    launch(small_orthogonalize_kernel, (batch,),
        x, squares, m, n, *x.stride(), A=a, B=b, C=c, EPS=EPS, FIRST=FIRST_SEGMENT, REST=ns_steps - FIRST_SEGMENT,
        **small_block(padded_rows(m)),
    )  # fmt: skip


def takes_symmetric_products(rows: int, device: torch.device) -> bool:
    """Whether all symmetric products [B, rows, rows] go through the kernel."""
    return rows >= SYMMETRIC_FROM and device.type != "cpu"


def products_for(x: Tensor) -> SymmetricProduct | None:
    """Return what computes the symmetric products of X [B, m, n], of the shorter side first; None for PyTorch."""
    if takes_symmetric_products(x.shape[-2], x.device):
        return symmetric_product
    return None if x.device.type == "cpu" else _small_product


def _small_product(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """A product of small matrices by PyTorch, but for what rounding takes: the kernel has it in float32."""
    return symmetric_product(x, y, **options) if options.get("low") is not None else product(x, y, **options)


def rehearse_products(d: Tensor, ns_steps: int, squares: Tensor, owned: Owned | None = None) -> None:
    """Launch the kernels of `orthogonalize_(d, ...)` once each, in every layout that they see.

    Those of `orthogonalize_part_` for matrices that are `owned` with others.
    """
    is_shared = owned is not None and owned.parts > 1
    if not is_shared and takes_one_program(d, ns_steps):
        orthogonalize_small_(d, ns_steps, squares)
        return
    x, length = _oriented(d), max(d.shape[-2:])
    if owned is not None:
        x, length = (d.mT, owned.m) if owned.m > owned.n else (d, owned.n)
    symmetric = products_for(x)
    if symmetric is None:
        return
    a, b, c = COEFFICIENTS
    is_gram = newton_schulz.takes_gram_form(x, length)
    # only the first X is a tall matrix's transposed storage
    for number in segments(ns_steps) if is_gram else range(min(ns_steps, 2)):
        low = None
        if is_gram and number > FIRST_SEGMENT and x.itemsize == 2:
            low = x.new_empty(x.shape[0], x.shape[1], x.shape[1])
        gram = wide_gram(x).to(x.dtype) if is_shared else symmetric(x, x.mT, low=low)
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
    dtype: torch.dtype | None = None,
    block: int = 128,
) -> Tensor:
    """Return a symmetric product by the kernel, as `celo2.newton_schulz.SymmetricProduct`; `add` is contiguous.

    `dtype` is that of the result, by default that of `x`.
    """
    batch, size, inner = x.shape
    out = x.new_empty(batch, size, size, dtype=dtype)
    tiles = -(-size // block)
    alpha, beta = (1.0, 0.0) if add is None else (alpha, beta)
    launch(symmetric_product_kernel, (tiles * (tiles + 1) // 2, batch),
        x, y, out if add is None else add, out, out if low is None else low, size, inner, *x.stride(), *y.stride(),
        ALPHA=alpha, BETA=beta, DIAGONAL=diagonal, LOW=low is not None, PRECISION="ieee", BLOCK=block,
        BLOCK_INNER=inner_block(x.element_size()), num_warps=8,
    )  # fmt: skip
    return out
