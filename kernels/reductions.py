"""What adds up the partial sums of tiles and chunks: three launches a step, a program or a few for each matrix.

The kernels that go over elements leave a sum for each tile, and every program that needs a matrix's total would have to
add all of them up again: quadratic in the number of tiles. These add them up once, in order and without atomics, so two
runs agree to the bit. They write where the table says the sums of whole matrices are (`layout`): beside the batch, or,
of a matrix that is cut over ranks, into the message that an all-reduce then adds up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from celo2.kernels import layout

EIGHT = tl.constexpr(8)
# programs a matrix: 18 sums of squares in eights, then those of its rows' chunks, and of its columns'
MOMENT_PROGRAMS = tl.constexpr(5)


@triton.jit
def sum_of(pointer, count, BLOCK: tl.constexpr):
    """Return the sum of `count` float32 in order of blocks."""
    total = tl.zeros([BLOCK], tl.float32)
    offset = tl.arange(0, BLOCK)
    for first in range(0, count, BLOCK):
        total += tl.load(pointer + first + offset, mask=first + offset < count, other=0.0)
    return tl.sum(total)


@triton.jit
def sum_gradients_kernel(
    table_ptr,  # int64 [matrices, COLUMNS]
    totals_ptr,  # float32 [tiles]: sums of squares
    clipped_totals_ptr,  # float32 [tiles]: the same of clipped gradients, read when CLIP
    matrix_totals_ptr,  # float32 [matrices], written
    clipped_matrix_totals_ptr,  # float32 [matrices], written when CLIP
    means_ptr,  # float32 [matrices, 4], three written: means of the factored second moments
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up a matrix's sums of g^2, and take the means of the factor that is here as a whole."""
    matrix = tl.program_id(0)
    first = layout.entry(table_ptr, matrix, layout.FIRST_TILE)
    tiles = layout.entry(table_ptr, matrix, layout.TILES)
    tl.store(matrix_totals_ptr + matrix, sum_of(totals_ptr + first, tiles, BLOCK))
    if CLIP:
        tl.store(clipped_matrix_totals_ptr + matrix, sum_of(clipped_totals_ptr + first, tiles, BLOCK))

    chunks = layout.entry(table_ptr, matrix, layout.ROW_CHUNKS) + layout.entry(table_ptr, matrix, layout.COLUMN_CHUNKS)
    if chunks == 0:
        # the matrix is on other ranks, its factors as well
        return
    factor_ptr = layout.sums_at(table_ptr, matrix, layout.MEAN_FACTOR)
    length = layout.entry(table_ptr, matrix, layout.MEAN_LENGTH)
    o_k = tl.arange(0, 4)
    o_entry = tl.arange(0, BLOCK // 4)
    total = tl.zeros([BLOCK // 4, 4], tl.float32)
    for start in range(0, length, BLOCK // 4):
        mask = (start + o_entry < length)[:, None] & (o_k < 3)[None, :]
        total += tl.load(factor_ptr + (start + o_entry)[:, None] * 3 + o_k[None, :], mask=mask, other=0.0)
    tl.store(means_ptr + matrix * 4 + o_k, tl.sum(total, axis=0) / length.to(tl.float32), mask=o_k < 3)


@triton.jit
def sum_moments_kernel(
    table_ptr,
    control_ptr,
    moments_ptr,  # float32 [tiles, ELEMENT_STRIDE]
    chunk_sums_ptr,  # float32 [chunks, CHUNK_STRIDE]
    BLOCK: tl.constexpr,
):
    """Add up a matrix's 18 sums of squares, or the 6 of its rows or of its columns."""
    if not layout.accepted(control_ptr):
        return
    matrix = tl.program_id(0)
    part = tl.program_id(1)
    # eight neighbouring sums are a sector of memory
    o_sum = tl.arange(0, EIGHT)
    inside = part * EIGHT + o_sum < layout.ELEMENT_COLUMNS
    source_ptr = moments_ptr + part * EIGHT
    stride = tl.full([], layout.ELEMENT_STRIDE, tl.int64)
    first = layout.entry(table_ptr, matrix, layout.FIRST_TILE)
    count = layout.entry(table_ptr, matrix, layout.TILES)
    target_ptr = layout.sums_at(table_ptr, matrix, layout.ELEMENT_MOMENTS) + part * EIGHT
    if part >= MOMENT_PROGRAMS - 2:
        inside = o_sum < layout.CHUNK_SUMS
        source_ptr = chunk_sums_ptr
        stride = tl.full([], layout.CHUNK_STRIDE, tl.int64)
        first = layout.entry(table_ptr, matrix, layout.ROW_CHUNK)
        count = layout.entry(table_ptr, matrix, layout.ROW_CHUNKS)
        target_ptr = layout.sums_at(table_ptr, matrix, layout.ROW_MOMENTS)
    if part == MOMENT_PROGRAMS - 1:
        first = layout.entry(table_ptr, matrix, layout.COLUMN_CHUNK)
        count = layout.entry(table_ptr, matrix, layout.COLUMN_CHUNKS)
        target_ptr = layout.sums_at(table_ptr, matrix, layout.COLUMN_MOMENTS)
    o_part = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, EIGHT], tl.float32)
    for start in range(0, count, BLOCK):
        mask = (start + o_part < count)[:, None] & inside[None, :]
        total += tl.load(source_ptr + (first + start + o_part)[:, None] * stride + o_sum[None, :], mask=mask, other=0.0)
    tl.store(target_ptr + o_sum, tl.sum(total, axis=0), mask=inside)


@triton.jit
def sum_directions_kernel(
    table_ptr,
    control_ptr,
    squares_ptr,  # float32 [tiles]: sums of d^2
    starts_ptr,  # float32 [matrices], written: 1 / (||d|| + EPS), what Newton-Schulz starts from
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up a matrix's sum of d^2."""
    if not layout.accepted(control_ptr):
        return
    matrix = tl.program_id(0)
    first = layout.entry(table_ptr, matrix, layout.FIRST_TILE)
    square = sum_of(squares_ptr + first, layout.entry(table_ptr, matrix, layout.TILES), BLOCK)
    tl.store(layout.sums_at(table_ptr, matrix, layout.DIRECTION_SQUARES), square)
    tl.store(starts_ptr + matrix, 1.0 / (tl.sqrt(square) + EPS))
