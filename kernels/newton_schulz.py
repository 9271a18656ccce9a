"""Newton-Schulz on the tensor cores: symmetric products by their lower half, and small matrices in one program each.

`celo2.newton_schulz` has the two forms. A symmetric product computes one tile on or below the diagonal in a program and
stores it twice, so half of the multiplications are left out. A matrix whose shorter side is at most 128, an attention
head, is taken whole by one program in the Gram form, in float16: its m x m matrices never leave the chip, and X is read
three times and written once. Both accumulate in float32. Source: Celo2 (arXiv 2602.19142); coefficients of Muon (Keller
Jordan, 2024).
"""

from __future__ import annotations

import triton
import triton.language as tl


def inner_block(element_size: int) -> int:
    """Return how much of the inner axis a program takes at a time, for elements of that many bytes."""
    return 32 if element_size == 4 else 64


def small_block(padded: int) -> dict[str, int]:
    """Return how a program takes a matrix of so many rows, a power of two: rows, columns at a time, and warps."""
    # more would not fit into registers, on sm_90 and sm_100; sm_80 and gfx942 spill at 128 rows
    large = padded == 128
    return {"M": padded, "BLOCK": 32 if large else 64, "num_warps": 8 if large else 4}


@triton.jit
def symmetric_product_kernel(
    x_ptr,  # [batch, size, inner]
    y_ptr,  # [batch, inner, size]
    add_ptr,  # [batch, size, size], read when BETA is not 0
    out_ptr,  # [batch, size, size], contiguous: ALPHA X Y + BETA add + DIAGONAL I, which is symmetric
    low_ptr,  # [batch, size, size], contiguous, written when LOW: what rounding took from it
    size,
    inner,
    x_batch,
    x_row,
    x_column,
    y_batch,
    y_row,
    y_column,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    DIAGONAL: tl.constexpr,
    LOW: tl.constexpr,
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
    o_i = i * BLOCK + tl.arange(0, BLOCK)
    o_j = j * BLOCK + tl.arange(0, BLOCK)
    o_inner = tl.arange(0, BLOCK_INNER)
    left_ptr = x_ptr + batch * x_batch + o_i.to(tl.int64)[:, None] * x_row + o_inner.to(tl.int64)[None, :] * x_column
    right_ptr = y_ptr + batch * y_batch + o_j.to(tl.int64)[None, :] * y_column + o_inner.to(tl.int64)[:, None] * y_row
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, inner, BLOCK_INNER):
        inside = first + o_inner < inner
        left = tl.load(left_ptr, mask=(o_i < size)[:, None] & inside[None, :], other=0.0)
        right = tl.load(right_ptr, mask=(o_j < size)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        left_ptr += BLOCK_INNER * x_column
        right_ptr += BLOCK_INNER * y_row
    total *= ALPHA
    base = batch * size * size
    mask = (o_i < size)[:, None] & (o_j < size)[None, :]
    here = base + o_i.to(tl.int64)[:, None] * size + o_j[None, :]
    if BETA != 0:
        total += BETA * tl.load(add_ptr + here, mask=mask, other=0.0).to(tl.float32)
    if DIAGONAL != 0:
        total += tl.where(o_i[:, None] == o_j[None, :], DIAGONAL, 0.0)
    mirrored = base + o_j.to(tl.int64)[:, None] * size + o_i[None, :]
    rounded = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + here, rounded, mask=mask)
    if i != j:
        tl.store(out_ptr + mirrored, tl.trans(rounded), mask=tl.trans(mask))
    if LOW:
        low = (total - rounded.to(tl.float32)).to(low_ptr.dtype.element_ty)
        tl.store(low_ptr + here, low, mask=mask)
        if i != j:
            tl.store(low_ptr + mirrored, tl.trans(low), mask=tl.trans(mask))


@triton.jit
def gram_polynomial(
    gram, identity, dtype: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr
):
    """Return Q [M, M] with X <- Q X after so many iterations, of X X^T in float32, in `dtype`."""
    r = gram.to(dtype)
    q = r
    for step in tl.static_range(STEPS):
        p = tl.dot(r, r) * C + r.to(tl.float32) * B
        p = tl.where(identity, p + A, p).to(dtype)
        q = p if step == 0 else tl.dot(p, q).to(dtype)
        if step + 1 < STEPS:
            half = tl.dot(r, p)
            if step == 0 and STEPS > 2:
                # what rounding took from R
                half += A * (gram - r.to(tl.float32))
            r = tl.dot(p, half.to(dtype)).to(dtype)
    return q


@triton.jit
def small_orthogonalize_kernel(
    d_ptr,  # [batch, m, n], m at most M: directions, replaced by their orthogonalised form
    squares_ptr,  # float32 [batch], written: the sums of its squares
    m,
    n,
    d_batch,
    d_row,
    d_column,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    EPS: tl.constexpr,
    FIRST: tl.constexpr,  # iterations of the first segment
    REST: tl.constexpr,  # and of the second
    M: tl.constexpr,
    BLOCK: tl.constexpr,  # columns at a time
):
    """Orthogonalise one matrix: three passes over its columns, with polynomials of its Gram matrix between them."""
    batch = tl.program_id(0).to(tl.int64)
    o_row = tl.arange(0, M)
    o_column = tl.arange(0, BLOCK)
    d_ptr += batch * d_batch + o_row.to(tl.int64)[:, None] * d_row + o_column.to(tl.int64)[None, :] * d_column
    own = (o_row < m)[:, None]
    identity = o_row[:, None] == o_row[None, :]
    dtype: tl.constexpr = d_ptr.dtype.element_ty

    gram = tl.zeros([M, M], tl.float32)
    x_ptr = d_ptr
    for first in range(0, n, BLOCK):
        x = tl.load(x_ptr, mask=own & (first + o_column < n)[None, :], other=0.0)
        gram = tl.dot(x, tl.trans(x), gram)
        x_ptr += BLOCK * d_column
    # the norm of D is the trace of D D^T
    square = tl.sum(tl.where(identity, gram, 0.0))
    inverse = 1.0 / (tl.sqrt(square) + EPS)
    before = gram_polynomial(gram * inverse * inverse, identity, dtype, A, B, C, FIRST)

    # X after the first segment is computed twice rather than stored. Q's product over both parts would lose its digits
    gram = tl.zeros([M, M], tl.float32)
    x_ptr = d_ptr
    for first in range(0, n, BLOCK):
        x = tl.load(x_ptr, mask=own & (first + o_column < n)[None, :], other=0.0)
        x = (tl.dot(before, x) * inverse).to(dtype)
        gram = tl.dot(x, tl.trans(x), gram)
        x_ptr += BLOCK * d_column
    after = gram_polynomial(gram, identity, dtype, A, B, C, REST)

    total = tl.zeros([M, BLOCK], tl.float32)
    x_ptr = d_ptr
    for first in range(0, n, BLOCK):
        mask = own & (first + o_column < n)[None, :]
        x = tl.load(x_ptr, mask=mask, other=0.0)
        x = tl.dot(after, (tl.dot(before, x) * inverse).to(dtype)).to(dtype)
        tl.store(x_ptr, x, mask=mask)
        total += tl.where(mask, x.to(tl.float32), 0.0) * x.to(tl.float32)
        x_ptr += BLOCK * d_column
    tl.store(squares_ptr + batch, tl.sum(total))
