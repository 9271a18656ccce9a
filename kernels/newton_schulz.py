"""Newton-Schulz on the tensor cores: symmetric products by their lower half.

    A = X X^T        B = b A + c A A        X <- a X + B X

A and B are symmetric: a program computes one tile on or below the diagonal and stores it twice, so half of the
multiplications of two of the three products are left out. Batched over matrices of equal shape; accumulates in float32.
Source: Celo2 (arXiv 2602.19142); coefficients of Muon (Keller Jordan, 2024).
"""

from __future__ import annotations

import triton
import triton.language as tl


def inner_block(element_size: int) -> int:
    """Return how much of the inner axis a program takes at a time, for elements of that many bytes."""
    return 32 if element_size == 4 else 64


@triton.jit
def symmetric_product_kernel(
    x_ptr,  # [batch, size, inner]
    add_ptr,  # [batch, size, size], read when BETA is not 0
    out_ptr,  # [batch, size, size], contiguous: alpha X X^T + BETA add
    size,
    inner,
    x_batch,
    x_row,
    x_column,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    # the tiles on and below the diagonal, row by row: tile t is in the largest row i with i (i + 1) / 2 <= t
    t = tl.program_id(0)
    i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # the root may be off by one in its last bit
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    j = t - i * (i + 1) // 2
    batch = tl.program_id(1).to(tl.int64)
    x_ptr += batch * x_batch
    o_i = i * BLOCK + tl.arange(0, BLOCK)
    o_j = j * BLOCK + tl.arange(0, BLOCK)
    o_inner = tl.arange(0, BLOCK_INNER)
    left_ptr = x_ptr + o_i.to(tl.int64)[:, None] * x_row + o_inner.to(tl.int64)[None, :] * x_column
    right_ptr = x_ptr + o_j.to(tl.int64)[None, :] * x_row + o_inner.to(tl.int64)[:, None] * x_column
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, inner, BLOCK_INNER):
        inside = first + o_inner < inner
        left = tl.load(left_ptr, mask=(o_i < size)[:, None] & inside[None, :], other=0.0)
        right = tl.load(right_ptr, mask=(o_j < size)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        left_ptr += BLOCK_INNER * x_column
        right_ptr += BLOCK_INNER * x_column
    total *= ALPHA
    base = batch * size * size
    mask = (o_i < size)[:, None] & (o_j < size)[None, :]
    here = base + o_i.to(tl.int64)[:, None] * size + o_j[None, :]
    if BETA != 0:
        total += BETA * tl.load(add_ptr + here, mask=mask, other=0.0).to(tl.float32)
    total = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + here, total, mask=mask)
    if i != j:
        mirrored = base + o_j.to(tl.int64)[:, None] * size + o_i[None, :]
        tl.store(out_ptr + mirrored, tl.trans(total), mask=tl.trans(mask))
