"""Phase 3: new accumulators and the direction of the learned MLP, in one pass over the elements.

    m_k <- b_k m_k + (1 - b_k) g        v <- 0.95 v + 0.05 g^2        q = rsqrt(v + 1e-8)
    x   = the 18 per-element columns, each times its normaliser
    h0  = relu(x W0 + row contribution + column contribution)    h1 = relu(h0 W1 + b1)    d = h1 w2 + b2

Reads g p m_k v, writes m_k v d: 24 + 20 bytes an element in float32. Source: Celo2 (arXiv 2602.19142),
the columns of a row or of a column folded into the first layer's bias.

The weights of all three layers are constants of the code, so a multiply-add takes its weight from the instruction; the
18 normalisers of a matrix multiply the columns where they are made. Columns are the outer loop and units the inner
one: only the units and a few products live at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from celo2.kernels import layout, rounding


@triton.jit
def accumulate(units, x, WEIGHTS: tl.constexpr, ROW: tl.constexpr):
    """Return the units plus column `x` [rows, columns] times row ROW of the weights, [inputs * units] in a tuple."""
    result = ()
    for unit in tl.static_range(len(units)):
        result = result + (tl.fma(x, WEIGHTS[ROW * len(units) + unit], units[unit]),)
    return result


@triton.jit
def learned_update_kernel(
    table_ptr,  # int64 [matrices, COLUMNS]
    gradients_ptr,  # int64 [matrices]
    tiles_ptr,  # int32 [tiles, 3]: matrix, first row, first column
    control_ptr,  # float32 [1 + groups, 2]
    vectors_ptr,  # float32 [chunks, UNIT + units, BLOCK_COLUMNS]
    normalisers_ptr,  # float32 [matrices, ELEMENT_STRIDE]
    squares_ptr,  # float32 [tiles]: sums of d^2, written here
    p_like,  # pointers that only name a dtype
    g_like,
    m_like,
    v_like,
    d_like,
    ELEMENT: tl.constexpr,  # weights of the 18 per-element columns, [18 * units]
    HIDDEN: tl.constexpr,  # second layer, [units * hidden]
    BIAS: tl.constexpr,  # its bias [hidden]
    OUTPUT: tl.constexpr,  # output weights [hidden]
    OUTPUT_BIAS: tl.constexpr,
    UNITS: tl.constexpr,
    CLIP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,  # rows of a tile, taken STEP_ROWS at a time
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
    d_ptr = layout.tensor_at(table_ptr, matrix, layout.D, d_like, ALIGNED) + column

    row_ptr, column_ptr = layout.vectors_of(
        table_ptr, vectors_ptr, matrix, row0, column0, layout.UNIT + UNITS, STEP_ROWS, BLOCK_COLUMNS
    )
    o_column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    if not ALIGNED:
        # columns outside repeat the last one
        o_column = tl.minimum(o_column, (columns - 1 - column).to(tl.int32))
    QUANTISED: tl.constexpr = m_like.dtype.element_ty == tl.int8
    scale_ptr, quanta, o_quantum = layout.quanta_of(table_ptr, matrix, columns, column, BLOCK_COLUMNS)
    norm_ptr = normalisers_ptr + matrix * layout.ELEMENT_STRIDE

    seed = rounding.seed_of(table_ptr, matrix)
    total = tl.zeros([STEP_ROWS, BLOCK_COLUMNS], tl.float32)
    for first in range(row0, tl.minimum(row0 + BLOCK_ROWS, rows), STEP_ROWS):
        step = tl.arange(0, STEP_ROWS)[:, None]
        mask = (first + step < rows) & own
        # a last step that sticks out repeats the last row
        o_row = tl.minimum(step, rows - 1 - first)
        o_state = o_row * state_stride.to(tl.int32) + o_column
        s = first * state_stride
        g = tl.load(g_ptr + first * g_stride + (o_row * g_stride.to(tl.int32) + o_column)).to(tl.float32)
        v = tl.load(v_ptr + s + o_state).to(tl.float32)
        p = tl.load(p_ptr + first * p_stride + (o_row * p_stride.to(tl.int32) + o_column)).to(tl.float32)
        momenta = (
            tl.load(m0_ptr + s + o_state).to(tl.float32),
            tl.load(m1_ptr + s + o_state).to(tl.float32),
            tl.load(m2_ptr + s + o_state).to(tl.float32),
        )
        if QUANTISED:
            scales_ptr = scale_ptr + ((first + o_row) * quanta + tl.minimum(o_quantum, quanta - 1)) * 3
            momenta = rounding.scaled_momenta(momenta, scales_ptr)
            mine = (o_quantum * layout.QUANTUM >= column0) & (o_quantum < quanta)
            scale_mask = (first + step < rows) & mine
        g = g * gradient_scale
        if CLIP:
            g = tl.clamp(g, -layout.GRADIENT_CLIP, layout.GRADIENT_CLIP)
        v = layout.SECOND_MOMENT_DECAY * v + (1 - layout.SECOND_MOMENT_DECAY) * g * g
        # finite gradients of at most 1000 keep all accumulators finite
        noise = rounding.noise_of(seed, s + column, o_state, 0)
        rounding.store(v_ptr + s + o_state, v, mask, noise, False, True)
        q = tl.rsqrt(v + layout.RMS_EPS)

        of_row = row_ptr + (first - row0) + o_row
        units = ()
        for unit in tl.static_range(UNITS):
            plane = (layout.UNIT + unit) * BLOCK_COLUMNS
            units = units + (tl.load(of_row + plane) + tl.load(column_ptr + plane),)
        units = accumulate(units, v * tl.load(norm_ptr + 16), ELEMENT, 16)
        units = accumulate(units, q * tl.load(norm_ptr + 17), ELEMENT, 17)
        units = accumulate(units, p * tl.load(norm_ptr + 15), ELEMENT, 15)
        clipped = tl.clamp(g, -layout.FEATURE_CLIP, layout.FEATURE_CLIP)
        units = accumulate(units, clipped * tl.load(norm_ptr + 14), ELEMENT, 14)
        units = accumulate(units, g * tl.load(norm_ptr), ELEMENT, 0)
        units = accumulate(units, g * q * tl.load(norm_ptr + 4), ELEMENT, 4)
        # one momentum at a time, so that few values live at once
        for k in tl.static_range(3):
            m = momenta[k] + (1 - layout.DECAYS[k]) * (g - momenta[k])
            m_ptr = m0_ptr if k == 0 else (m1_ptr if k == 1 else m2_ptr)
            if k == 1:
                noise = rounding.noise_of(seed, s + column, o_state, 1)
            if QUANTISED:
                rounding.store_8_bits(m_ptr + s + o_state, m, mask, noise, k != 1, scales_ptr + k, scale_mask)
            else:
                rounding.store(m_ptr + s + o_state, m, mask, noise, k != 1, True)
            row_scale = tl.load(of_row + (layout.SCALE + k) * BLOCK_COLUMNS)
            column_scale = tl.load(column_ptr + (layout.SCALE + k) * BLOCK_COLUMNS)
            units = accumulate(units, m * tl.load(norm_ptr + 1 + k), ELEMENT, 1 + k)
            units = accumulate(units, m * q * tl.load(norm_ptr + 5 + k), ELEMENT, 5 + k)
            units = accumulate(units, g * (row_scale * tl.load(norm_ptr + 8 + k) * column_scale), ELEMENT, 8 + k)
            units = accumulate(units, m * (row_scale * tl.load(norm_ptr + 11 + k) * column_scale), ELEMENT, 11 + k)

        hidden = ()
        for j in tl.static_range(len(BIAS)):
            hidden = hidden + (tl.full([STEP_ROWS, BLOCK_COLUMNS], BIAS[j], tl.float32),)
        for unit in tl.static_range(UNITS):
            hidden = accumulate(hidden, tl.maximum(units[unit], 0.0), HIDDEN, unit)
        d = tl.full([STEP_ROWS, BLOCK_COLUMNS], OUTPUT_BIAS, tl.float32)
        for j in tl.static_range(len(BIAS)):
            d += tl.maximum(hidden[j], 0.0) * OUTPUT[j]
        if d_like.dtype.element_ty == tl.float16:
            d = tl.clamp(d, -layout.HALF_MAX, layout.HALF_MAX)
        d = d.to(d_like.dtype.element_ty)
        tl.store(d_ptr + first * columns + (o_row * columns.to(tl.int32) + o_column), d, mask=mask)
        written = tl.where(mask, d.to(tl.float32), 0.0)
        total += written * written
    tl.store(squares_ptr + tile, tl.sum(total))
