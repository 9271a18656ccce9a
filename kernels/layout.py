"""What the kernels agree on: the table of matrices, the planes of scratch memory, and how a tile is addressed.

A launch steps any number of matrices. `table` is int64 [matrices, COLUMNS] on the device: a row per matrix with the
addresses of its tensors, its shape, its strides and where its vectors and partial sums lie in the scratch memory.
Gradients may move from step to step, so their addresses are an array of their own, `gradients`, int64 [matrices].
`tiles` is int32 [tiles, 3]: matrix, first row, first column. A program takes one tile.

Every matrix is seen with contiguous columns (a transposed one is entered transposed, `ROWS_ARE_SHORT` keeps the rule's
choice of axis). With ALIGNED, all addresses are multiples of 16 bytes and all lengths and strides along columns
multiples of 16 elements, so that accesses are 16 bytes wide; without, any shape goes, element by element.
"""

from __future__ import annotations

import triton
import triton.language as tl

# columns of the table
P = tl.constexpr(0)  # addresses of the first elements
MOMENTUM = tl.constexpr(1)  # three columns
V = tl.constexpr(4)
D = tl.constexpr(5)  # the direction, [rows, columns] without gaps
ROWS = tl.constexpr(6)
COLS = tl.constexpr(7)
P_STRIDE = tl.constexpr(8)
G_STRIDE = tl.constexpr(9)
STATE_STRIDE = tl.constexpr(10)
ROW_FACTOR = tl.constexpr(11)  # address of [rows, 3], contiguous
COLUMN_FACTOR = tl.constexpr(12)  # address of [columns, 3], contiguous
ROW_SUMS = tl.constexpr(13)  # first partial sum of the rows: [tiles along a row, rows]
COLUMN_SUMS = tl.constexpr(14)  # [tiles along a column, columns]
FIRST_TILE = tl.constexpr(15)  # of the matrix, and how many
TILES = tl.constexpr(16)
ROW_CHUNK = tl.constexpr(17)  # first chunk of its rows in `vectors`, and how many
ROW_CHUNKS = tl.constexpr(18)
COLUMN_CHUNK = tl.constexpr(19)
COLUMN_CHUNKS = tl.constexpr(20)
ROWS_ARE_SHORT = tl.constexpr(21)
GROUP = tl.constexpr(22)
SEED = tl.constexpr(23)  # of its random bits, 32 bits
COUNTER = tl.constexpr(24)  # address of its parameter's step counter, float32
COUNTS = tl.constexpr(25)  # 1 for the one matrix of a parameter that advances the counter
MOMENTUM_SCALE = tl.constexpr(26)  # address of [rows, quanta, 3], for 8-bit momenta
# sums over the whole matrix: a row of the table may be a shard of one, and some of its sums then come from all ranks
WHOLE_ROWS = tl.constexpr(27)  # lengths of the whole matrix: ROWS and COLS unless it is sharded
WHOLE_COLS = tl.constexpr(28)
CUT = tl.constexpr(29)  # which of its axes are sharded: bits CUT_ROWS and CUT_COLS
ROW_TOTALS = tl.constexpr(30)  # address of the sums of g^2 of whole rows, float32 [parts, rows], and their parts
ROW_PARTS = tl.constexpr(31)
COLUMN_TOTALS = tl.constexpr(32)
COLUMN_PARTS = tl.constexpr(33)
SQUARES = tl.constexpr(34)  # address of what adds up to the sum of g^2, float32 [parts]: one part, or many in a message
SQUARE_PARTS = tl.constexpr(35)
MEAN_FACTOR = tl.constexpr(36)  # address of a factor over all rows or all columns, [length, 3], which gives the mean
MEAN_LENGTH = tl.constexpr(37)
ROW_MOMENTS = tl.constexpr(38)  # address of the sums over the rows' factors, float32 [CHUNK_SUMS]
COLUMN_MOMENTS = tl.constexpr(39)
ELEMENT_MOMENTS = tl.constexpr(40)  # address of the sums of the 18 per-element columns, float32 [ELEMENT_COLUMNS]
DIRECTION_SQUARES = tl.constexpr(41)  # address of the sum of d^2, float32
COLUMNS = tl.constexpr(42)

CUT_ROWS = tl.constexpr(1)
CUT_COLS = tl.constexpr(2)

# `vectors`, float32 [chunks, PLANES + units, chunk]: new factors, their scales rf or cf, first-layer contributions
FACTOR = tl.constexpr(0)
SCALE = tl.constexpr(3)
UNIT = tl.constexpr(6)

# sums of a chunk of vectors: 3 of F^2, 3 of 1 / (F + eps), padded
CHUNK_SUMS = tl.constexpr(6)
CHUNK_STRIDE = tl.constexpr(8)
# the 18 per-element columns, padded; a matrix has the sums of its rows and columns in the padding
ELEMENT_COLUMNS = tl.constexpr(18)
ELEMENT_STRIDE = tl.constexpr(32)

# what ranks add up. The first message: the sum of g^2, whether one of them must skip the step, a flag for each sharded
# parameter that has a gradient, and sums of g^2 along cut axes. The second: 18 and 6 sums of squares a matrix
FLAGS = tl.constexpr(2)

# `control`, float32 [1 + groups, 2]: 1 when the step is accepted, and the gradient norm; then for each group what its
# gradients are multiplied by, and what their squares of phase 1 still lack
CONTROL = tl.constexpr(2)
# `rates`, float32 [groups, 2]: learning rate and weight decay
RATES = tl.constexpr(2)

# columns of a row that share the scale of their 8-bit momenta
QUANTUM = tl.constexpr(64)

# constants of the rule
HALF_MAX = tl.constexpr(65504.0)  # of float16
GRADIENT_CLIP = tl.constexpr(1000.0)
FEATURE_CLIP = tl.constexpr(0.1)
DECAYS = tl.constexpr((0.9, 0.99, 0.999))
SECOND_MOMENT_DECAY = tl.constexpr(0.95)
SQUARE_EPS = tl.constexpr(1e-30)
FACTOR_EPS = tl.constexpr(1e-9)
RMS_EPS = tl.constexpr(1e-8)
NORM_EPS = tl.constexpr(1e-9)


@triton.jit
def entry(table_ptr, matrix, COLUMN: tl.constexpr):
    """Load one entry of the table, int64."""
    return tl.load(table_ptr + matrix.to(tl.int64) * COLUMNS + COLUMN)


@triton.jit
def sums_at(table_ptr, matrix, COLUMN: tl.constexpr):
    """Load an address of the table as a pointer to float32."""
    return entry(table_ptr, matrix, COLUMN).to(tl.pointer_type(tl.float32))


@triton.jit
def tensor_at(table_ptr, matrix, COLUMN: tl.constexpr, like, ALIGNED: tl.constexpr):
    """Load an address of the table as a pointer to the element type of the pointer `like`."""
    pointer = entry(table_ptr, matrix, COLUMN).to(like.dtype)
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def gradient_at(gradients_ptr, matrix, like, ALIGNED: tl.constexpr):
    """Load the address of a gradient as a pointer to the element type of `like`."""
    pointer = tl.load(gradients_ptr + matrix).to(like.dtype)
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def length_of(table_ptr, matrix, COLUMN: tl.constexpr, ALIGNED: tl.constexpr):
    """Load a length or stride along columns, int64."""
    # the hint sticks to an operation, not to the result of a call
    length = tl.load(table_ptr + matrix.to(tl.int64) * COLUMNS + COLUMN)
    return tl.multiple_of(length, 16) if ALIGNED else length


@triton.jit
def accepted(control_ptr):
    """Return whether this step is taken; a kernel that writes state or parameters ends at once when it is not."""
    return tl.load(control_ptr) != 0


@triton.jit
def gradient_scale_of(control_ptr, table_ptr, matrix):
    """Return what the gradient of a matrix is multiplied by: loss unscaling times global-norm clipping."""
    return tl.load(control_ptr + (1 + entry(table_ptr, matrix, GROUP)) * CONTROL)


@triton.jit
def columns_of(column0, columns, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the first column of a tile (int64), and which of its columns [1, BLOCK] are inside and its own.

    When ALIGNED (at least BLOCK columns), a last tile that sticks out moves back over its neighbour, so loads need no
    mask; stores and sums leave the neighbour's columns out.
    """
    column0 = tl.multiple_of(column0.to(tl.int64), 16)
    if ALIGNED:
        first = tl.multiple_of(tl.minimum(column0, columns - BLOCK), 16)
        own = (first + tl.arange(0, BLOCK) >= column0)[None, :]
    else:
        first = column0
        own = (first + tl.arange(0, BLOCK) < columns)[None, :]
    return first, own


@triton.jit
def tile_of(table_ptr, tiles_ptr, tile, BLOCK_COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a tile's matrix, its first row and column, the matrix's lengths, and what `columns_of` says of it."""
    matrix = tl.load(tiles_ptr + 3 * tile)
    row0 = tl.load(tiles_ptr + 3 * tile + 1)
    column0 = tl.load(tiles_ptr + 3 * tile + 2)
    rows = entry(table_ptr, matrix, ROWS).to(tl.int32)
    columns = length_of(table_ptr, matrix, COLS, ALIGNED)
    column, own = columns_of(column0, columns, BLOCK_COLUMNS, ALIGNED)
    return matrix, row0, column0, rows, columns, column, own


@triton.jit
def vectors_of(
    table_ptr,
    vectors_ptr,
    matrix,
    row0,
    column0,
    PLANES: tl.constexpr,
    STEP_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Return where in `vectors` the first plane of a tile's rows is (an address), and of its columns (a tile of them).

    The columns have as many addresses as a tile has elements, so that their loads have the tile's layout and need no
    exchange between threads.
    """
    CHUNK: tl.constexpr = PLANES * BLOCK_COLUMNS
    row_chunk = entry(table_ptr, matrix, ROW_CHUNK) + row0 // BLOCK_COLUMNS
    column_chunk = entry(table_ptr, matrix, COLUMN_CHUNK) + column0 // BLOCK_COLUMNS
    row_ptr = vectors_ptr + row_chunk * CHUNK + row0 % BLOCK_COLUMNS
    o_column = tl.broadcast_to(tl.arange(0, BLOCK_COLUMNS)[None, :], [STEP_ROWS, BLOCK_COLUMNS])
    return row_ptr, vectors_ptr + column_chunk * CHUNK + o_column


@triton.jit
def quanta_of(table_ptr, matrix, columns, column, BLOCK_COLUMNS: tl.constexpr):
    """Return the address of a matrix's scales [rows, quanta, 3], quanta of a row, and a tile's [1, quanta]."""
    o_quantum = (column // QUANTUM + tl.arange(0, BLOCK_COLUMNS // QUANTUM))[None, :]
    return sums_at(table_ptr, matrix, MOMENTUM_SCALE), tl.cdiv(columns, QUANTUM), o_quantum
