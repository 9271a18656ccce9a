"""Meta-training's inner loop as one kernel: a program advances one trajectory by a window of slots.

    slot: batch -> loss and gradients of the 64-32-10 network -> moments -> 18 columns -> theta's MLP -> Newton-Schulz
          -> update -> loss to memory -> the start of another trajectory, where one has ended

A trajectory's tensors (weights, three momenta, v and factors of a 32 x 64 and a 10 x 32 matrix, and the biases) are read
once a window, live in registers over its slots and are written once. In between a slot reads its batch, 64 x 64 numbers
from the second-level cache, and the trajectory's own theta: 347 numbers that every thread of a program needs alike.

The smaller matrix is padded to 16 rows, which `tl.dot` asks for: rows outside hold zeros and are left out of sums.
Source: meta-training of Celo2 (arXiv 2602.19142); the network and the rule are `celo2.meta.network` and
`celo2.meta.inner_optimizer`; the blend with an expert is ELO's (arXiv 2607.06772).
"""

from __future__ import annotations

import triton
import triton.language as tl

from celo2.kernels import layout
from celo2.kernels.vector_update import vector_columns

PIXELS = tl.constexpr(64)
HIDDEN = tl.constexpr(32)
CLASSES = tl.constexpr(10)
CLASS_BLOCK = tl.constexpr(16)
BATCH = tl.constexpr(64)

# rows of the table of addresses: a trajectory's tensors, and those of the trajectories that begin in the window
STATE = tl.constexpr(0)
FRESH = tl.constexpr(1)
# its columns: a matrix has seven (weights, three momenta, v, row factors, column factors), a vector six (one factor)
MATRIX_TENSORS = tl.constexpr(7)
VECTOR_TENSORS = tl.constexpr(6)
HIDDEN_WEIGHT = tl.constexpr(0)
OUTPUT_WEIGHT = tl.constexpr(7)
HIDDEN_BIAS = tl.constexpr(14)
OUTPUT_BIAS = tl.constexpr(20)
SCALE = tl.constexpr(26)
ITERATION = tl.constexpr(27)
TENSORS = tl.constexpr(28)

# theta of one trajectory, float32: [18 + 6 + 6 + 15, units] of the first layer, then the rest
SHORT = tl.constexpr(18)
LONG = tl.constexpr(24)
VECTOR = tl.constexpr(30)
FIRST_BIAS = tl.constexpr(45)

# eight elements of the larger matrix a thread
WARPS = 8
ADAM_EPS = tl.constexpr(1e-8)
NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def address(table_ptr, ROW: tl.constexpr, TENSOR: tl.constexpr):
    """Load an address of the table as a pointer to float32."""
    return tl.load(table_ptr + ROW * TENSORS + TENSOR).to(tl.pointer_type(tl.float32))


@triton.jit
def take(table_ptr, ROW: tl.constexpr, TENSOR: tl.constexpr, offsets, own):
    """Load elements of a tensor of the table, zeros where `own` is not."""
    return tl.load(address(table_ptr, ROW, TENSOR) + offsets, mask=own, other=0.0)


@triton.jit
def begin(x, table_ptr, TENSOR: tl.constexpr, offsets, own, now):
    """Return `x`, or where a trajectory begins now what it begins with; nothing is read elsewhere."""
    return tl.where(now, take(table_ptr, FRESH, TENSOR, offsets, own & now), x)


@triton.jit
def put(table_ptr, TENSOR: tl.constexpr, offsets, own, x):
    tl.store(address(table_ptr, STATE, TENSOR) + offsets, x, mask=own)


@triton.jit
def total(x):
    """Sum over all elements of a tile."""
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def normaliser(x, own, COUNT: tl.constexpr):
    """Return rsqrt(mean(x^2) + eps) over the elements of a vector that are its own."""
    return tl.rsqrt(tl.sum(tl.where(own, x * x, 0.0), 0) / COUNT + layout.NORM_EPS)


@triton.jit
def average(x, new, DECAY: tl.constexpr):
    return x + (new - x) * (1 - DECAY)


@triton.jit
def contributions(units, f0, f1, f2, own, theta_ptr, FIRST: tl.constexpr, UNITS: tl.constexpr, COUNT: tl.constexpr):
    """Add to the units [length] what three factors [length] and their inverse roots give them in the first layer."""
    factors = (f0, f1, f2)
    for k in tl.static_range(6):
        x = factors[k] if k < 3 else tl.rsqrt(factors[k - 3] + layout.RMS_EPS)
        units = first_layer(units, x * normaliser(x, own, COUNT), theta_ptr, FIRST + k, UNITS)
    return units


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
def row_scale(f, ROWS: tl.constexpr):
    """Return rsqrt(R / mean(R)) of a factor of rows, which are zero outside."""
    return tl.rsqrt(tl.maximum(f / (tl.sum(f, 0) / ROWS + layout.FACTOR_EPS), layout.FACTOR_EPS, NAN))


@triton.jit
def column_scale(f):
    return tl.rsqrt(tl.maximum(f, layout.FACTOR_EPS, NAN))


@triton.jit
def matrix_direction(
    g, state, own, rows_own, theta_ptr, UNITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Return the direction [rows, columns] of theta's MLP from the advanced tensors of a matrix, zero outside."""
    p, m0, m1, m2, v, r0, r1, r2, c0, c1, c2 = state
    g = tl.clamp(g, -layout.GRADIENT_CLIP, layout.GRADIENT_CLIP, NAN)
    nothing = ()
    of_row = ()
    for unit in tl.static_range(UNITS):
        nothing = nothing + (c0 * 0.0,)
        of_row = of_row + (r0 * 0.0 + tl.load(theta_ptr + FIRST_BIAS * UNITS + unit),)
    of_row = contributions(of_row, r0, r1, r2, rows_own, theta_ptr, SHORT, UNITS, ROWS)
    of_column = contributions(nothing, c0, c1, c2, c0 == c0, theta_ptr, LONG, UNITS, COLS)
    units = ()
    for unit in tl.static_range(UNITS):
        units = units + (of_row[unit][:, None] + of_column[unit][None, :],)

    momenta = (m0, m1, m2)
    row_scales = (row_scale(r0, ROWS), row_scale(r1, ROWS), row_scale(r2, ROWS))
    column_scales = (column_scale(c0), column_scale(c1), column_scale(c2))
    q = tl.where(own, tl.rsqrt(v + layout.RMS_EPS), 0.0)
    clipped = tl.clamp(g, -layout.FEATURE_CLIP, layout.FEATURE_CLIP, NAN)
    # the order of `celo2.folded.ELEMENT_ROWS`, one column at a time, so that few values live at once
    for k in tl.static_range(18):
        if k == 0:
            x = g
        elif k < 4:
            x = momenta[k - 1]
        elif k == 4:
            x = g * q
        elif k < 8:
            x = momenta[k - 5] * q
        elif k < 11:
            x = g * (row_scales[k - 8][:, None] * column_scales[k - 8][None, :])
        elif k < 14:
            x = momenta[k - 11] * (row_scales[k - 11][:, None] * column_scales[k - 11][None, :])
        elif k == 14:
            x = clipped
        elif k == 15:
            x = p
        elif k == 16:
            x = v
        else:
            x = q
        norm = tl.rsqrt(total(x * x) / (ROWS * COLS) + layout.NORM_EPS)
        units = first_layer(units, x * norm, theta_ptr, k, UNITS)
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
def learned_vector(
    g, state, own, lr, theta_ptr, UNITS: tl.constexpr, NORMALIZE: tl.constexpr, COUNT: tl.constexpr
):
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


@triton.jit
def network(
    w1,
    b1,
    w2,
    b2,
    scale,
    images_ptr,
    labels_ptr,
    index_ptr,
    share_ptr,
    classes_own,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the loss of f(scale w) over a batch and its gradients; classes outside have none."""
    picked = tl.load(index_ptr + tl.arange(0, BATCH))
    x = tl.load(images_ptr + picked[:, None] * PIXELS + tl.arange(0, PIXELS)[None, :])  # [BATCH, PIXELS]
    label = tl.load(labels_ptr + picked)
    hidden = tl.dot(w1, tl.trans(x), input_precision=PRECISION)  # [HIDDEN, BATCH]
    hidden = tl.maximum(scale * (hidden + b1[:, None]), 0.0, NAN)
    logits = scale * (tl.dot(w2, hidden, input_precision=PRECISION) + b2[:, None])  # [CLASS_BLOCK, BATCH]
    logits = tl.where(classes_own[:, None], logits, float("-inf"))
    logits = logits - tl.max(logits, 0)[None, :]
    power = tl.exp(logits)
    sums = tl.sum(power, 0)
    target = tl.arange(0, CLASS_BLOCK)[:, None] == label[None, :]
    chosen = tl.sum(tl.where(target, logits, 0.0), 0) - tl.log(sums)
    share = tl.load(share_ptr + tl.arange(0, BATCH)) if SHARED else tl.full([BATCH], 1 / BATCH, tl.float32)
    loss = -tl.sum(chosen * share, 0)
    g_logits = (power / sums[None, :] - tl.where(target, 1.0, 0.0)) * (scale * share)[None, :]
    g_logits = tl.where(classes_own[:, None], g_logits, 0.0)
    g_hidden = tl.dot(tl.trans(w2), g_logits, input_precision=PRECISION)
    g_hidden = tl.where(hidden > 0, g_hidden, g_hidden * 0.0) * scale
    return (
        loss,
        tl.dot(g_hidden, x, input_precision=PRECISION),
        tl.sum(g_hidden, 1),
        tl.dot(g_logits, tl.trans(hidden), input_precision=PRECISION),
        tl.sum(g_logits, 1),
    )


@triton.jit
def load_matrix(
    table_ptr, problem, own, o_row, o_column, FIRST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    o = problem * (ROWS * COLS) + o_row[:, None] * COLS + o_column[None, :]
    o_r = problem * (3 * ROWS) + o_row
    o_c = problem * (3 * COLS) + o_column
    in_rows = o_row < ROWS
    in_columns = o_column < COLS
    return (
        take(table_ptr, STATE, FIRST, o, own),
        take(table_ptr, STATE, FIRST + 1, o, own),
        take(table_ptr, STATE, FIRST + 2, o, own),
        take(table_ptr, STATE, FIRST + 3, o, own),
        take(table_ptr, STATE, FIRST + 4, o, own),
        take(table_ptr, STATE, FIRST + 5, o_r, in_rows),
        take(table_ptr, STATE, FIRST + 5, o_r + ROWS, in_rows),
        take(table_ptr, STATE, FIRST + 5, o_r + 2 * ROWS, in_rows),
        take(table_ptr, STATE, FIRST + 6, o_c, in_columns),
        take(table_ptr, STATE, FIRST + 6, o_c + COLS, in_columns),
        take(table_ptr, STATE, FIRST + 6, o_c + 2 * COLS, in_columns),
    )


@triton.jit
def begin_matrix(
    state, table_ptr, problem, own, o_row, o_column, now, FIRST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    o = problem * (ROWS * COLS) + o_row[:, None] * COLS + o_column[None, :]
    o_r = problem * (3 * ROWS) + o_row
    o_c = problem * (3 * COLS) + o_column
    in_rows = o_row < ROWS
    in_columns = o_column < COLS
    return (
        begin(state[0], table_ptr, FIRST, o, own, now),
        begin(state[1], table_ptr, FIRST + 1, o, own, now),
        begin(state[2], table_ptr, FIRST + 2, o, own, now),
        begin(state[3], table_ptr, FIRST + 3, o, own, now),
        begin(state[4], table_ptr, FIRST + 4, o, own, now),
        begin(state[5], table_ptr, FIRST + 5, o_r, in_rows, now),
        begin(state[6], table_ptr, FIRST + 5, o_r + ROWS, in_rows, now),
        begin(state[7], table_ptr, FIRST + 5, o_r + 2 * ROWS, in_rows, now),
        begin(state[8], table_ptr, FIRST + 6, o_c, in_columns, now),
        begin(state[9], table_ptr, FIRST + 6, o_c + COLS, in_columns, now),
        begin(state[10], table_ptr, FIRST + 6, o_c + 2 * COLS, in_columns, now),
    )


@triton.jit
def put_matrix(
    state, table_ptr, problem, own, o_row, o_column, FIRST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    o = problem * (ROWS * COLS) + o_row[:, None] * COLS + o_column[None, :]
    o_r = problem * (3 * ROWS) + o_row
    o_c = problem * (3 * COLS) + o_column
    for k in tl.static_range(5):
        put(table_ptr, FIRST + k, o, own, state[k])
    for k in tl.static_range(3):
        put(table_ptr, FIRST + 5, o_r + k * ROWS, o_row < ROWS, state[5 + k])
        put(table_ptr, FIRST + 6, o_c + k * COLS, o_column < COLS, state[8 + k])


@triton.jit
def load_vector(table_ptr, problem, o, own, FIRST: tl.constexpr, COUNT: tl.constexpr, LEARNED: tl.constexpr):
    zero = tl.zeros_like(o).to(tl.float32)
    at = problem * COUNT + o
    p = take(table_ptr, STATE, FIRST, at, own)
    m0 = take(table_ptr, STATE, FIRST + 1, at, own)
    v = take(table_ptr, STATE, FIRST + 4, at, own)
    if LEARNED:
        o_f = problem * (3 * COUNT) + o
        return (
            p,
            m0,
            take(table_ptr, STATE, FIRST + 2, at, own),
            take(table_ptr, STATE, FIRST + 3, at, own),
            v,
            take(table_ptr, STATE, FIRST + 5, o_f, own),
            take(table_ptr, STATE, FIRST + 5, o_f + COUNT, own),
            take(table_ptr, STATE, FIRST + 5, o_f + 2 * COUNT, own),
        )
    else:
        return p, m0, zero, zero, v, zero, zero, zero


@triton.jit
def begin_vector(
    state, table_ptr, problem, o, own, now, FIRST: tl.constexpr, COUNT: tl.constexpr, LEARNED: tl.constexpr
):
    p, m0, m1, m2, v, f0, f1, f2 = state
    at = problem * COUNT + o
    o_f = problem * (3 * COUNT) + o
    p = begin(p, table_ptr, FIRST, at, own, now)
    m0 = begin(m0, table_ptr, FIRST + 1, at, own, now)
    v = begin(v, table_ptr, FIRST + 4, at, own, now)
    if LEARNED:
        m1 = begin(m1, table_ptr, FIRST + 2, at, own, now)
        m2 = begin(m2, table_ptr, FIRST + 3, at, own, now)
        f0 = begin(f0, table_ptr, FIRST + 5, o_f, own, now)
        f1 = begin(f1, table_ptr, FIRST + 5, o_f + COUNT, own, now)
        f2 = begin(f2, table_ptr, FIRST + 5, o_f + 2 * COUNT, own, now)
    return p, m0, m1, m2, v, f0, f1, f2


@triton.jit
def put_vector(state, table_ptr, problem, o, own, FIRST: tl.constexpr, COUNT: tl.constexpr, LEARNED: tl.constexpr):
    at = problem * COUNT + o
    put(table_ptr, FIRST, at, own, state[0])
    put(table_ptr, FIRST + 1, at, own, state[1])
    put(table_ptr, FIRST + 4, at, own, state[4])
    if LEARNED:
        put(table_ptr, FIRST + 2, at, own, state[2])
        put(table_ptr, FIRST + 3, at, own, state[3])
        for k in tl.static_range(3):
            put(table_ptr, FIRST + 5, problem * (3 * COUNT) + k * COUNT + o, own, state[5 + k])


@triton.jit
def inner_loop_kernel(
    table_ptr,  # int64 [2, TENSORS]: addresses of float32 tensors, [problems, ...] and [pairs, ...]
    images_ptr,  # float32 [images, PIXELS]
    labels_ptr,  # int32 [images]
    index_ptr,  # int32 [slots, pairs, BATCH]: the images of each pair's batches
    theta_ptr,  # float32 [problems, theta]
    lr_ptr,  # float32 [slots, problems]
    share_ptr,  # float32 [slots, pairs, BATCH], what examples weigh; read where SHARED
    restart_ptr,  # int32 [pairs]: the slot at whose end a trajectory begins, or `slots`
    loss_ptr,  # float32 [slots, problems], written
    imitation_ptr,  # float32 [slots, problems], written where there is an expert
    slots,
    problems,
    pairs,
    adam_lr_mult,
    clip_norm,
    expert_weight,
    UNITS: tl.constexpr,
    ORTHOGONALIZE: tl.constexpr,  # the variant: Newton-Schulz, and Adam for the biases; else the rule for all
    CLIP: tl.constexpr,  # whether gradients are clipped to clip_norm
    CORRECTED: tl.constexpr,  # Adam's bias correction
    NORMALIZE: tl.constexpr,  # whether a step has an RMS of its rate
    EXPERT: tl.constexpr,  # "", "muon" or "adam"
    SHARED: tl.constexpr,  # whether the examples of a batch have weights of their own
    PRECISION: tl.constexpr,  # of products: "ieee" or "tf32x3"
):
    problem = tl.program_id(0)
    THETA: tl.constexpr = FIRST_BIAS * UNITS + UNITS + UNITS * UNITS + 2 * UNITS + 1
    theta_ptr += problem * THETA
    pair = problem % pairs
    index_ptr += pair * BATCH
    share_ptr += pair * BATCH
    o_pixel = tl.arange(0, PIXELS)
    o_hidden = tl.arange(0, HIDDEN)
    o_class = tl.arange(0, CLASS_BLOCK)
    all_hidden = o_hidden < HIDDEN
    classes_own = o_class < CLASSES
    own1 = all_hidden[:, None] & (o_pixel < PIXELS)[None, :]
    own2 = classes_own[:, None] & all_hidden[None, :]
    w1 = load_matrix(table_ptr, problem, own1, o_hidden, o_pixel, HIDDEN_WEIGHT, HIDDEN, PIXELS)
    w2 = load_matrix(table_ptr, problem, own2, o_class, o_hidden, OUTPUT_WEIGHT, CLASSES, HIDDEN)
    b1 = load_vector(table_ptr, problem, o_hidden, all_hidden, HIDDEN_BIAS, HIDDEN, not ORTHOGONALIZE)
    b2 = load_vector(table_ptr, problem, o_class, classes_own, OUTPUT_BIAS, CLASSES, not ORTHOGONALIZE)
    scale = tl.load(address(table_ptr, STATE, SCALE) + problem)
    iteration = tl.load(address(table_ptr, STATE, ITERATION) + problem)
    restart = tl.load(restart_ptr + pair)

    for slot in range(slots):
        lr = tl.load(lr_ptr + slot * problems + problem)
        loss, g1, gb1, g2, gb2 = network(
            w1[0], b1[0], w2[0], b2[0], scale, images_ptr, labels_ptr, index_ptr, share_ptr, classes_own, SHARED, PRECISION
        )
        index_ptr += pairs * BATCH
        share_ptr += pairs * BATCH
        tl.store(loss_ptr + slot * problems + problem, loss)
        if CLIP:
            square = total(g1 * g1) + tl.sum(gb1 * gb1, 0) + total(g2 * g2) + tl.sum(gb2 * gb2, 0)
            # an infinite square has factor 0, which leaves NaN of an infinite gradient
            finite = tl.abs(square) < float("inf")
            factor = tl.minimum(clip_norm * tl.rsqrt(square), 1.0)
            g1 = tl.where(finite, g1 * factor, 0.0)
            g2 = tl.where(finite, g2 * factor, 0.0)
            gb1 = tl.where(finite, gb1 * factor, 0.0)
            gb2 = tl.where(finite, gb2 * factor, 0.0)
        w1 = matrix_moments(g1, w1, own1, all_hidden, HIDDEN, PIXELS)
        d1 = matrix_direction(g1, w1, own1, all_hidden, theta_ptr, UNITS, HIDDEN, PIXELS)
        # reads theta again: across a barrier no compiler keeps 347 numbers in registers
        tl.debug_barrier()
        w2 = matrix_moments(g2, w2, own2, classes_own, CLASSES, HIDDEN)
        d2 = matrix_direction(g2, w2, own2, classes_own, theta_ptr, UNITS, CLASSES, HIDDEN)
        tl.debug_barrier()
        if ORTHOGONALIZE:
            d1 = orthogonalize(d1, PRECISION)
            d2 = orthogonalize(d2, PRECISION)
        d1 = of_unit_rms(d1, NORMALIZE, HIDDEN * PIXELS)
        d2 = of_unit_rms(d2, NORMALIZE, CLASSES * HIDDEN)
        if EXPERT != "":
            e1 = of_unit_rms(propose(g1, w1[1], w1[4], iteration, EXPERT, PRECISION), True, HIDDEN * PIXELS)
            e2 = of_unit_rms(propose(g2, w2[1], w2[4], iteration, EXPERT, PRECISION), True, CLASSES * HIDDEN)
            dot = total(d1 * e1) + total(d2 * e2)
            squares = (total(d1 * d1) + total(d2 * d2)) * (total(e1 * e1) + total(e2 * e2))
            tl.store(imitation_ptr + slot * problems + problem, 1 - dot * tl.rsqrt(squares + 1e-30))
            d1 = (1 - expert_weight) * d1 + expert_weight * e1
            d2 = (1 - expert_weight) * d2 + expert_weight * e2
        w1 = (w1[0] - lr * d1,) + w1[1:]
        w2 = (tl.where(own2, w2[0] - lr * d2, 0.0),) + w2[1:]
        if ORTHOGONALIZE:
            b1 = adam_vector(gb1, b1, adam_lr_mult * lr, iteration, CORRECTED)
            b2 = adam_vector(gb2, b2, adam_lr_mult * lr, iteration, CORRECTED)
        else:
            b1 = learned_vector(gb1, b1, all_hidden, lr, theta_ptr, UNITS, NORMALIZE, HIDDEN)
            tl.debug_barrier()
            b2 = learned_vector(gb2, b2, classes_own, lr, theta_ptr, UNITS, NORMALIZE, CLASSES)
        now = slot == restart
        w1 = begin_matrix(w1, table_ptr, pair, own1, o_hidden, o_pixel, now, HIDDEN_WEIGHT, HIDDEN, PIXELS)
        w2 = begin_matrix(w2, table_ptr, pair, own2, o_class, o_hidden, now, OUTPUT_WEIGHT, CLASSES, HIDDEN)
        b1 = begin_vector(b1, table_ptr, pair, o_hidden, all_hidden, now, HIDDEN_BIAS, HIDDEN, not ORTHOGONALIZE)
        b2 = begin_vector(b2, table_ptr, pair, o_class, classes_own, now, OUTPUT_BIAS, CLASSES, not ORTHOGONALIZE)
        scale = tl.where(now, tl.load(address(table_ptr, FRESH, SCALE) + pair, mask=now, other=1.0), scale)
        fresh_iteration = tl.load(address(table_ptr, FRESH, ITERATION) + pair, mask=now, other=0.0)
        iteration = tl.where(now, fresh_iteration, iteration + 1)

    put_matrix(w1, table_ptr, problem, own1, o_hidden, o_pixel, HIDDEN_WEIGHT, HIDDEN, PIXELS)
    put_matrix(w2, table_ptr, problem, own2, o_class, o_hidden, OUTPUT_WEIGHT, CLASSES, HIDDEN)
    put_vector(b1, table_ptr, problem, o_hidden, all_hidden, HIDDEN_BIAS, HIDDEN, not ORTHOGONALIZE)
    put_vector(b2, table_ptr, problem, o_class, classes_own, OUTPUT_BIAS, CLASSES, not ORTHOGONALIZE)
    tl.store(address(table_ptr, STATE, SCALE) + problem, scale)
    tl.store(address(table_ptr, STATE, ITERATION) + problem, iteration)
