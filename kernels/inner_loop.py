"""Meta-training's inner loop as one kernel: a program advances one trajectory by a window of slots.

    slot: batch -> loss and gradients of the 64-32-10 network -> moments -> 18 columns -> theta's MLP -> Newton-Schulz
          -> update -> loss to memory -> the start of another trajectory, where one has ended

A trajectory's tensors (weights, three momenta, v and factors of a 32 x 64 and a 10 x 32 matrix, and the biases), 53 KB
with Newton-Schulz, stay in the first-level cache of the multiprocessor that has its program: a slot reads and writes
them there. Its batch, 64 x 64 numbers, comes from the second-level cache. Theta is the trajectory's own, 347 numbers
that every thread of a program needs alike.

The smaller matrix is padded to 16 rows, which `tl.dot` asks for: rows outside hold zeros and are left out of sums.
Source: meta-training of Celo2 (arXiv 2602.19142); the network and the rule are `celo2.meta.network` and
`celo2.meta.inner_optimizer`; the blend with an expert is ELO's (arXiv 2607.06772).
"""

from __future__ import annotations

import triton
import triton.language as tl

from celo2.kernels.inner_rule import (
    FIRST_BIAS,
    NAN,
    adam_vector,
    learned_vector,
    matrix_direction,
    matrix_moments,
    matrix_normalisers,
    of_unit_rms,
    orthogonalize,
    propose,
    row_sums_of,
    total,
)

PIXELS = tl.constexpr(64)
HIDDEN = tl.constexpr(32)
CLASSES = tl.constexpr(10)
CLASS_BLOCK = tl.constexpr(16)
BATCH = tl.constexpr(64)
CHUNK = tl.constexpr(16)

# rows of the table of addresses: a trajectory's tensors, and those of the trajectories that begin in the window
STATE = tl.constexpr(0)
FRESH = tl.constexpr(1)
# its columns: a matrix has seven (weights, three momenta, v, row factors, column factors), a vector six (one factor)
HIDDEN_WEIGHT = tl.constexpr(0)
OUTPUT_WEIGHT = tl.constexpr(7)
HIDDEN_BIAS = tl.constexpr(14)
OUTPUT_BIAS = tl.constexpr(20)
SCALE = tl.constexpr(26)
ITERATION = tl.constexpr(27)
TENSORS = tl.constexpr(28)

# eight elements of the larger matrix a thread
WARPS = 8


@triton.jit
def address(table_ptr, row, TENSOR: tl.constexpr):
    """Load an address of the table, a multiple of 16 bytes, as a pointer to float32."""
    return tl.multiple_of(tl.load(table_ptr + row * TENSORS + TENSOR).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def take(table_ptr, row, TENSOR: tl.constexpr, offsets, own):
    """Load elements of a tensor of the table, zeros where `own` is not."""
    return tl.load(address(table_ptr, row, TENSOR) + offsets, mask=own, other=0.0)


@triton.jit
def put(table_ptr, TENSOR: tl.constexpr, offsets, own, x):
    tl.store(address(table_ptr, STATE, TENSOR) + offsets, x, mask=own)


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
    loss = 0.0
    g_w1 = tl.zeros_like(w1)
    g_b1 = tl.zeros_like(b1)
    g_w2 = tl.zeros_like(w2)
    g_b2 = tl.zeros_like(b2)
    o_example = tl.arange(0, CHUNK)
    o_class = tl.arange(0, CLASS_BLOCK)
    # some examples at a time: a product holds a thread's rows and columns of both factors in registers
    for start in range(0, BATCH, CHUNK):
        picked = tl.load(index_ptr + start + o_example)
        x = tl.load(images_ptr + picked[:, None] * PIXELS + tl.arange(0, PIXELS)[None, :])  # [CHUNK, PIXELS]
        label = tl.load(labels_ptr + picked)
        hidden = tl.dot(w1, tl.trans(x), input_precision=PRECISION)  # [HIDDEN, CHUNK]
        hidden = tl.maximum(scale * (hidden + b1[:, None]), 0.0, NAN)
        logits = scale * (tl.dot(w2, hidden, input_precision=PRECISION) + b2[:, None])  # [CLASS_BLOCK, CHUNK]
        logits = tl.where(classes_own[:, None], logits, float("-inf"))
        logits = logits - tl.max(logits, 0)[None, :]
        power = tl.exp(logits)
        sums = tl.sum(power, 0)
        target = o_class[:, None] == label[None, :]
        chosen = tl.sum(tl.where(target, logits, 0.0), 0) - tl.log(sums)
        share = tl.load(share_ptr + start + o_example) if SHARED else tl.full([CHUNK], 1 / BATCH, tl.float32)
        loss -= tl.sum(chosen * share, 0)
        g_logits = (power / sums[None, :] - tl.where(target, 1.0, 0.0)) * (scale * share)[None, :]
        g_logits = tl.where(classes_own[:, None], g_logits, 0.0)
        g_hidden = tl.dot(tl.trans(w2), g_logits, input_precision=PRECISION)
        g_hidden = tl.where(hidden > 0, g_hidden, g_hidden * 0.0) * scale
        g_w1 += tl.dot(g_hidden, x, input_precision=PRECISION)
        g_b1 += tl.sum(g_hidden, 1)
        g_w2 += tl.dot(g_logits, tl.trans(hidden), input_precision=PRECISION)
        g_b2 += tl.sum(g_logits, 1)
    return loss, g_w1, g_b1, g_w2, g_b2


@triton.jit
def load_matrix(
    table_ptr, row, number, own, o_row, o_column, FIRST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Return the tensors of a matrix: of a problem in row STATE of the table, of a pair in row FRESH."""
    o = number * (ROWS * COLS) + o_row[:, None] * COLS + o_column[None, :]
    o_r = number * (3 * ROWS) + o_row
    o_c = number * (3 * COLS) + o_column
    in_rows = o_row < ROWS
    in_columns = o_column < COLS
    return (
        take(table_ptr, row, FIRST, o, own),
        take(table_ptr, row, FIRST + 1, o, own),
        take(table_ptr, row, FIRST + 2, o, own),
        take(table_ptr, row, FIRST + 3, o, own),
        take(table_ptr, row, FIRST + 4, o, own),
        take(table_ptr, row, FIRST + 5, o_r, in_rows),
        take(table_ptr, row, FIRST + 5, o_r + ROWS, in_rows),
        take(table_ptr, row, FIRST + 5, o_r + 2 * ROWS, in_rows),
        take(table_ptr, row, FIRST + 6, o_c, in_columns),
        take(table_ptr, row, FIRST + 6, o_c + COLS, in_columns),
        take(table_ptr, row, FIRST + 6, o_c + 2 * COLS, in_columns),
    )


@triton.jit
def put_matrix(
    state, table_ptr, problem, own, write, o_row, o_column, FIRST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Store the tensors of a matrix where `write`."""
    o = problem * (ROWS * COLS) + o_row[:, None] * COLS + o_column[None, :]
    o_r = problem * (3 * ROWS) + o_row
    o_c = problem * (3 * COLS) + o_column
    in_rows = (o_row < ROWS) & write
    in_columns = (o_column < COLS) & write
    for k in tl.static_range(5):
        put(table_ptr, FIRST + k, o, own & write, state[k])
    for k in tl.static_range(3):
        put(table_ptr, FIRST + 5, o_r + k * ROWS, in_rows, state[5 + k])
        put(table_ptr, FIRST + 6, o_c + k * COLS, in_columns, state[8 + k])


@triton.jit
def step_matrix(
    g,
    table_ptr,
    row,
    number,
    problem,
    own,
    o_row,
    o_column,
    theta_ptr,
    iteration,
    lr,
    expert_weight,
    UNITS: tl.constexpr,
    ORTHOGONALIZE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXPERT: tl.constexpr,
    PRECISION: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Advance a matrix in memory; return its part of the product of learned and expert step, and of their squares."""
    state = load_matrix(table_ptr, row, number, own, o_row, o_column, FIRST, ROWS, COLS)
    state = matrix_moments(g, state, own, o_row < ROWS, ROWS, COLS)
    put_matrix(state, table_ptr, problem, own, True, o_row, o_column, FIRST, ROWS, COLS)
    row_sums = row_sums_of(state, o_row < ROWS, o_row.shape[0], COLS)
    normalisers = matrix_normalisers(g, state, own, row_sums, o_row.shape[0], ROWS, COLS)
    # read again: no compiler then keeps the 18 columns of every element from one pass to the next
    tl.debug_barrier()
    state = load_matrix(table_ptr, STATE, problem, own, o_row, o_column, FIRST, ROWS, COLS)
    d = matrix_direction(g, state, own, row_sums, normalisers, theta_ptr, UNITS, ROWS, COLS)
    if ORTHOGONALIZE:
        d = orthogonalize(d, PRECISION)
    d = of_unit_rms(d, NORMALIZE, ROWS * COLS)
    dot = 0.0
    square = 0.0
    expert_square = 0.0
    if EXPERT != "":
        e = of_unit_rms(propose(g, state[1], state[4], iteration, EXPERT, PRECISION), True, ROWS * COLS)
        dot = total(d * e)
        square = total(d * d)
        expert_square = total(e * e)
        d = (1 - expert_weight) * d + expert_weight * e
    put(table_ptr, FIRST, problem * (ROWS * COLS) + o_row[:, None] * COLS + o_column[None, :], own, state[0] - lr * d)
    return dot, square, expert_square


@triton.jit
def load_vector(table_ptr, row, number, o, own, FIRST: tl.constexpr, COUNT: tl.constexpr, LEARNED: tl.constexpr):
    """Return the tensors of a vector; those that Adam has not are zero."""
    zero = tl.zeros_like(o).to(tl.float32)
    at = number * COUNT + o
    p = take(table_ptr, row, FIRST, at, own)
    m0 = take(table_ptr, row, FIRST + 1, at, own)
    v = take(table_ptr, row, FIRST + 4, at, own)
    if LEARNED:
        o_f = number * (3 * COUNT) + o
        return (
            p,
            m0,
            take(table_ptr, row, FIRST + 2, at, own),
            take(table_ptr, row, FIRST + 3, at, own),
            v,
            take(table_ptr, row, FIRST + 5, o_f, own),
            take(table_ptr, row, FIRST + 5, o_f + COUNT, own),
            take(table_ptr, row, FIRST + 5, o_f + 2 * COUNT, own),
        )
    return p, m0, zero, zero, v, zero, zero, zero


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
    LEARNED: tl.constexpr = not ORTHOGONALIZE
    THETA: tl.constexpr = FIRST_BIAS * UNITS + UNITS + UNITS * UNITS + 2 * UNITS + 1
    problem = tl.program_id(0)
    pair = problem % pairs
    theta_ptr += problem * THETA
    index_ptr += pair * BATCH
    share_ptr += pair * BATCH
    restart = tl.load(restart_ptr + pair)
    o_pixel = tl.arange(0, PIXELS)
    o_hidden = tl.arange(0, HIDDEN)
    o_class = tl.arange(0, CLASS_BLOCK)
    all_hidden = o_hidden < HIDDEN
    classes_own = o_class < CLASSES
    own1 = all_hidden[:, None] & (o_pixel < PIXELS)[None, :]
    own2 = classes_own[:, None] & all_hidden[None, :]
    o1 = o_hidden[:, None] * PIXELS + o_pixel[None, :]
    o2 = o_class[:, None] * HIDDEN + o_hidden[None, :]

    for slot in tl.range(0, slots, disable_licm=True):
        # after a restart the state is where the new trajectory begins
        fresh = slot == restart + 1
        row = tl.where(fresh, FRESH, STATE)
        number = tl.where(fresh, pair, problem)
        scale = tl.load(address(table_ptr, row, SCALE) + number)
        iteration = tl.load(address(table_ptr, row, ITERATION) + number)
        lr = tl.load(lr_ptr + slot * problems + problem)
        loss, g1, gb1, g2, gb2 = network(
            take(table_ptr, row, HIDDEN_WEIGHT, number * (HIDDEN * PIXELS) + o1, own1),
            take(table_ptr, row, HIDDEN_BIAS, number * HIDDEN + o_hidden, all_hidden),
            take(table_ptr, row, OUTPUT_WEIGHT, number * (CLASSES * HIDDEN) + o2, own2),
            take(table_ptr, row, OUTPUT_BIAS, number * CLASSES + o_class, classes_own),
            scale,
            images_ptr,
            labels_ptr,
            index_ptr,
            share_ptr,
            classes_own,
            SHARED,
            PRECISION,
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
        # one tensor after the other: across a barrier no compiler keeps theta or another tensor's state in registers
        tl.debug_barrier()
        dot1, own_square1, expert_square1 = step_matrix(
            g1,
            table_ptr,
            row,
            number,
            problem,
            own1,
            o_hidden,
            o_pixel,
            theta_ptr,
            iteration,
            lr,
            expert_weight,
            UNITS,
            ORTHOGONALIZE,
            NORMALIZE,
            EXPERT,
            PRECISION,
            HIDDEN_WEIGHT,
            HIDDEN,
            PIXELS,
        )
        tl.debug_barrier()
        dot2, own_square2, expert_square2 = step_matrix(
            g2,
            table_ptr,
            row,
            number,
            problem,
            own2,
            o_class,
            o_hidden,
            theta_ptr,
            iteration,
            lr,
            expert_weight,
            UNITS,
            ORTHOGONALIZE,
            NORMALIZE,
            EXPERT,
            PRECISION,
            OUTPUT_WEIGHT,
            CLASSES,
            HIDDEN,
        )
        if EXPERT != "":
            squares = (own_square1 + own_square2) * (expert_square1 + expert_square2)
            cosine = (dot1 + dot2) * tl.rsqrt(squares + 1e-30)
            tl.store(imitation_ptr + slot * problems + problem, 1 - cosine)
        tl.debug_barrier()
        b1 = load_vector(table_ptr, row, number, o_hidden, all_hidden, HIDDEN_BIAS, HIDDEN, LEARNED)
        b2 = load_vector(table_ptr, row, number, o_class, classes_own, OUTPUT_BIAS, CLASSES, LEARNED)
        if ORTHOGONALIZE:
            b1 = adam_vector(gb1, b1, adam_lr_mult * lr, iteration, CORRECTED)
            b2 = adam_vector(gb2, b2, adam_lr_mult * lr, iteration, CORRECTED)
        else:
            b1 = learned_vector(gb1, b1, all_hidden, lr, theta_ptr, UNITS, NORMALIZE, HIDDEN)
            tl.debug_barrier()
            b2 = learned_vector(gb2, b2, classes_own, lr, theta_ptr, UNITS, NORMALIZE, CLASSES)
        put_vector(b1, table_ptr, problem, o_hidden, all_hidden, HIDDEN_BIAS, HIDDEN, LEARNED)
        put_vector(b2, table_ptr, problem, o_class, classes_own, OUTPUT_BIAS, CLASSES, LEARNED)
        tl.store(address(table_ptr, STATE, SCALE) + problem, scale)
        tl.store(address(table_ptr, STATE, ITERATION) + problem, iteration + 1)
        # what a thread wrote another may read in the next slot
        tl.debug_barrier()

    # a trajectory that begins at the end of the last slot
    begins = restart == slots - 1
    hidden_begin = all_hidden & begins
    classes_begin = classes_own & begins
    w1 = load_matrix(table_ptr, FRESH, pair, own1, o_hidden, o_pixel, HIDDEN_WEIGHT, HIDDEN, PIXELS)
    w2 = load_matrix(table_ptr, FRESH, pair, own2, o_class, o_hidden, OUTPUT_WEIGHT, CLASSES, HIDDEN)
    b1 = load_vector(table_ptr, FRESH, pair, o_hidden, hidden_begin, HIDDEN_BIAS, HIDDEN, LEARNED)
    b2 = load_vector(table_ptr, FRESH, pair, o_class, classes_begin, OUTPUT_BIAS, CLASSES, LEARNED)
    put_matrix(w1, table_ptr, problem, own1, begins, o_hidden, o_pixel, HIDDEN_WEIGHT, HIDDEN, PIXELS)
    put_matrix(w2, table_ptr, problem, own2, begins, o_class, o_hidden, OUTPUT_WEIGHT, CLASSES, HIDDEN)
    put_vector(b1, table_ptr, problem, o_hidden, hidden_begin, HIDDEN_BIAS, HIDDEN, LEARNED)
    put_vector(b2, table_ptr, problem, o_class, classes_begin, OUTPUT_BIAS, CLASSES, LEARNED)
    for k in tl.static_range(SCALE, TENSORS):
        x = tl.load(address(table_ptr, FRESH, k) + pair, mask=begins, other=0.0)
        tl.store(address(table_ptr, STATE, k) + problem, x, mask=begins)
