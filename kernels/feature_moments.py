"""Phase 2: the normalisers rsqrt(mean(x^2) + 1e-9) of the columns, and the first layer's row and column contributions.

`feature_moments_kernel` reads g p m_k v, 24 bytes an element in float32, and leaves 18 sums of squares a tile. Squares
alone are formed, so nothing takes a root: q^2 = 1 / (v + 1e-8), clip(g)^2 = min(g^2, 0.01). Once they are added up,
`normalisers_kernel` adds the 12 columns that depend on a row or a column to the bias, and commits the factored second
moments and the step counters; a program has a chunk of a matrix's rows or columns.
Source: Celo2 (arXiv 2602.19142).
"""

from __future__ import annotations

import triton
import triton.language as tl

from celo2.kernels import layout, rounding
from celo2.kernels.gradient_moments import chunk_of


@triton.jit
def sum_in_fours(x):
    """Sum [rows, columns] over four neighbouring columns: the four that a thread holds, so threads exchange nothing."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 4, 4]), axis=2)


@triton.jit
def feature_moments_kernel(
    table_ptr,
    gradients_ptr,  # int64 [matrices]
    tiles_ptr,
    control_ptr,
    vectors_ptr,
    moments_ptr,  # float32 [tiles, ELEMENT_STRIDE], written
    p_like,
    g_like,
    m_like,
    v_like,
    UNITS: tl.constexpr,
    CLIP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STEP_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    if not layout.accepted(control_ptr):
        return
    tile = tl.program_id(0)
    matrix, row0, column0, rows, columns, column, own = layout.tile_of(
        table_ptr, tiles_ptr, tile, BLOCK_COLUMNS, ALIGNED
    )
    gradient_scale = layout.gradient_scale_of(control_ptr, table_ptr, matrix)

    p_stride = layout.length_of(table_ptr, matrix, layout.P_STRIDE, ALIGNED)
    g_stride = layout.length_of(table_ptr, matrix, layout.G_STRIDE, ALIGNED)
    state_stride = layout.length_of(table_ptr, matrix, layout.STATE_STRIDE, ALIGNED)
    p_ptr = layout.tensor_at(table_ptr, matrix, layout.P, p_like, ALIGNED) + column
    g_ptr = layout.gradient_at(gradients_ptr, matrix, g_like, ALIGNED) + column
    m0_ptr = layout.tensor_at(table_ptr, matrix, layout.MOMENTUM, m_like, ALIGNED) + column
    m1_ptr = layout.tensor_at(table_ptr, matrix, layout.MOMENTUM + 1, m_like, ALIGNED) + column
    m2_ptr = layout.tensor_at(table_ptr, matrix, layout.MOMENTUM + 2, m_like, ALIGNED) + column
    v_ptr = layout.tensor_at(table_ptr, matrix, layout.V, v_like, ALIGNED) + column

    row_ptr, column_ptr = layout.vectors_of(
        table_ptr, vectors_ptr, matrix, row0, column0, layout.UNIT + UNITS, STEP_ROWS, BLOCK_COLUMNS
    )
    o_column = tl.arange(0, BLOCK_COLUMNS)[None, :]

    QUANTISED: tl.constexpr = m_like.dtype.element_ty == tl.int8
    scale_ptr, quanta, o_quantum = layout.quanta_of(table_ptr, matrix, columns, column, BLOCK_COLUMNS)
    sums = ()
    for _ in tl.static_range(layout.ELEMENT_COLUMNS):
        sums = sums + (tl.zeros([STEP_ROWS, BLOCK_COLUMNS // 4], tl.float32),)
    for first in range(row0, tl.minimum(row0 + BLOCK_ROWS, rows), STEP_ROWS):
        step = tl.arange(0, STEP_ROWS)[:, None]
        mask = (first + step < rows) & own
        # rows outside are masked, but their vectors are read
        o_row = tl.minimum(step, rows - 1 - first)
        o_state = step * state_stride.to(tl.int32) + o_column
        s = first * state_stride
        g = tl.load(g_ptr + first * g_stride + (step * g_stride.to(tl.int32) + o_column), mask=mask, other=0.0)
        v = tl.load(v_ptr + s + o_state, mask=mask, other=0.0).to(tl.float32)
        p = tl.load(p_ptr + first * p_stride + (step * p_stride.to(tl.int32) + o_column), mask=mask, other=0.0)
        momenta = (
            tl.load(m0_ptr + s + o_state, mask=mask, other=0.0).to(tl.float32),
            tl.load(m1_ptr + s + o_state, mask=mask, other=0.0).to(tl.float32),
            tl.load(m2_ptr + s + o_state, mask=mask, other=0.0).to(tl.float32),
        )
        if QUANTISED:
            scales_ptr = scale_ptr + ((first + o_row) * quanta + tl.minimum(o_quantum, quanta - 1)) * 3
            momenta = rounding.scaled_momenta(momenta, scales_ptr)
        g = g.to(tl.float32) * gradient_scale
        if CLIP:
            g = tl.clamp(g, -layout.GRADIENT_CLIP, layout.GRADIENT_CLIP)
        g2 = g * g
        v = layout.SECOND_MOMENT_DECAY * v + (1 - layout.SECOND_MOMENT_DECAY) * g2
        q = tl.rsqrt(v + layout.RMS_EPS)
        q2 = tl.where(mask, q * q, 0.0)
        p = p.to(tl.float32)
        squares = (g2,)
        for k in tl.static_range(3):
            m = momenta[k] + (1 - layout.DECAYS[k]) * (g - momenta[k])
            squares = squares + (m * m,)
        columns_2 = squares
        for k in tl.static_range(4):
            columns_2 = columns_2 + (squares[k] * q2,)
        factors = ()
        for k in tl.static_range(3):
            plane = (layout.SCALE + k) * BLOCK_COLUMNS
            scale = tl.load(row_ptr + (first - row0) + o_row + plane) * tl.load(column_ptr + plane)
            factors = factors + (scale * scale,)
        for k in tl.static_range(3):
            columns_2 = columns_2 + (g2 * factors[k],)
        for k in tl.static_range(3):
            columns_2 = columns_2 + (squares[1 + k] * factors[k],)
        clipped = tl.minimum(g2, layout.FEATURE_CLIP * layout.FEATURE_CLIP)
        columns_2 = columns_2 + (clipped, p * p, v * v, q2)
        new = ()
        for c in tl.static_range(layout.ELEMENT_COLUMNS):
            new = new + (sums[c] + sum_in_fours(columns_2[c]),)
        sums = new
    for c in tl.static_range(layout.ELEMENT_COLUMNS):
        tl.store(moments_ptr + tile.to(tl.int64) * layout.ELEMENT_STRIDE + c, tl.sum(sums[c]))


@triton.jit
def normalisers_kernel(
    table_ptr,
    chunks_ptr,
    control_ptr,
    first_layer_ptr,  # float32 [13, units]: the columns of R and rsqrt(R), of C and rsqrt(C), and the bias
    vectors_ptr,  # planes UNIT on are written
    normalisers_ptr,  # float32 [matrices, ELEMENT_STRIDE], written
    UNITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    if not layout.accepted(control_ptr):
        return
    chunk = tl.program_id(0)
    matrix, of_columns, _, offset, inside, own = chunk_of(table_ptr, chunks_ptr, chunk, ALIGNED, BLOCK_COLUMNS)
    rows_are_short = layout.entry(table_ptr, matrix, layout.ROWS_ARE_SHORT) != 0
    sums_ptr = layout.sums_at(table_ptr, matrix, layout.ROW_MOMENTS)
    whole_length = layout.entry(table_ptr, matrix, layout.WHOLE_ROWS)
    factor_ptr = layout.sums_at(table_ptr, matrix, layout.ROW_FACTOR)
    is_first = chunk == layout.entry(table_ptr, matrix, layout.ROW_CHUNK)
    is_short = rows_are_short
    if of_columns:
        sums_ptr = layout.sums_at(table_ptr, matrix, layout.COLUMN_MOMENTS)
        whole_length = layout.entry(table_ptr, matrix, layout.WHOLE_COLS)
        factor_ptr = layout.sums_at(table_ptr, matrix, layout.COLUMN_FACTOR)
        is_short = not rows_are_short

    normaliser = ()
    for c in tl.static_range(layout.CHUNK_SUMS):
        mean = tl.load(sums_ptr + c) / whole_length.to(tl.float32)
        normaliser = normaliser + (tl.rsqrt(mean + layout.NORM_EPS),)
    weights_ptr = first_layer_ptr + 6 * UNITS
    if is_short:
        weights_ptr = first_layer_ptr
    planes_ptr = vectors_ptr + chunk.to(tl.int64) * ((layout.UNIT + UNITS) * BLOCK_COLUMNS)
    planes_ptr += tl.arange(0, BLOCK_COLUMNS)
    values = ()
    for k in tl.static_range(3):
        factor = tl.load(planes_ptr + (layout.FACTOR + k) * BLOCK_COLUMNS)
        tl.store(factor_ptr + offset * 3 + k, factor, mask=inside & own)
        values = values + (factor * normaliser[k],)
    for k in tl.static_range(3):
        root = tl.rsqrt(tl.load(planes_ptr + (layout.FACTOR + k) * BLOCK_COLUMNS) + layout.RMS_EPS)
        values = values + (root * normaliser[3 + k],)
    for unit in tl.static_range(UNITS):
        # the bias goes with the columns
        contribution = tl.zeros([BLOCK_COLUMNS], tl.float32)
        if of_columns:
            contribution += tl.load(first_layer_ptr + 12 * UNITS + unit)
        for c in tl.static_range(6):
            contribution += values[c] * tl.load(weights_ptr + c * UNITS + unit)
        tl.store(planes_ptr + (layout.UNIT + unit) * BLOCK_COLUMNS, contribution)

    if is_first:
        o_moment = tl.arange(0, layout.ELEMENT_STRIDE)
        is_moment = o_moment < layout.ELEMENT_COLUMNS
        moments_ptr = layout.sums_at(table_ptr, matrix, layout.ELEMENT_MOMENTS)
        rows = layout.entry(table_ptr, matrix, layout.WHOLE_ROWS).to(tl.float32)
        size = rows * layout.entry(table_ptr, matrix, layout.WHOLE_COLS).to(tl.float32)
        normalisers = tl.rsqrt(tl.load(moments_ptr + o_moment, mask=is_moment, other=0.0) / size + layout.NORM_EPS)
        tl.store(normalisers_ptr + matrix * layout.ELEMENT_STRIDE + o_moment, normalisers)
        if layout.entry(table_ptr, matrix, layout.COUNTS) != 0:
            counter_ptr = layout.entry(table_ptr, matrix, layout.COUNTER).to(tl.pointer_type(tl.float32))
            tl.store(counter_ptr, tl.load(counter_ptr) + 1)
