"""Phase 1: sums of g^2 over rows and columns, the global norm, and from them the factored second moments.

    R_k <- d_k R_k + (1 - d_k) (mean over the longer axis of g^2 + 1e-30), C_k likewise over the shorter one
    rf_k = rsqrt(max(R_k / (mean(R_k) + 1e-9), 1e-9))        cf_k = rsqrt(max(C_k, 1e-9))

The factors of a matrix that never had a gradient stay zero, and `apply_update_kernel` leaves it where it is.
Three kernels: `gradient_moments_kernel` reads g once (4 bytes an element in float32) and leaves partial sums for each
tile; `control_kernel`, one program, adds up the norm of all matrices and decides on clipping and on the step;
`factors_kernel` adds up the partial sums of rows or columns in order, a chunk of them a program. No atomics, so two
runs agree to the bit.
Source: Celo2 (arXiv 2602.19142); the factored second moments are Adafactor's (Shazeer and Stern, 2018).
"""

from __future__ import annotations

import triton
import triton.language as tl

from celo2.kernels import layout
from celo2.kernels.reductions import sum_of


@triton.jit
def gradient_moments_kernel(
    table_ptr,  # int64 [matrices, COLUMNS]
    gradients_ptr,  # int64 [matrices]
    tiles_ptr,  # int32 [tiles, 3]
    unscale_ptr,  # float32: what the gradients are multiplied by before everything
    sums_ptr,  # float32: partial sums of rows and columns
    totals_ptr,  # float32 [tiles]: sums of squares
    clipped_totals_ptr,  # float32 [tiles]: the same of clipped gradients
    g_like,
    CLIP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0)
    matrix, row0, column0, rows, columns, column, own = layout.tile_of(
        table_ptr, tiles_ptr, tile, BLOCK_COLUMNS, ALIGNED
    )
    stride = layout.length_of(table_ptr, matrix, layout.G_STRIDE, ALIGNED)
    g_ptr = layout.gradient_at(gradients_ptr, matrix, g_like, ALIGNED)

    o_row = row0 + tl.arange(0, BLOCK_ROWS)
    o_column = tl.arange(0, BLOCK_COLUMNS)
    mask = (o_row < rows)[:, None] & own
    g = tl.load(g_ptr + o_row[:, None].to(tl.int64) * stride + (column + o_column)[None, :], mask=mask, other=0.0)
    g = g.to(tl.float32) * tl.load(unscale_ptr)
    square = g * g
    tl.store(totals_ptr + tile, tl.sum(square))
    if CLIP:
        # a NaN may get lost here; the sum above has it
        g = tl.clamp(g, -layout.GRADIENT_CLIP, layout.GRADIENT_CLIP)
        square = g * g
        tl.store(clipped_totals_ptr + tile, tl.sum(square))
    row_sums_ptr = sums_ptr + layout.entry(table_ptr, matrix, layout.ROW_SUMS)
    row_sums_ptr += (column0 // BLOCK_COLUMNS).to(tl.int64) * rows
    tl.store(row_sums_ptr + o_row, tl.sum(square, axis=1), mask=o_row < rows)
    column_sums_ptr = sums_ptr + layout.entry(table_ptr, matrix, layout.COLUMN_SUMS)
    column_sums_ptr += (row0 // BLOCK_ROWS).to(tl.int64) * columns + column
    tl.store((column_sums_ptr + o_column)[None, :], tl.sum(square, axis=0)[None, :], mask=own)


@triton.jit
def square_of(totals_ptr, matrices, norms_ptr, others, unscale, BLOCK: tl.constexpr):
    """Return a sum of squares in float64: of `matrices`, unscaled already, and of `others` norms that are not."""
    # float64, so that the order of the matrices does not show in a float32
    offset = tl.arange(0, BLOCK)
    square = tl.zeros([BLOCK], tl.float64)
    for first in range(0, matrices, BLOCK):
        square += tl.load(totals_ptr + first + offset, mask=first + offset < matrices, other=0.0).to(tl.float64)
    for first in range(0, others, BLOCK):
        norm = tl.load(norms_ptr + first + offset, mask=first + offset < others, other=0.0) * unscale
        square += norm.to(tl.float64) * norm.to(tl.float64)
    return tl.sum(square)


@triton.jit(do_not_specialize=["matrices", "others", "groups", "members", "ranks"])
def control_kernel(
    totals_ptr,  # float32 [matrices]: sums of squares, unscaled
    matrices,
    norms_ptr,  # float32 [others]: norms of all other gradients, as they came
    others,
    unscale_ptr,  # float32
    found_inf_ptr,  # float32: not zero when the step must be skipped
    limits_ptr,  # float32 [groups]: max_grad_norm, infinity for none
    groups,
    control_ptr,  # float32 [1 + groups, 2], written
    grad_norm_ptr,  # float32, written
    skip_ptr,  # float32, written: 1 when the step is skipped
    skipped_ptr,  # int64: counts the skipped steps
    message_ptr,  # float32: the first message, added up over the ranks; read when SHARDED
    members,  # sharded parameters
    ranks,
    SHARDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    unscale = tl.load(unscale_ptr)
    square = square_of(totals_ptr, matrices, norms_ptr, others, unscale, BLOCK)
    wrong = tl.load(found_inf_ptr) != 0
    if SHARDED:
        square += tl.load(message_ptr).to(tl.float64)
        wrong = wrong | (tl.load(message_ptr + 1) != 0)
        disagreements = tl.zeros([BLOCK], tl.int32)
        offset = tl.arange(0, BLOCK)
        for first in range(0, members, BLOCK):
            inside = first + offset < members
            flag = tl.load(message_ptr + layout.FLAGS + first + offset, mask=inside, other=0.0)
            disagreements += ((flag != 0) & (flag != ranks)).to(tl.int32)
        wrong = wrong | (tl.sum(disagreements) != 0)
    norm = tl.sqrt(square).to(tl.float32)
    # false for a NaN as well
    accepted = (norm < float("inf")) & (wrong == 0)
    tl.store(control_ptr, tl.where(accepted, 1.0, 0.0))
    tl.store(control_ptr + 1, norm)
    tl.store(grad_norm_ptr, norm)
    tl.store(skip_ptr, tl.where(accepted, 0.0, 1.0))
    tl.store(skipped_ptr, tl.load(skipped_ptr) + tl.where(accepted, 0, 1))
    for group in range(groups):
        clip = tl.minimum(tl.load(limits_ptr + group) / (norm + 1e-6), 1.0)
        tl.store(control_ptr + (1 + group) * layout.CONTROL, unscale * clip)
        tl.store(control_ptr + (1 + group) * layout.CONTROL + 1, clip * clip)


@triton.jit
def chunk_of(table_ptr, chunks_ptr, chunk, ALIGNED: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Return a chunk's matrix, whether it holds columns, its first entry, and which entries are inside and its own.

    A chunk of columns has the columns of a tile, the moved ones of a last tile included.
    """
    matrix = tl.load(chunks_ptr + 3 * chunk)
    of_columns = tl.load(chunks_ptr + 3 * chunk + 1) != 0
    start = tl.load(chunks_ptr + 3 * chunk + 2).to(tl.int64)
    length = layout.entry(table_ptr, matrix, layout.ROWS)
    if of_columns:
        length = layout.entry(table_ptr, matrix, layout.COLS)
    first = start
    if ALIGNED:
        if of_columns:
            first = tl.minimum(start, length - BLOCK_COLUMNS)
    offset = first + tl.arange(0, BLOCK_COLUMNS)
    return matrix, of_columns, length, offset, offset < length, offset >= start


@triton.jit
def factors_kernel(
    table_ptr,
    chunks_ptr,  # int32 [chunks, 3]: matrix, 0 for rows and 1 for columns, first entry
    control_ptr,
    means_ptr,  # float32 [matrices, 4]: means of the factor that is here as a whole
    vectors_ptr,  # float32 [chunks, UNIT + units, BLOCK_COLUMNS], planes FACTOR and SCALE written
    chunk_sums_ptr,  # float32 [chunks, CHUNK_STRIDE], written
    UNITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,  # partial sums read at once
):
    if not layout.accepted(control_ptr):
        return
    chunk = tl.program_id(0)
    matrix, of_columns, length, offset, inside, own = chunk_of(table_ptr, chunks_ptr, chunk, ALIGNED, BLOCK_COLUMNS)
    rows = layout.entry(table_ptr, matrix, layout.WHOLE_ROWS)
    columns = layout.entry(table_ptr, matrix, layout.WHOLE_COLS)
    factor_ptr = layout.sums_at(table_ptr, matrix, layout.ROW_FACTOR)
    column_factor_ptr = layout.sums_at(table_ptr, matrix, layout.COLUMN_FACTOR)
    rows_are_short = layout.entry(table_ptr, matrix, layout.ROWS_ARE_SHORT) != 0
    parts_ptr = layout.sums_at(table_ptr, matrix, layout.ROW_TOTALS)
    parts = layout.entry(table_ptr, matrix, layout.ROW_PARTS)
    other_length = columns
    is_short = rows_are_short
    if of_columns:
        factor_ptr = column_factor_ptr
        parts_ptr = layout.sums_at(table_ptr, matrix, layout.COLUMN_TOTALS)
        parts = layout.entry(table_ptr, matrix, layout.COLUMN_PARTS)
        other_length = rows
        is_short = not rows_are_short

    total = tl.zeros([PARTS, BLOCK_COLUMNS], tl.float32)
    for part in range(0, parts, PARTS):
        o_part = part + tl.arange(0, PARTS).to(tl.int64)
        mask = (o_part < parts)[:, None] & inside[None, :]
        total += tl.load(parts_ptr + o_part[:, None] * length + offset[None, :], mask=mask, other=0.0)
    square_scale = tl.load(control_ptr + (1 + layout.entry(table_ptr, matrix, layout.GROUP)) * layout.CONTROL + 1)
    mean = tl.sum(total, axis=0) / other_length.to(tl.float32) * square_scale + layout.SQUARE_EPS

    # the mean of either factor is the moving average of the matrix's mean g^2: no sum over the new ones is needed
    squares_ptr = layout.sums_at(table_ptr, matrix, layout.SQUARES)
    square_parts = layout.entry(table_ptr, matrix, layout.SQUARE_PARTS)
    size = rows.to(tl.float32) * columns.to(tl.float32)
    square = sum_of(squares_ptr, square_parts, 256)
    matrix_mean = square / size * square_scale + layout.SQUARE_EPS
    # a factor that is not zero has 1e-30 of every step, so it does not return to zero
    started = (square > 0) | (tl.load(means_ptr + 4 * matrix) > 0)

    planes_ptr = vectors_ptr + chunk.to(tl.int64) * ((layout.UNIT + UNITS) * BLOCK_COLUMNS)
    planes_ptr += tl.arange(0, BLOCK_COLUMNS)
    for k in tl.static_range(3):
        old = tl.load(factor_ptr + offset * 3 + k, mask=inside, other=0.0)
        factor = tl.where(started, layout.DECAYS[k] * old + (1 - layout.DECAYS[k]) * mean, 0.0)
        scale = factor
        if is_short:
            factor_mean = layout.DECAYS[k] * tl.load(means_ptr + 4 * matrix + k) + (1 - layout.DECAYS[k]) * matrix_mean
            scale = factor / (factor_mean + layout.FACTOR_EPS)
        scale = tl.rsqrt(tl.maximum(scale, layout.FACTOR_EPS))
        tl.store(planes_ptr + (layout.FACTOR + k) * BLOCK_COLUMNS, factor)
        tl.store(planes_ptr + (layout.SCALE + k) * BLOCK_COLUMNS, scale)
        mine = inside & own
        tl.store(chunk_sums_ptr + chunk * layout.CHUNK_STRIDE + k, tl.sum(tl.where(mine, factor * factor, 0.0)))
        inverse = tl.where(mine, 1.0 / (factor + layout.RMS_EPS), 0.0)
        tl.store(chunk_sums_ptr + chunk * layout.CHUNK_STRIDE + 3 + k, tl.sum(inverse))
