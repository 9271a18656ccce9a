"""What the kernels see of each parameter: batches of matrices with contiguous columns, and what they cannot take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from celo2.kernels import layout
from celo2.kernels.learned_update import learned_update_kernel
from celo2.matrices import MatrixView
from celo2.plan import Entry, Plan, Slot
from celo2.scratch import Scratch
from celo2.shard_layout import ShardLayout, Slice
from celo2.state import MOMENTUM_KEYS, is_transposed, scales_of
from celo2.step import Messages
from celo2.stochastic_rounding import mix64

PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: `TRITON_INTERPRET=1` when they were imported."""
    return not isinstance(learned_update_kernel, triton.JITFunction)


def interpreter_fault() -> str | None:
    """Return why the interpreter cannot run with the versions that are here, or None when it can."""
    triton_version, numpy_version = (
        tuple(map(int, version.split(".")[:2])) for version in (triton.__version__, np.__version__)
    )
    if triton_version >= (3, 7) or numpy_version < (2, 4):
        return None
    return (
        f"the interpreter of Triton {triton.__version__} does not run with NumPy {np.__version__}: it takes Triton 3.7 "
        "or newer, or NumPy below 2.4 (compiled kernels run with either)"
    )


def unsupported_reason(slot: Slot) -> str | None:
    """Return why the kernels cannot take a whole parameter, or None when they can."""
    parameter, moment = slot.shard, slot.state["second_moment"]
    if parameter.dtype not in PARAMETER_DTYPES or slot.gradient.dtype not in PARAMETER_DTYPES:
        return f"{parameter.dtype} with a gradient of {slot.gradient.dtype}"
    if reason := unsupported_limit(slot.max_grad_norm):
        return reason
    if slot.is_vector:
        return None if parameter.is_contiguous() and moment.is_contiguous() else "a vector with gaps"
    return unsupported_layout(slot.view.matrices(parameter), slot.view.matrices(moment))


def unsupported_shard(entry: Entry, rank: int) -> str | None:
    """Return why the kernels cannot take this rank's shard of a parameter, or None when they can."""
    slot, layout = entry.slot, entry.layout
    p, state = slot.shard, slot.state
    if p.dtype not in PARAMETER_DTYPES:
        return str(p.dtype)
    if devices := {value.device for value in state.values()} - {p.device}:
        return f"state on {devices}, the parameter on {p.device}"
    v = state["second_moment"]
    if layout is None:
        return None if p.is_contiguous() and v.is_contiguous() else "a vector with gaps"
    pairs = zip(layout.views(p, rank), layout.views(v, rank), strict=True)
    return next((reason for pair in pairs if (reason := unsupported_layout(*pair)) is not None), None)


def unsupported_limit(max_grad_norm: float | None) -> str | None:
    """Return why the kernels cannot take gradients that are clipped to a norm, or None when they can."""
    limit = float(layout.GRADIENT_CLIP.value)
    if max_grad_norm is None or max_grad_norm <= limit:
        return None
    return f"max_grad_norm={max_grad_norm}, above the rule's own clip of {limit:g}"


def _is_swapped(matrices: Tensor) -> bool:
    """Whether the kernels see [B, m, n] transposed: stored by columns, or a single row with gaps."""
    _, m, n = matrices.shape
    return is_transposed(matrices) or (m == 1 and n > 1 and matrices.stride(-1) != 1)


def unsupported_layout(p: Tensor, v: Tensor) -> str | None:
    """Return why the kernels cannot take matrices [B, m, n] and their second moment, or None when they can."""
    if _is_swapped(p) != _is_swapped(v):
        return "a parameter and a state that are transposed to each other"
    for tensor in (p, v):
        oriented = tensor.mT if _is_swapped(tensor) else tensor
        if oriented.stride(-1) != 1 and oriented.shape[-1] != 1:
            return f"strides {tuple(p.stride()[1:])}: contiguous along no axis of its matrices"
        if oriented.stride(-2) >= 1 << 24 and oriented.shape[-2] > 1:
            return "rows of more than 16 million elements"
    return None


@dataclass(frozen=True, eq=False)
class Sums:
    """Where the ranks add up the sums of the parts of matrices: addresses of float32, int64 [B] each.

    Rows are those that the kernels see.
    """

    row_totals: NDArray[np.int64] | None  # of g^2 of this part's rows, where columns are cut
    column_totals: NDArray[np.int64] | None  # of its columns, where rows are cut
    squares: NDArray[np.int64]  # of g^2, of which `length` add up to that of the matrix
    length: int
    moments: NDArray[np.int64] | None  # 18 of the elements, then 6 of the vectors of each cut axis
    row_moments: NDArray[np.int64] | None
    column_moments: NDArray[np.int64] | None
    directions: NDArray[np.int64] | None  # of d^2
    mean_factor: NDArray[np.int64]  # of a factor that is here as a whole, of `length`

    def fill(self, table: NDArray[np.int64], first: int, count: int) -> None:
        """Enter them in `count` rows of the table."""
        cut = 0
        shared: dict[str, int | NDArray[np.int64]] = {"SQUARES": self.squares, "SQUARE_PARTS": self.length}
        shared |= {"MEAN_FACTOR": self.mean_factor, "MEAN_LENGTH": self.length}
        if self.row_totals is not None:
            cut |= layout.CUT_COLS.value
            shared |= {"ROW_TOTALS": self.row_totals, "ROW_PARTS": 1}
        if self.column_totals is not None:
            cut |= layout.CUT_ROWS.value
            shared |= {"COLUMN_TOTALS": self.column_totals, "COLUMN_PARTS": 1}
        optional = {"ELEMENT_MOMENTS": self.moments, "DIRECTION_SQUARES": self.directions}
        optional |= {"ROW_MOMENTS": self.row_moments, "COLUMN_MOMENTS": self.column_moments}
        shared |= {name: where for name, where in optional.items() if where is not None}
        fill(table, first, count, CUT=cut, **shared)


@dataclass(frozen=True, eq=False)
class Part:
    """The matrices of a slot, [B, rows, columns] with contiguous columns, or what a rank has of them.

    The rule's axes may be swapped.
    """

    slot: Slot
    p: Tensor
    g: Tensor
    momenta: tuple[Tensor, ...]
    v: Tensor
    row_factor: Tensor  # [B, rows, 3]
    column_factor: Tensor  # [B, columns, 3]
    swapped: bool
    rows_are_short: bool
    whole: tuple[int, int]  # rows and columns of the whole matrices
    seeds: NDArray[np.int64]
    buffer: Tensor | None  # where the gradient is copied to when its own layout does not fit
    counts: bool = True  # whether the first matrix advances the parameter's counter
    sums: Sums | None = None  # None where the sums of the part are those of the whole
    directions: NDArray[np.int64] | None = None  # where directions go, in elements; None for one after another
    scale: Tensor | None = None  # of 8-bit momenta, [B, rows, quanta * 3]

    @classmethod
    def of(
        cls,
        slot: Slot,
        matrices: Callable[[Tensor], Tensor] | None = None,
        factors: tuple[Tensor, Tensor] | None = None,
        whole: tuple[int, int] | None = None,
        seeds: NDArray[np.int64] | None = None,
        scratch: Scratch | None = None,
    ) -> Part:
        """See a slot as matrices: `matrices` views a tensor like its parameter so, and may raise; default, all of it.

        `factors` are those of its rows and columns, and `whole` the shape of which it has a part.
        """
        state = slot.state
        matrices = slot.view.matrices if matrices is None else matrices
        p = matrices(slot.shard)
        swap = _is_swapped(p)
        m, n = p.shape[1:] if whole is None else whole
        if factors is None:
            row, column = (slot.view.factors(state[name], p.shape[0]) for name in ("row_factor", "column_factor"))
        else:
            row, column = factors

        def oriented(tensor: Tensor) -> Tensor:
            return matrices(tensor).mT if swap else matrices(tensor)

        buffer = None
        try:
            if slot.view.order(slot.gradient) != slot.view.order(slot.shard):
                raise ValueError("its columns lie in another order")
            g = oriented(slot.gradient)
            fits = g.stride(-1) == 1 or g.shape[-1] == 1
        except (ValueError, RuntimeError):
            fits = False
        wide = slot.gradient.dtype not in PARAMETER_DTYPES
        if wide or not fits:
            dtype = torch.float32 if wide else slot.gradient.dtype
            like = torch.empty_like(state["second_moment"], dtype=dtype, device="meta")
            scratch = Scratch(p.device) if scratch is None else scratch
            # like all state it is dense
            buffer = scratch.take(f"gradient {slot.position}", like.numel(), dtype=dtype)
            buffer = buffer.as_strided(like.shape, like.stride())
            g = oriented(buffer)
        return cls(
            slot,
            oriented(slot.shard),
            g,
            tuple(oriented(state[name]) for name in MOMENTUM_KEYS),
            oriented(state["second_moment"]),
            column if swap else row,
            row if swap else column,
            swap,
            (m <= n) != swap,
            (n, m) if swap else (m, n),
            seeds_of(slot.position, p.shape[0]) if seeds is None else seeds,
            buffer,
            scale=scales_of(state, p.shape[0]).flatten(-2) if factors is None and "momentum_scale" in state else None,
        )

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return self.p.dtype, self.g.dtype, self.momenta[0].dtype, self.v.dtype

    def aligned(self, columns: int) -> bool:
        """Whether accesses may be 16 bytes wide in tiles of that many columns."""
        tensors = (self.p, self.g, *self.momenta, self.v)
        return (
            self.p.shape[-1] % 16 == 0
            and self.p.shape[-1] >= columns
            # a scale's columns must not straddle a tile
            and (self.momenta[0].dtype != torch.int8 or self.p.shape[-1] % layout.QUANTUM.value == 0)
            and all(tensor.stride(-2) % 16 == 0 or tensor.shape[-2] == 1 for tensor in tensors)
            and all(int(address) % 16 == 0 for tensor in tensors for address in addresses(tensor))
        )


def addresses(matrices: Tensor) -> NDArray[np.int64]:
    """Addresses of the matrices of [B, ...]."""
    return matrices.data_ptr() + matrices.element_size() * matrices.stride(0) * np.arange(matrices.shape[0])


def row_stride(matrices: Tensor) -> int:
    """Elements from row to row; a single row has no next."""
    return matrices.stride(-2) if matrices.shape[-2] > 1 else 0


def _pinned(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return a copy on the host from which a transfer need not wait: the allocator keeps it until it is over."""
    tensor = torch.from_numpy(array.copy())
    return tensor.pin_memory() if device.type == "cuda" and tensor.numel() else tensor


def send(target: Tensor, array: NDArray[Any], captured: list[Tensor]) -> bool:
    """Copy to the device without waiting; returns whether it will be there before the next step.

    A copy that a CUDA graph captures happens at every replay instead, from memory that `captured` keeps.
    """
    source = _pinned(array, target.device)
    target.copy_(source, non_blocking=True)
    if target.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        captured.append(source)
        return False
    return True


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    return _pinned(array, device).to(device, non_blocking=True)


def fill(table: NDArray[np.int64], first: int, count: int, **values: int | NDArray[np.int64]) -> None:
    """Set named columns of the table in `count` rows from `first` on."""
    for name, value in values.items():
        table[first : first + count, getattr(layout, name).value] = value


def seeds_of(position: int, count: int) -> NDArray[np.int64]:
    """Seeds of 32 bits for the matrices of the parameter at `position` of the optimizer."""
    return np.array([mix64(mix64(position) ^ index) >> 32 for index in range(count)], dtype=np.int64)


def parts_of_entry(plan: Plan, entry: Entry, messages: Messages, scratch: Scratch) -> Iterator[tuple[int | None, Part]]:
    """Yield what this rank has of the matrices of an entry with a gradient, each with the number of its slice.

    Factors that are whole on every rank advance there as a whole: those of rows and columns that are on other ranks
    are parts without elements. So does the counter of the parameter, also where the shard is empty.
    """
    cut, slot = entry.layout, entry.slot
    assert cut is not None
    batch, m, n = cut.matrices
    row_factors, column_factors = cut.factor_views(slot.state["row_factor"], slot.state["column_factor"], plan.rank)
    scales: Sequence[Tensor | None] = [None] * len(entry.slices)
    if "momentum_scale" in slot.state:
        scales, _ = cut.factor_views(slot.state["momentum_scale"].flatten(-2), slot.state["column_factor"], plan.rank)
    counts = True
    for number, piece in enumerate(entry.slices):
        matrices = np.arange(piece.matrix, piece.matrix + piece.count)
        part = Part.of(
            slot,
            partial(_slice_of, cut, plan.rank, number),
            (row_factors[number], column_factors[number]),
            (m, n),
            seeds_of_shard(slot.position, entry.home, matrices),
            scratch,
        )
        sums = None if cut.whole else _sums(entry, messages, piece, swapped=part.swapped)
        yield number, replace(part, counts=counts, sums=sums, scale=scales[number])
        counts = False
    for axis, (name, whole) in enumerate(zip(("row_factor", "column_factor"), cut.whole_factors, strict=True)):
        if not whole or not batch * m * n:
            continue
        factor = MatrixView.factors(slot.state[name], batch)
        for absent in _absent(entry.slices, axis, (batch, m, n)):
            start, stop = ((absent.row, absent.rows), (absent.column, absent.columns))[axis]
            there = factor[absent.matrix : absent.matrix + absent.count, start : start + stop]
            # they are seen as columns of matrices without rows
            part = _without_rows(slot, there, (m, n), swapped=axis == 0)
            sums = _sums(entry, messages, absent, swapped=axis == 0)
            # they have nothing to tell the other ranks
            nothing: dict[str, Any] = dict.fromkeys(("row_moments", "column_moments", "moments", "directions"))
            sums = replace(sums, row_totals=None, **nothing)
            yield None, replace(part, counts=counts, sums=sums)
            counts = False
    if counts:
        yield None, _without_rows(slot, slot.shard.new_empty(1, 0, 3), (m, n), swapped=False)


def _absent(slices: Sequence[Slice], axis: int, shape: tuple[int, int, int]) -> Iterator[Slice]:
    """Yield the rows (axis 0) or columns of matrices that are in no slice, as slices without the other axis."""
    batch, *lengths = shape
    length = lengths[axis]

    def of(matrix: int, count: int, start: int, stop: int) -> Slice:
        ends = (start, stop - start, 0, 0) if axis == 0 else (0, 0, start, stop - start)
        return Slice(matrix, count, *ends)

    matrix = 0
    for piece in sorted(slices, key=lambda piece: piece.matrix):
        if matrix < piece.matrix:
            yield of(matrix, piece.matrix - matrix, 0, length)
        start, size = ((piece.row, piece.rows), (piece.column, piece.columns))[axis]
        for first, stop in ((0, start), (start + size, length)):
            if first < stop:
                yield of(piece.matrix, piece.count, first, stop)
        matrix = piece.matrix + piece.count
    if matrix < batch:
        yield of(matrix, batch - matrix, 0, length)


def _sums(entry: Entry, messages: Messages, piece: Slice, *, swapped: bool) -> Sums:
    """Addresses in the messages of a slice of an entry; `swapped`: the kernels see its columns as rows."""
    cut = entry.layout
    assert cut is not None
    batch, m, n = cut.matrices
    matrices = np.arange(piece.matrix, piece.matrix + piece.count)

    def totals(start: int | None, length: int, first: int) -> NDArray[np.int64] | None:
        return None if start is None else messages.gradients.data_ptr() + 4 * (start + length * matrices + first)

    # with both axes cut every rank has both factors: the columns' gives the mean
    by_rows = not cut.cuts_rows
    start, length = (entry.row_totals, m) if by_rows else (entry.column_totals, n)
    squares = totals(start, length, 0)
    assert squares is not None
    factor = MatrixView.factors(entry.slot.state["row_factor" if by_rows else "column_factor"], batch)
    moments = messages.features.data_ptr() + 4 * (entry.feature_sumsq + entry.feature_width * matrices)
    vectors = moments + 4 * layout.ELEMENT_COLUMNS.value
    after = vectors + (4 * layout.CHUNK_SUMS.value if cut.cuts_rows else 0)
    rows = totals(entry.row_totals, m, piece.row), vectors if cut.cuts_rows else None
    columns = totals(entry.column_totals, n, piece.column), after if cut.cuts_columns else None
    (row_totals, row_moments), (column_totals, column_moments) = (columns, rows) if swapped else (rows, columns)
    return Sums(
        row_totals,
        column_totals,
        squares,
        length,
        moments,
        row_moments,
        column_moments,
        None if entry.slot.orthogonalize else messages.directions.data_ptr() + 4 * (entry.direction_sumsq + matrices),
        addresses(factor)[matrices],
    )


def _slice_of(cut: ShardLayout, rank: int, number: int, shard: Tensor) -> Tensor:
    """View the matrices of a slice, [B, rows, columns], in this rank's shard."""
    return cut.views(shard, rank)[number]


def seeds_of_shard(position: int, rank: int, matrices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Seeds of 32 bits: replicas of a shard round alike, different shards do not."""
    shard = mix64(position) ^ mix64(-1 - rank)
    return np.array([mix64(shard ^ int(matrix)) >> 32 for matrix in matrices], dtype=np.int64)


def _without_rows(slot: Slot, factor: Tensor, shape: tuple[int, int], *, swapped: bool) -> Part:
    """Return matrices [B, 0, length] of which this rank has nothing but a factor of the columns, [B, length, 3]."""
    count, length = factor.shape[:2]
    p = slot.shard.new_empty(count, 0, length)
    moment, momentum = (p.to(slot.state[key].dtype) for key in ("second_moment", MOMENTUM_KEYS[0]))
    gradient = slot.gradient.dtype if slot.gradient.dtype in PARAMETER_DTYPES else torch.float32
    m, n = shape
    return Part(
        slot,
        p,
        p.to(gradient),
        (momentum, momentum, momentum),
        moment,
        factor[:, :0],
        factor,
        swapped,
        (m <= n) != swapped,
        (n, m) if swapped else (m, n),
        np.zeros(count, dtype=np.int64),
        None,
        directions=np.zeros(count, dtype=np.int64),
    )
