"""The rule on the tensors of one trajectory, a matrix or a vector in one program: device functions of `inner_loop`.

A matrix is a tile [rows, columns], padded where it has fewer rows than `tl.dot` asks for: rows outside hold zeros and
are left out of sums. The algebra is that of `celo2.phases`, with the trajectory's own theta, 347 numbers in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from celo2.kernels import layout
from celo2.kernels.vector_update import vector_columns

# theta of one trajectory, float32: [18 + 6 + 6 + 15, units] of the first layer, then the rest
SHORT = tl.constexpr(18)
LONG = tl.constexpr(24)
VECTOR = tl.constexpr(30)
FIRST_BIAS = tl.constexpr(45)

ADAM_EPS = tl.constexpr(1e-8)
NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def total(x):
    """Sum over all elements of a tile."""
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def normaliser(x, own, COUNT: tl.constexpr):
    """Return rsqrt(mean(x^2) + eps) over the elements of a vector that are its own."""
    return tl.rsqrt(tl.sum(tl.where(own, x * x, 0.0), 0) / COUNT + layout.NORM_EPS)


@triton.jit
def row_totals(vectors, COUNT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the sums of COUNT vectors [rows] as scalars, in the layout of a tile [rows, columns].

    Rows lie in different warps. One sum over a tile that has the vectors as columns crosses them once; each sum of its
    own would leave a register that only some threads write, which the compiler keeps over the whole loop.
    """
    o = tl.arange(0, COLS)
    tile = tl.zeros([ROWS, COLS], tl.float32)
    for k in tl.static_range(COUNT):
        tile = tl.where((o == k)[None, :], vectors[k][:, None], tile)
    sums = tl.sum(tile, 0)
    result = ()
    for k in tl.static_range(COUNT):
        result = result + (tl.sum(tl.where(o == k, sums, 0.0), 0),)
    return result


@triton.jit
def average(x, new, DECAY: tl.constexpr):
    return x + (new - x) * (1 - DECAY)


@triton.jit
def contributions(units, columns, squares, theta_ptr, FIRST: tl.constexpr, UNITS: tl.constexpr, COUNT: tl.constexpr):
    """Add to the units [length] what the six columns of `factor_columns`, with sums of squares, give them."""
    for k in tl.static_range(6):
        norm = tl.rsqrt(squares[k] / COUNT + layout.NORM_EPS)
        units = first_layer(units, columns[k] * norm, theta_ptr, FIRST + k, UNITS)
    return units


@triton.jit
def factor_columns(f0, f1, f2):
    """Return three factors [length] and their inverse roots: what a row or a column adds to the first layer."""
    return (
        f0,
        f1,
        f2,
        tl.rsqrt(f0 + layout.RMS_EPS),
        tl.rsqrt(f1 + layout.RMS_EPS),
        tl.rsqrt(f2 + layout.RMS_EPS),
    )


@triton.jit
def first_layer(units, x, theta_ptr, ROW: tl.constexpr, UNITS: tl.constexpr):
    """Return the units plus input `x` times row ROW of the first layer."""
    result = ()
    for unit in tl.static_range(UNITS):
        result = result + (tl.fma(x, tl.load(theta_ptr + ROW * UNITS + unit), units[unit]),)
    return result


@triton.jit
def other_layers(units, theta_ptr, UNITS: tl.constexpr):
    """Return the direction from the units of the first layer, before their ReLU."""
    bias_ptr = theta_ptr + FIRST_BIAS * UNITS
    hidden_ptr = bias_ptr + UNITS
    bias1_ptr = hidden_ptr + UNITS * UNITS
    output_ptr = bias1_ptr + UNITS
    d = units[0] * 0.0 + tl.load(output_ptr + UNITS)
    for j in tl.static_range(UNITS):
        h = tl.fma(tl.maximum(units[0], 0.0, NAN), tl.load(hidden_ptr + j), tl.load(bias1_ptr + j))
        for unit in tl.static_range(1, UNITS):
            h = tl.fma(tl.maximum(units[unit], 0.0, NAN), tl.load(hidden_ptr + unit * UNITS + j), h)
        d = tl.fma(tl.maximum(h, 0.0, NAN), tl.load(output_ptr + j), d)
    return d


@triton.jit
def matrix_moments(g, state, own, rows_own, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the tensors of a matrix after its gradient `g` [rows, columns], the weights as they were."""
    p, m0, m1, m2, v, r0, r1, r2, c0, c1, c2 = state
    g = tl.clamp(g, -layout.GRADIENT_CLIP, layout.GRADIENT_CLIP, NAN)
    square = g * g
    row = tl.sum(square, 1) / COLS + layout.SQUARE_EPS
    column = tl.sum(square, 0) / ROWS + layout.SQUARE_EPS
    return (
        p,
        average(m0, g, layout.DECAYS[0]),
        average(m1, g, layout.DECAYS[1]),
        average(m2, g, layout.DECAYS[2]),
        v * layout.SECOND_MOMENT_DECAY + square * (1 - layout.SECOND_MOMENT_DECAY),
        tl.where(rows_own, r0 * layout.DECAYS[0] + row * (1 - layout.DECAYS[0]), 0.0),
        tl.where(rows_own, r1 * layout.DECAYS[1] + row * (1 - layout.DECAYS[1]), 0.0),
        tl.where(rows_own, r2 * layout.DECAYS[2] + row * (1 - layout.DECAYS[2]), 0.0),
        c0 * layout.DECAYS[0] + column * (1 - layout.DECAYS[0]),
        c1 * layout.DECAYS[1] + column * (1 - layout.DECAYS[1]),
        c2 * layout.DECAYS[2] + column * (1 - layout.DECAYS[2]),
    )


@triton.jit
def row_scale(f, whole, ROWS: tl.constexpr):
    """Return rsqrt(R / mean(R)) of a factor of rows and its sum."""
    return tl.rsqrt(tl.maximum(f / (whole / ROWS + layout.FACTOR_EPS), layout.FACTOR_EPS, NAN))


@triton.jit
def column_scale(f):
    return tl.rsqrt(tl.maximum(f, layout.FACTOR_EPS, NAN))


@triton.jit
def element_column(k: tl.constexpr, g, state, q, row_scales, column_scales):
    """Return column k of the 18 an element, in the order of `celo2.folded.ELEMENT_ROWS`."""
    linear = (g, state[1], state[2], state[3])
    if k < 4:
        x = linear[k]
    elif k < 8:
        x = linear[k - 4] * q
    elif k < 11:
        x = g * (row_scales[k - 8][:, None] * column_scales[k - 8][None, :])
    elif k < 14:
        x = linear[k - 10] * (row_scales[k - 11][:, None] * column_scales[k - 11][None, :])
    elif k == 14:
        x = tl.clamp(g, -layout.FEATURE_CLIP, layout.FEATURE_CLIP, NAN)
    elif k == 15:
        x = state[0]
    elif k == 16:
        x = state[4]
    else:
        x = q
    return x


@triton.jit
def row_sums_of(state, rows_own, BLOCK: tl.constexpr, COLS: tl.constexpr):
    """Return nine sums over rows: of squares of the six columns of `factor_columns`, and of the three factors."""
    columns = factor_columns(state[5], state[6], state[7])
    vectors = ()
    for k in tl.static_range(6):
        vectors = vectors + (tl.where(rows_own, columns[k] * columns[k], 0.0),)
    return row_totals(vectors + (state[5], state[6], state[7]), 9, BLOCK, COLS)


@triton.jit
def factors_of(state, own, row_sums, ROWS: tl.constexpr):
    """Return q [rows, columns], and the three scales of rows and of columns."""
    rows = ()
    columns = ()
    for k in tl.static_range(3):
        rows = rows + (row_scale(state[5 + k], row_sums[6 + k], ROWS),)
        columns = columns + (column_scale(state[8 + k]),)
    return tl.where(own, tl.rsqrt(state[4] + layout.RMS_EPS), 0.0), rows, columns


@triton.jit
def matrix_normalisers(g, state, own, row_sums, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return rsqrt(mean(x^2) + eps) of the 18 columns."""
    g = tl.clamp(g, -layout.GRADIENT_CLIP, layout.GRADIENT_CLIP, NAN)
    q, row_scales, column_scales = factors_of(state, own, row_sums, ROWS)
    squares = ()
    for k in tl.static_range(18):
        x = element_column(k, g, state, q, row_scales, column_scales)
        squares = squares + (tl.sum(x * x, 1),)
    totals = row_totals(squares, 18, BLOCK, COLS)
    normalisers = ()
    for k in tl.static_range(18):
        normalisers = normalisers + (tl.rsqrt(totals[k] / (ROWS * COLS) + layout.NORM_EPS),)
    return normalisers


@triton.jit
def matrix_direction(
    g, state, own, row_sums, normalisers, theta_ptr, UNITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Return the direction [rows, columns] of theta's MLP from the advanced tensors of a matrix, zero outside."""
    r0, r1, r2, c0, c1, c2 = state[5], state[6], state[7], state[8], state[9], state[10]
    g = tl.clamp(g, -layout.GRADIENT_CLIP, layout.GRADIENT_CLIP, NAN)
    nothing = ()
    of_row = ()
    for unit in tl.static_range(UNITS):
        nothing = nothing + (c0 * 0.0,)
        of_row = of_row + (r0 * 0.0 + tl.load(theta_ptr + FIRST_BIAS * UNITS + unit),)
    of_row = contributions(of_row, factor_columns(r0, r1, r2), row_sums, theta_ptr, SHORT, UNITS, ROWS)
    columns = factor_columns(c0, c1, c2)
    squares = ()
    for k in tl.static_range(6):
        squares = squares + (tl.sum(columns[k] * columns[k], 0),)
    of_column = contributions(nothing, columns, squares, theta_ptr, LONG, UNITS, COLS)
    units = ()
    for unit in tl.static_range(UNITS):
        units = units + (of_row[unit][:, None] + of_column[unit][None, :],)
    q, row_scales, column_scales = factors_of(state, own, row_sums, ROWS)
    for k in tl.static_range(18):
        x = element_column(k, g, state, q, row_scales, column_scales)
        units = first_layer(units, x * normalisers[k], theta_ptr, k, UNITS)
    return tl.where(own, other_layers(units, theta_ptr, UNITS), 0.0)


@triton.jit
def orthogonalize(x, PRECISION: tl.constexpr):
    """Newton-Schulz of a tile [m, n] with m <= n: `celo2.newton_schulz`, whose constants these are."""
    x = x / (tl.sqrt(total(x * x)) + 1e-8)
    for _ in range(5):
        gram = tl.dot(x, tl.trans(x), input_precision=PRECISION)
        polynomial = -4.7750 * gram + 2.0315 * tl.dot(gram, gram, input_precision=PRECISION)
        x = 3.4445 * x + tl.dot(polynomial, x, input_precision=PRECISION)
    return x


@triton.jit
def propose(g, m0, v, iteration, EXPERT: tl.constexpr, PRECISION: tl.constexpr):
    """Return an expert's direction from the advanced accumulators: Nesterov's momentum for Muon, or Adam's."""
    t = iteration + 1
    # log2 of 0.9 and of 0.95
    momentum = 0.9 * m0 / (1 - tl.exp2((t + 1) * -0.15200309344504997)) + 0.1 * g / (
        1 - tl.exp2(t * -0.15200309344504997)
    )
    if EXPERT == "muon":
        return orthogonalize(momentum, PRECISION)
    return momentum / (tl.sqrt(v / (1 - tl.exp2(t * -0.07400058144377694))) + ADAM_EPS)


@triton.jit
def of_unit_rms(d, NORMALIZE: tl.constexpr, COUNT: tl.constexpr):
    """Return a matrix divided by its root mean square."""
    return d * tl.rsqrt(total(d * d) / COUNT + layout.NORM_EPS) if NORMALIZE else d


@triton.jit
def learned_vector(g, state, own, lr, theta_ptr, UNITS: tl.constexpr, NORMALIZE: tl.constexpr, COUNT: tl.constexpr):
    """Return the tensors of a vector [n] after a step of the rule."""
    p, m0, m1, m2, v, f0, f1, f2 = state
    g = tl.clamp(g, -layout.GRADIENT_CLIP, layout.GRADIENT_CLIP, NAN)
    square = g * g
    m0 = average(m0, g, layout.DECAYS[0])
    m1 = average(m1, g, layout.DECAYS[1])
    m2 = average(m2, g, layout.DECAYS[2])
    v = v * layout.SECOND_MOMENT_DECAY + square * (1 - layout.SECOND_MOMENT_DECAY)
    f0 = f0 * layout.DECAYS[0] + (square + layout.SQUARE_EPS) * (1 - layout.DECAYS[0])
    f1 = f1 * layout.DECAYS[1] + (square + layout.SQUARE_EPS) * (1 - layout.DECAYS[1])
    f2 = f2 * layout.DECAYS[2] + (square + layout.SQUARE_EPS) * (1 - layout.DECAYS[2])
    columns = vector_columns(g, p, m0, m1, m2, v, f0, f1, f2)
    units = ()
    for unit in tl.static_range(UNITS):
        units = units + (g * 0.0 + tl.load(theta_ptr + FIRST_BIAS * UNITS + unit),)
    for k in tl.static_range(len(columns)):
        x = columns[k]
        units = first_layer(units, x * normaliser(x, own, COUNT), theta_ptr, VECTOR + k, UNITS)
    d = other_layers(units, theta_ptr, UNITS)
    if NORMALIZE:
        d = d * normaliser(d, own, COUNT)
    return tl.where(own, p - lr * d, 0.0), m0, m1, m2, v, f0, f1, f2


@triton.jit
def adam_vector(g, state, lr, iteration, CORRECTED: tl.constexpr):
    """Return the tensors of a vector after a step of Adam with betas 0.9 and 0.95."""
    p, m0, m1, m2, v, f0, f1, f2 = state
    m0 = average(m0, g, layout.DECAYS[0])
    v = v * layout.SECOND_MOMENT_DECAY + g * g * (1 - layout.SECOND_MOMENT_DECAY)
    if CORRECTED:
        t = iteration + 1
        m_hat = m0 / (1 - tl.exp2(t * -0.15200309344504997))
        v_hat = v / (1 - tl.exp2(t * -0.07400058144377694))
        p = p - lr * m_hat / (tl.sqrt(v_hat) + ADAM_EPS)
    else:
        p = p - lr * m0 * tl.rsqrt(v + layout.RMS_EPS)
    return p, m0, m1, m2, v, f0, f1, f2
