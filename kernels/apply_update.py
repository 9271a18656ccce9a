"""Phase 4: p <- p - lr (u + weight_decay p), u = d rsqrt(mean(d^2) + 1e-9), one pass.

Reads p and d, writes p: 12 bytes an element in float32. A bfloat16 parameter is rounded stochastically. The direction
counts for nothing where the factored second moments are zero: the matrix never had a gradient.
Source: Celo2 (arXiv 2602.19142).
"""

from __future__ import annotations

import triton
import triton.language as tl

from celo2.kernels import layout, rounding


@triton.jit
def apply_update_kernel(
    table_ptr,
    tiles_ptr,
    control_ptr,
    rates_ptr,  # float32 [groups, 2]: learning rate, weight decay
    p_like,
    d_like,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STEP_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    if not layout.accepted(control_ptr):
        return
    tile = tl.program_id(0)
    matrix, row0, _, rows, columns, column, own = layout.tile_of(table_ptr, tiles_ptr, tile, BLOCK_COLUMNS, ALIGNED)
    group = layout.entry(table_ptr, matrix, layout.GROUP)
    lr = tl.load(rates_ptr + group * layout.RATES)
    decay = tl.load(rates_ptr + group * layout.RATES + 1)
    square = tl.load(layout.sums_at(table_ptr, matrix, layout.DIRECTION_SQUARES))
    whole_rows = layout.entry(table_ptr, matrix, layout.WHOLE_ROWS)
    whole_columns = layout.entry(table_ptr, matrix, layout.WHOLE_COLS)
    scale = tl.rsqrt(square / (whole_rows.to(tl.float32) * whole_columns.to(tl.float32)) + layout.NORM_EPS)
    # this step's: `normalisers_kernel` has written them
    scale = tl.where(tl.load(layout.sums_at(table_ptr, matrix, layout.ROW_FACTOR)) > 0, scale, 0.0)

    p_stride = layout.length_of(table_ptr, matrix, layout.P_STRIDE, ALIGNED)
    p_ptr = layout.tensor_at(table_ptr, matrix, layout.P, p_like, ALIGNED) + column
    d_ptr = layout.tensor_at(table_ptr, matrix, layout.D, d_like, ALIGNED) + column
    seed = rounding.seed_of(table_ptr, matrix)
    o_column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    if not ALIGNED:
        # columns outside repeat the last one
        o_column = tl.minimum(o_column, (columns - 1 - column).to(tl.int32))
    for first in range(row0, tl.minimum(row0 + BLOCK_ROWS, rows), STEP_ROWS):
        step = tl.arange(0, STEP_ROWS)[:, None]
        mask = (first + step < rows) & own
        o_row = tl.minimum(step, rows - 1 - first)
        o_p = o_row * p_stride.to(tl.int32) + o_column
        p = tl.load(p_ptr + first * p_stride + o_p).to(tl.float32)
        d = tl.load(d_ptr + first * columns + (o_row * columns.to(tl.int32) + o_column)).to(tl.float32)
        p -= lr * (d * scale + decay * p)
        noise = rounding.noise_of(seed, first * p_stride + column, o_p, 2)
        rounding.store(p_ptr + first * p_stride + o_p, p, mask, noise, False, False)
