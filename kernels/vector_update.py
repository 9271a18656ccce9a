"""The rule for parameters with fewer than two axes (Celo2-base): one program a vector, all phases in one kernel.

The first 15 columns of the rule, with an unfactored accumulator V_k in the place of R_k and C_k. Three passes: sums of
squares; accumulators and direction; the parameter. A model's vectors are short beside its matrices. Each pass over a
sharded vector is a launch of its own, and the ranks add up the sums of the first two in between. A vector that never
had a gradient in any element keeps V_k = 0 and does not move.
Source: the authors' code of Celo2 (arXiv 2602.19142), parameters of fewer than two axes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from celo2.kernels import layout, rounding
from celo2.kernels.learned_update import accumulate

VECTOR_COLUMNS = tl.constexpr(15)


@triton.jit
def vector_columns(g, p, m0, m1, m2, v, f0, f1, f2):
    """Return the 15 columns [block] in the paper's order, not normalised, from the new accumulators."""
    q = tl.rsqrt(v + layout.RMS_EPS)
    clipped = tl.clamp(g, -layout.FEATURE_CLIP, layout.FEATURE_CLIP)
    s0 = tl.rsqrt(tl.maximum(f0 + layout.FACTOR_EPS, layout.FACTOR_EPS))
    s1 = tl.rsqrt(tl.maximum(f1 + layout.FACTOR_EPS, layout.FACTOR_EPS))
    s2 = tl.rsqrt(tl.maximum(f2 + layout.FACTOR_EPS, layout.FACTOR_EPS))
    return g, clipped, p, m0, m1, m2, v, m0 * q, m1 * q, m2 * q, q, g * s0, g * s1, g * s2, g * q


@triton.jit
def vector_update_kernel(
    table_ptr,  # int64 [vectors, COLUMNS]: one row, COLS elements; ROW_FACTOR is the address of V_k, [n, 3]
    gradients_ptr,  # int64 [vectors]
    control_ptr,
    rates_ptr,
    p_like,
    g_like,
    state_like,
    ELEMENT: tl.constexpr,  # weights of the 15 columns, [15 * units]
    FIRST_BIAS: tl.constexpr,  # [units]
    HIDDEN: tl.constexpr,
    BIAS: tl.constexpr,
    OUTPUT: tl.constexpr,
    OUTPUT_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,  # of the three passes, those of this launch: from FIRST up to but not including STOP
    STOP: tl.constexpr,
):
    if not layout.accepted(control_ptr):
        return
    vector = tl.program_id(0)
    length = layout.entry(table_ptr, vector, layout.COLS)
    whole_length = layout.entry(table_ptr, vector, layout.WHOLE_COLS).to(tl.float32)
    moments_ptr = layout.sums_at(table_ptr, vector, layout.ELEMENT_MOMENTS)
    square_ptr = layout.sums_at(table_ptr, vector, layout.DIRECTION_SQUARES)
    gradient_scale = layout.gradient_scale_of(control_ptr, table_ptr, vector)
    group = layout.entry(table_ptr, vector, layout.GROUP)
    lr = tl.load(rates_ptr + group * layout.RATES)
    decay = tl.load(rates_ptr + group * layout.RATES + 1)
    p_ptr = layout.tensor_at(table_ptr, vector, layout.P, p_like, False)
    g_ptr = layout.gradient_at(gradients_ptr, vector, g_like, False)
    m0_ptr = layout.tensor_at(table_ptr, vector, layout.MOMENTUM, state_like, False)
    m1_ptr = layout.tensor_at(table_ptr, vector, layout.MOMENTUM + 1, state_like, False)
    m2_ptr = layout.tensor_at(table_ptr, vector, layout.MOMENTUM + 2, state_like, False)
    v_ptr = layout.tensor_at(table_ptr, vector, layout.V, state_like, False)
    factor_ptr = layout.entry(table_ptr, vector, layout.ROW_FACTOR).to(tl.pointer_type(tl.float32))
    d_ptr = layout.entry(table_ptr, vector, layout.D).to(tl.pointer_type(tl.float32))
    counter_ptr = layout.entry(table_ptr, vector, layout.COUNTER).to(tl.pointer_type(tl.float32))
    count = tl.load(counter_ptr) + 1
    seed = rounding.seed_at(layout.entry(table_ptr, vector, layout.SEED).to(tl.uint32), count)

    # V_k is zero until there is a gradient, and has 1e-30 of every step from then on, so any of its elements tells; one
    # that is read after it was written says the same. An empty shard has none
    started = tl.load(factor_ptr, mask=length > 0, other=0.0) > 0
    if FIRST == 1:
        started = started | (tl.load(moments_ptr) > 0)
    # pass 1 only sums, pass 2 advances the accumulators by the same formulas
    scales = ()
    for c in tl.static_range(VECTOR_COLUMNS):
        scale = 0.0
        if FIRST == 1:
            scale = tl.rsqrt(tl.load(moments_ptr + c) / whole_length + layout.NORM_EPS)
        scales = scales + (scale,)
    square = 0.0
    for WRITES in tl.static_range(FIRST, 2 if STOP == 3 else STOP):
        sums = ()
        for _ in tl.static_range(VECTOR_COLUMNS):
            sums = sums + (tl.zeros([BLOCK], tl.float32),)
        squares = tl.zeros([BLOCK], tl.float32)
        for first in range(0, length, BLOCK):
            offset = first + tl.arange(0, BLOCK).to(tl.int64)
            mask = offset < length
            g = tl.load(g_ptr + offset, mask=mask, other=0.0).to(tl.float32) * gradient_scale
            g = tl.clamp(g, -layout.GRADIENT_CLIP, layout.GRADIENT_CLIP)
            p = tl.load(p_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(v_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            v = layout.SECOND_MOMENT_DECAY * v + (1 - layout.SECOND_MOMENT_DECAY) * g * g
            m0 = tl.load(m0_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            m1 = tl.load(m1_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            m2 = tl.load(m2_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            m0 += (1 - layout.DECAYS[0]) * (g - m0)
            m1 += (1 - layout.DECAYS[1]) * (g - m1)
            m2 += (1 - layout.DECAYS[2]) * (g - m2)
            factors = ()
            for k in tl.static_range(3):
                factor = tl.load(factor_ptr + offset * 3 + k, mask=mask, other=0.0)
                factor = layout.DECAYS[k] * factor + (1 - layout.DECAYS[k]) * (g * g + layout.SQUARE_EPS)
                factors = factors + (factor,)
            x = vector_columns(g, p, m0, m1, m2, v, factors[0], factors[1], factors[2])
            if WRITES == 0:
                new = ()
                for c in tl.static_range(VECTOR_COLUMNS):
                    new = new + (sums[c] + tl.where(mask, x[c] * x[c], 0.0),)
                sums = new
            else:
                units = ()
                for unit in tl.static_range(len(FIRST_BIAS)):
                    units = units + (tl.full([BLOCK], FIRST_BIAS[unit], tl.float32),)
                for c in tl.static_range(VECTOR_COLUMNS):
                    units = accumulate(units, x[c] * scales[c], ELEMENT, c)
                hidden = ()
                for j in tl.static_range(len(BIAS)):
                    hidden = hidden + (tl.full([BLOCK], BIAS[j], tl.float32),)
                for unit in tl.static_range(len(FIRST_BIAS)):
                    hidden = accumulate(hidden, tl.maximum(units[unit], 0.0), HIDDEN, unit)
                d = tl.full([BLOCK], OUTPUT_BIAS, tl.float32)
                for j in tl.static_range(len(BIAS)):
                    d += tl.maximum(hidden[j], 0.0) * OUTPUT[j]
                noise = rounding.noise_of(seed, length * 0, offset.to(tl.int32), 0)
                rounding.store(v_ptr + offset, v, mask, noise, False, True)
                rounding.store(m0_ptr + offset, m0, mask, noise, True, True)
                noise = rounding.noise_of(seed, length * 0, offset.to(tl.int32), 1)
                rounding.store(m1_ptr + offset, m1, mask, noise, False, True)
                rounding.store(m2_ptr + offset, m2, mask, noise, True, True)
                for k in tl.static_range(3):
                    tl.store(factor_ptr + offset * 3 + k, tl.where(started, factors[k], 0.0), mask=mask)
                tl.store(d_ptr + offset, d, mask=mask)
                squares += tl.where(mask, d * d, 0.0)
        if WRITES == 0:
            scales = ()
            for c in tl.static_range(VECTOR_COLUMNS):
                moment = tl.sum(sums[c])
                if STOP == 1:
                    tl.store(moments_ptr + c, moment)
                if c == 0:
                    started = started | (moment > 0)
                scales = scales + (tl.rsqrt(moment / whole_length + layout.NORM_EPS),)
        else:
            square = tl.sum(squares)
    if STOP == 2:
        tl.store(square_ptr, square)
    if STOP == 3:
        if FIRST == 2:
            square = tl.load(square_ptr)
        scale = tl.where(started, tl.rsqrt(square / whole_length + layout.NORM_EPS), 0.0)
        for first in range(0, length, BLOCK):
            offset = first + tl.arange(0, BLOCK).to(tl.int64)
            mask = offset < length
            p = tl.load(p_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            p -= lr * (tl.load(d_ptr + offset, mask=mask, other=0.0) * scale + decay * p)
            noise = rounding.noise_of(seed, length * 0, offset.to(tl.int32), 2)
            rounding.store(p_ptr + offset, p, mask, noise, False, False)
        if FIRST == 2:
            tl.debug_barrier()
        # last, behind a barrier or those of the sums: every thread has read the old count
        tl.store(counter_ptr, count)
