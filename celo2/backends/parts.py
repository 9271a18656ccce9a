"""What the kernels see of each parameter: batches of matrices with contiguous columns, and what they cannot take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

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
from celo2.state import MOMENTUM_KEYS, is_transposed
from celo2.step import Messages
from celo2.stochastic_rounding import mix64

if TYPE_CHECKING:
    from celo2.sharding import ShardLayout

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


def unsupported_shard(entry: Entry, ranks: int, rank: int) -> str | None:
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
    pairs = zip(layout.views(p, ranks, rank), layout.views(v, ranks, rank), strict=True)
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


class Sums(NamedTuple):
    """Where the ranks add up the sums of the parts of matrices: addresses of float32, int64 [B] each."""

    cut: int  # layout.CUT_ROWS or CUT_COLS
    totals: NDArray[np.int64]  # of g^2 along the cut axis
    moments: NDArray[np.int64]  # 18 of the elements, 6 of the vectors along the cut axis
    squares: NDArray[np.int64] | None  # of d^2

    def fill(self, table: NDArray[np.int64], first: int, count: int, length: int) -> None:
        """Enter them in `count` rows of the table; `length` is that of the axis that is not cut."""
        shared: dict[str, int | NDArray[np.int64]] = {"CUT": self.cut}
        shared |= {"SQUARES": self.totals, "SQUARE_PARTS": length}
        shared |= {"ELEMENT_MOMENTS": self.moments}
        if self.squares is not None:
            shared |= {"DIRECTION_SQUARES": self.squares}
        vectors = self.moments + 4 * layout.ELEMENT_COLUMNS.value
        if self.cut == layout.CUT_ROWS.value:
            shared |= {"COLUMN_TOTALS": self.totals, "COLUMN_PARTS": 1, "ROWS_GIVE_MEAN": 0}
            shared |= {"ROW_MOMENTS": vectors}
        else:
            shared |= {"ROW_TOTALS": self.totals, "ROW_PARTS": 1, "ROWS_GIVE_MEAN": 1}
            shared |= {"COLUMN_MOMENTS": vectors}
        fill(table, first, count, **shared)


class Part(NamedTuple):
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

    Of matrices that are on other ranks alone it has a factor, when that is whole on every rank, and the counter of
    the parameter advances also where the shard is empty: parts without rows.
    """
    cut, ranks, rank, slot, state = entry.layout, plan.ranks, plan.rank, entry.slot, entry.slot.state
    assert cut is not None
    batch, m, n = cut.matrices
    row_factors, column_factors = (
        cut.factor_views(state[name], cut.kind != whole, ranks, rank)
        for name, whole in (("row_factor", "columns"), ("column_factor", "rows"))
    )
    counts = True
    for number, piece in enumerate(entry.slices):
        matrices = np.arange(piece.matrix, piece.matrix + piece.count)
        part = Part.of(
            slot,
            partial(_slice_of, cut, ranks, rank, number),
            (row_factors[number], column_factors[number]),
            (m, n),
            seeds_of_shard(slot.position, rank, matrices),
            scratch,
        )
        sums = None if cut.kind == "whole" else _sums(entry, messages, matrices, (cut.kind == "rows") != part.swapped)
        yield number, part._replace(counts=counts, sums=sums)
        counts = False
    if cut.kind == "whole" or not batch * m * n:
        if counts:
            yield None, _without_rows(slot, slot.shard.new_empty(1, 0, 3), (m, n), swapped=False)
        return
    name = "column_factor" if cut.kind == "rows" else "row_factor"
    factor = MatrixView.factors(state[name], batch)
    here = [b for piece in entry.slices for b in range(piece.matrix, piece.matrix + piece.count)]
    for first, stop in ((0, min(here, default=batch)), (max(here, default=batch - 1) + 1, batch)):
        if first < stop:
            part = _without_rows(slot, factor[first:stop], (m, n), swapped=cut.kind != "rows")
            sums = _sums(entry, messages, np.arange(first, stop), cuts_rows=True)
            yield None, part._replace(counts=counts, sums=sums)
            counts = False


def _sums(entry: Entry, messages: Messages, matrices: NDArray[np.int64], cuts_rows: bool) -> Sums:
    """Addresses in the messages of some matrices of an entry; `cuts_rows` is about the rows of a part."""
    assert entry.layout is not None
    _, m, n = entry.layout.matrices
    length = n if entry.layout.kind == "rows" else m
    squares = messages.directions.data_ptr() + 4 * (entry.direction_sumsq + matrices)
    return Sums(
        (layout.CUT_ROWS if cuts_rows else layout.CUT_COLS).value,
        messages.gradients.data_ptr() + 4 * (entry.grad_sumsq + length * matrices),
        messages.features.data_ptr() + 4 * (entry.feature_sumsq + 24 * matrices),
        None if entry.slot.orthogonalize else squares,
    )


def _slice_of(cut: ShardLayout, ranks: int, rank: int, number: int, shard: Tensor) -> Tensor:
    """View the matrices of a slice, [B, rows, columns], in this rank's shard."""
    return cut.views(shard, ranks, rank)[number]


def seeds_of_shard(position: int, rank: int, matrices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Seeds of 32 bits: replicas of a shard round alike, different shards do not."""
    shard = mix64(position) ^ mix64(-1 - rank)
    return np.array([mix64(shard ^ int(matrix)) >> 32 for matrix in matrices], dtype=np.int64)


def _without_rows(slot: Slot, factor: Tensor, shape: tuple[int, int], *, swapped: bool) -> Part:
    """Return matrices [B, 0, length] of which this rank has nothing but a factor of the columns, [B, length, 3]."""
    count, length = factor.shape[:2]
    p = slot.shard.new_empty(count, 0, length)
    moment = p.to(slot.state["second_moment"].dtype)
    gradient = slot.gradient.dtype if slot.gradient.dtype in PARAMETER_DTYPES else torch.float32
    m, n = shape
    return Part(
        slot,
        p,
        p.to(gradient),
        (moment, moment, moment),
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
