"""The step through the Triton kernels: what they need in memory, made once, and the order of their launches.

Parameters that share dtypes, theta, options and the width of their tiles form a batch, and a batch is stepped by ten
launches whatever its number of matrices. Four go over the elements: gradient moments, feature moments, learned update,
and after Newton-Schulz the new parameters. Between them small ones add up what the tiles have left, decide on clipping
and skipping (once for all batches), and make the factors and normalisers. Nothing waits for the device: the global norm
and the decision to skip a step stay there. Addresses of gradients are refreshed when they move; all else is built
anew when a parameter, its state or its layout changes, and once for each set of parameters that have gradients
(`celo2.kernel_plan`). `celo2.sharded_kernel_step` makes the same launches on shards of matrices, and lets the ranks add
up their sums in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from celo2.adamw import AdamWJob, round_on_host
from celo2.batched_newton_schulz import orthogonalize_, rehearse_products
from celo2.blocks import CONTROL_BLOCK, NARROWEST, VECTOR_BLOCK, WIDEST, Blocks
from celo2.compilation import can_rehearse, launch, rehearsal
from celo2.kernels import layout
from celo2.kernels.apply_update import apply_update_kernel
from celo2.kernels.feature_moments import feature_moments_kernel, normalisers_kernel
from celo2.kernels.gradient_moments import control_kernel, factors_kernel, gradient_moments_kernel
from celo2.kernels.learned_update import learned_update_kernel
from celo2.kernels.reductions import MOMENT_PROGRAMS, sum_directions_kernel, sum_gradients_kernel, sum_moments_kernel
from celo2.kernels.rounding import round_kernel
from celo2.kernels.vector_update import vector_update_kernel
from celo2.matrices import MatrixView
from celo2.newton_schulz import EPS
from celo2.norms import foreach_norm
from celo2.phases import ELEMENT_ROWS, LONG_ROWS, SHORT_ROWS
from celo2.scratch import Scratch, padded
from celo2.state import MOMENTUM_KEYS, is_transposed, local
from celo2.stochastic_rounding import mix64
from celo2.theta import Theta

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


class LearnedJob(NamedTuple):
    """One parameter of the learned rule, and the options of its group that its kernels depend on.

    Of a sharded parameter (a DTensor) `shard`, `gradient` and `state` are this rank's part.
    """

    group: int
    parameter: Tensor
    state: dict[str, Tensor]
    view: MatrixView
    position: int
    theta: Theta
    orthogonalize: bool
    ns_steps: int
    max_grad_norm: float | None

    @property
    def shard(self) -> Tensor:
        return local(self.parameter.detach())

    @property
    def gradient(self) -> Tensor:
        assert self.parameter.grad is not None
        return local(self.parameter.grad)

    @property
    def clips(self) -> bool:
        """Whether the rule's clip of an element can act: it cannot behind a global norm of at most that."""
        return self.max_grad_norm is None


def refusal(job: LearnedJob) -> str | None:
    """Return why the kernels cannot take a parameter, or None when they can."""
    parameter, moment = job.shard, job.state["second_moment"]
    if parameter.dtype not in PARAMETER_DTYPES or job.gradient.dtype not in PARAMETER_DTYPES:
        return f"{parameter.dtype} with a gradient of {job.gradient.dtype}"
    if reason := refused_limit(job.max_grad_norm):
        return reason
    if parameter.ndim < 2:
        return None if parameter.is_contiguous() and moment.is_contiguous() else "a vector with gaps"
    return refused_layout(job.view.matrices(parameter), job.view.matrices(moment))


def refused_limit(max_grad_norm: float | None) -> str | None:
    """Return why the kernels cannot take gradients that are clipped to a norm, or None when they can."""
    limit = float(layout.GRADIENT_CLIP.value)
    if max_grad_norm is None or max_grad_norm <= limit:
        return None
    return f"max_grad_norm={max_grad_norm}, above the rule's own clip of {limit:g}"


def _is_swapped(matrices: Tensor) -> bool:
    """Whether the kernels see [B, m, n] transposed: stored by columns, or a single row with gaps."""
    _, m, n = matrices.shape
    return is_transposed(matrices) or (m == 1 and n > 1 and matrices.stride(-1) != 1)


def refused_layout(p: Tensor, v: Tensor) -> str | None:
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
        _fill(table, first, count, **shared)


class Part(NamedTuple):
    """The matrices of a job, [B, rows, columns] with contiguous columns, or what a rank has of them.

    The rule's axes may be swapped.
    """

    job: LearnedJob
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
        job: LearnedJob,
        matrices: Callable[[Tensor], Tensor] | None = None,
        factors: tuple[Tensor, Tensor] | None = None,
        whole: tuple[int, int] | None = None,
        seeds: NDArray[np.int64] | None = None,
        scratch: Scratch | None = None,
    ) -> Part:
        """See a job as matrices: `matrices` views a tensor like its parameter so, and may raise; default, all of it.

        `factors` are those of its rows and columns, and `whole` the shape of which it has a part.
        """
        state = job.state
        matrices = job.view.matrices if matrices is None else matrices
        p = matrices(job.shard)
        swap = _is_swapped(p)
        m, n = p.shape[1:] if whole is None else whole
        if factors is None:
            row, column = (job.view.factors(state[name], p.shape[0]) for name in ("row_factor", "column_factor"))
        else:
            row, column = factors

        def oriented(tensor: Tensor) -> Tensor:
            return matrices(tensor).mT if swap else matrices(tensor)

        buffer = None
        try:
            if job.view.order(job.gradient) != job.view.order(job.shard):
                raise ValueError("its columns lie in another order")
            g = oriented(job.gradient)
            fits = g.stride(-1) == 1 or g.shape[-1] == 1
        except (ValueError, RuntimeError):
            fits = False
        wide = job.gradient.dtype not in PARAMETER_DTYPES
        if wide or not fits:
            dtype = torch.float32 if wide else job.gradient.dtype
            like = torch.empty_like(state["second_moment"], dtype=dtype, device="meta")
            scratch = Scratch(p.device) if scratch is None else scratch
            # like all state it is dense
            buffer = scratch.take(f"gradient {job.position}", like.numel(), dtype=dtype)
            buffer = buffer.as_strided(like.shape, like.stride())
            g = oriented(buffer)
        return cls(
            job,
            oriented(job.shard),
            g,
            tuple(oriented(state[name]) for name in MOMENTUM_KEYS),
            oriented(state["second_moment"]),
            column if swap else row,
            row if swap else column,
            swap,
            (m <= n) != swap,
            (n, m) if swap else (m, n),
            seeds_of(job.position, p.shape[0]) if seeds is None else seeds,
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
            and all(int(address) % 16 == 0 for tensor in tensors for address in _addresses(tensor))
        )


def _addresses(matrices: Tensor) -> NDArray[np.int64]:
    """Addresses of the matrices of [B, ...]."""
    return matrices.data_ptr() + matrices.element_size() * matrices.stride(0) * np.arange(matrices.shape[0])


def _row_stride(matrices: Tensor) -> int:
    """Elements from row to row; a single row has no next."""
    return matrices.stride(-2) if matrices.shape[-2] > 1 else 0


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the present one: Triton launches there, whatever the tensors' device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _pinned(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return a copy on the host from which a transfer need not wait: the allocator keeps it until it is over."""
    tensor = torch.from_numpy(array.copy())
    return tensor.pin_memory() if device.type == "cuda" and tensor.numel() else tensor


def _send(target: Tensor, array: NDArray[Any], captured: list[Tensor]) -> bool:
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


class _Gradients:
    """Addresses of a batch's gradients on the device, uploaded again when one has moved."""

    def __init__(self, jobs: Sequence[LearnedJob], views: Sequence[Tensor], buffers: Sequence[Tensor | None]) -> None:
        self._jobs, self._buffers = list(jobs), list(buffers)
        # in bytes, from the start of a gradient to each of its matrices
        self._offsets = [
            _addresses(view) - (job.gradient if buffer is None else buffer).data_ptr()
            for job, view, buffer in zip(jobs, views, buffers, strict=True)
        ]
        self._bases: list[int] = []
        self._captured: list[Tensor] = []
        self._addresses = torch.zeros(
            sum(offset.size for offset in self._offsets), dtype=torch.int64, device=jobs[0].parameter.device
        )

    def refresh(self) -> Tensor:
        """Return the addresses, int64 [matrices], always in the same memory: a captured graph reads it."""
        bases = []
        for job, buffer in zip(self._jobs, self._buffers, strict=True):
            gradient = job.gradient
            if buffer is not None:
                gradient = buffer.copy_(gradient)
            bases.append(gradient.data_ptr())
        if bases != self._bases:
            table = np.concatenate([base + offset for base, offset in zip(bases, self._offsets, strict=True)])
            sent = _send(self._addresses, table, self._captured)
            self._bases = bases if sent else []
        return self._addresses


class _Constants(NamedTuple):
    """Theta as constants of the code, and the part that the normalisers' kernel reads from memory."""

    element: tuple[float, ...]
    vector: tuple[float, ...]
    first_bias: tuple[float, ...]
    hidden: tuple[float, ...]
    bias: tuple[float, ...]
    output: tuple[float, ...]
    output_bias: float
    first_layer: NDArray[np.float32]

    @classmethod
    def of(cls, theta: Theta) -> _Constants:
        arrays = theta.arrays
        first = np.concatenate([arrays[f"w0__{group}"] for group in range(14)])

        def flat(array: NDArray[np.float32]) -> tuple[float, ...]:
            return tuple(float(value) for value in array.reshape(-1))

        return cls(
            element=flat(first[list(ELEMENT_ROWS)]),
            vector=flat(first[:15]),
            first_bias=flat(arrays["b0"]),
            hidden=flat(arrays["w1"]),
            bias=flat(arrays["b1"]),
            output=flat(arrays["w2"][:, 0]),
            output_bias=float(arrays["b2"][0]),
            first_layer=np.concatenate([first[list(SHORT_ROWS)], first[list(LONG_ROWS)], arrays["b0"][None]]),
        )


def _fill(table: NDArray[np.int64], first: int, count: int, **values: int | NDArray[np.int64]) -> None:
    """Set named columns of the table in `count` rows from `first` on."""
    for name, value in values.items():
        table[first : first + count, getattr(layout, name).value] = value


def seeds_of(position: int, count: int) -> NDArray[np.int64]:
    """Seeds of 32 bits for the matrices of the parameter at `position` of the optimizer."""
    return np.array([mix64(mix64(position) ^ index) >> 32 for index in range(count)], dtype=np.int64)


class MatrixBatch:
    """Tables and scratch memory of the matrices that one set of launches steps.

    Directions go to `directions`, and sums of squares of the gradients to `totals`, float32 [matrices]. What grows with
    the elements is in `scratch`, under names that begin with `name`.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        blocks: Blocks,
        aligned: bool,
        directions: Tensor,
        totals: Tensor,
        scratch: Scratch,
        name: str,
    ) -> None:
        first, device = parts[0].job, totals.device
        self.orthogonalize, self.ns_steps, self.clips = first.orthogonalize, first.ns_steps, first.clips
        self.blocks, self.aligned, self.totals, self.directions = blocks, aligned, totals, directions
        self.constants = _Constants.of(first.theta)
        self.units = len(self.constants.first_bias)
        # they only name a dtype: no gradient or state is kept alive by them
        self.p_like, self.g_like, self.m_like, self.v_like, self.d_like = (
            torch.empty(16, dtype=dtype, device=device) for dtype in (*parts[0].dtypes, directions.dtype)
        )
        self.gradients = _Gradients(
            [part.job for part in parts], [part.g for part in parts], [part.buffer for part in parts]
        )
        self.matrices = sum(part.p.shape[0] for part in parts)

        table = np.zeros((self.matrices, layout.COLUMNS.value), dtype=np.int64)
        tiles, chunks = [], []
        self.shapes: list[tuple[int, int, int]] = []  # matrices, rows, columns of each run of equal shapes
        matrix = tile = chunk = sums = elements = 0
        for part in parts:
            job, (batch, m, n) = part.job, part.p.shape
            tile_grid = np.stack(
                np.meshgrid(np.arange(0, m, blocks.rows), np.arange(0, n, blocks.columns), indexing="ij"), axis=-1
            ).reshape(-1, 2)
            tile_rows, tile_columns = -(-m // blocks.rows), -(-n // blocks.columns)
            row_chunks, column_chunks = -(-m // blocks.columns), tile_columns
            starts = [*((0, start) for start in range(0, m, blocks.columns))]
            starts += [(1, start) for start in range(0, n, blocks.columns)]
            # an empty part still has its parameter's counter to advance
            starts = starts or [(1, 0)]
            # a matrix's partial sums begin at a multiple of 16
            size_of_sums = -(-(tile_columns * m) // 16) * 16, -(-(tile_rows * n) // 16) * 16
            steps = np.arange(batch)
            directed = elements + steps * m * n if part.directions is None else part.directions
            _fill(
                table,
                matrix,
                batch,
                P=_addresses(part.p),
                V=_addresses(part.v),
                D=directions.data_ptr() + directions.element_size() * directed,
                ROWS=m,
                COLS=n,
                P_STRIDE=_row_stride(part.p),
                G_STRIDE=_row_stride(part.g),
                STATE_STRIDE=_row_stride(part.v),
                ROW_FACTOR=_addresses(part.row_factor),
                COLUMN_FACTOR=_addresses(part.column_factor),
                ROW_SUMS=sums + steps * sum(size_of_sums),
                COLUMN_SUMS=sums + steps * sum(size_of_sums) + size_of_sums[0],
                FIRST_TILE=tile + steps * len(tile_grid),
                TILES=len(tile_grid),
                ROW_CHUNK=chunk + steps * len(starts),
                ROW_CHUNKS=row_chunks,
                COLUMN_CHUNK=chunk + steps * len(starts) + row_chunks,
                COLUMN_CHUNKS=column_chunks,
                ROWS_ARE_SHORT=int(part.rows_are_short),
                GROUP=job.group,
                SEED=part.seeds,
                COUNTER=job.state["step"].data_ptr(),
                COUNTS=((steps == 0) & part.counts).astype(np.int64),
                WHOLE_ROWS=part.whole[0],
                WHOLE_COLS=part.whole[1],
                ROW_PARTS=tile_columns,
                COLUMN_PARTS=tile_rows,
            )
            if "momentum_scale" in job.state:
                _fill(table, matrix, batch, MOMENTUM_SCALE=_addresses(job.state["momentum_scale"]))
            for k, momentum in enumerate(part.momenta):
                table[matrix : matrix + batch, layout.MOMENTUM.value + k] = _addresses(momentum)
            for index in range(matrix, matrix + batch):
                tiles.append(np.insert(tile_grid, 0, index, axis=1))
                chunks.append(np.insert(np.array(starts), 0, index, axis=1))
            if self.shapes and self.shapes[-1][1:] == (m, n):
                self.shapes[-1] = (self.shapes[-1][0] + batch, m, n)
            else:
                self.shapes.append((batch, m, n))
            matrix, elements = matrix + batch, elements + batch * m * n
            tile, chunk, sums = (
                tile + batch * len(tile_grid),
                chunk + batch * len(starts),
                sums + batch * sum(size_of_sums),
            )
        self.tiles, self.chunks = tile, chunk

        # of tiles and chunks
        self.sums = scratch.take(f"{name} sums", sums)
        self.tile_totals, self.clipped_tile_totals, self.squares = scratch.take(f"{name} tiles", 3, padded(tile))
        self.vectors = scratch.take(f"{name} vectors", chunk, layout.UNIT.value + self.units, blocks.columns)
        self.chunk_sums = scratch.take(f"{name} chunks", chunk, layout.CHUNK_STRIDE.value)
        self.moments = scratch.take(f"{name} moments", tile, layout.ELEMENT_STRIDE.value)

        def small(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        # of matrices
        self.clipped_totals, self.means = small(matrix), small(matrix, 4)
        self.matrix_moments, self.normalisers = (small(matrix, layout.ELEMENT_STRIDE.value) for _ in range(2))
        self.matrix_squares, self.starts = small(matrix), small(matrix)

        self._place_sums(table, parts)
        self.table = upload(table, device)
        self.tile_list = upload(np.concatenate(tiles).astype(np.int32), device)
        self.chunk_list = upload(np.concatenate(chunks).astype(np.int32), device)
        self.first_layer = upload(self.constants.first_layer, device)

    def _place_sums(self, table: NDArray[np.int64], parts: Sequence[Part]) -> None:
        """Enter where the sums over whole matrices are: in this batch's memory, or in the ranks' messages."""

        def column(name: str) -> NDArray[np.int64]:
            return table[:, getattr(layout, name).value]

        def address(tensor: Tensor, index: NDArray[np.int64], size: int = 1) -> NDArray[np.int64]:
            return tensor.data_ptr() + 4 * size * index

        index, stride = np.arange(self.matrices), layout.ELEMENT_STRIDE.value
        columns, sums = layout.ELEMENT_COLUMNS.value, layout.CHUNK_SUMS.value
        assert columns + 2 * sums <= stride
        _fill(
            table,
            0,
            self.matrices,
            ROW_TOTALS=address(self.sums, column("ROW_SUMS")),
            COLUMN_TOTALS=address(self.sums, column("COLUMN_SUMS")),
            SQUARES=address(self.clipped_totals if self.clips else self.totals, index),
            SQUARE_PARTS=1,
            ROWS_GIVE_MEAN=column("ROWS_ARE_SHORT"),
            ELEMENT_MOMENTS=address(self.matrix_moments, index, stride),
            ROW_MOMENTS=address(self.matrix_moments, index, stride) + 4 * columns,
            COLUMN_MOMENTS=address(self.matrix_moments, index, stride) + 4 * (columns + sums),
            DIRECTION_SQUARES=address(self.matrix_squares, index),
        )
        first = 0
        for part in parts:
            count = part.p.shape[0]
            if part.sums is not None:
                part.sums.fill(table, first, count, part.whole[1 if part.sums.cut == layout.CUT_ROWS.value else 0])
            first += count

    @property
    def shape(self) -> dict[str, Any]:
        return {"ALIGNED": self.aligned, "BLOCK_COLUMNS": self.blocks.columns}

    def gradient_moments(self, unscale: Tensor) -> None:
        """Phase 1."""
        self._addresses = self.gradients.refresh()
        launch(gradient_moments_kernel, (self.tiles,),
            self.table, self._addresses, self.tile_list, unscale, self.sums, self.tile_totals, self.clipped_tile_totals,
            self.g_like, CLIP=self.clips, BLOCK_ROWS=self.blocks.rows, **self.shape, num_warps=self.blocks.warps,
        )  # fmt: skip
        launch(sum_gradients_kernel, (self.matrices,),
            self.table, self.tile_totals, self.clipped_tile_totals, self.totals, self.clipped_totals, self.means,
            CLIP=self.clips, BLOCK=self.blocks.sums,
        )  # fmt: skip

    def feature_moments(self, control: Tensor) -> None:
        """New factors, and phase 2, once `control` [1 + groups, 2] has the gradients' factors."""
        blocks = self.blocks
        launch(factors_kernel, (self.chunks,),
            self.table, self.chunk_list, control, self.means, self.vectors, self.chunk_sums,
            UNITS=self.units, PARTS=blocks.parts, **self.shape,
        )  # fmt: skip
        launch(feature_moments_kernel, (self.tiles,),
            self.table, self._addresses, self.tile_list, control, self.vectors, self.moments,
            self.p_like, self.g_like, self.m_like, self.v_like, UNITS=self.units, CLIP=self.clips,
            BLOCK_ROWS=blocks.rows, STEP_ROWS=blocks.step_rows, **self.shape, num_warps=blocks.warps,
        )  # fmt: skip
        launch(sum_moments_kernel, (self.matrices, MOMENT_PROGRAMS.value),
            self.table, control, self.moments, self.chunk_sums, BLOCK=blocks.sums // 8,
        )  # fmt: skip

    def learned_update(self, control: Tensor) -> None:
        """Normalisers, and phase 3."""
        blocks, constants = self.blocks, self.constants
        launch(normalisers_kernel, (self.chunks,),
            self.table, self.chunk_list, control, self.first_layer, self.vectors, self.normalisers,
            UNITS=self.units, **self.shape,
        )  # fmt: skip
        launch(learned_update_kernel, (self.tiles,),
            self.table, self._addresses, self.tile_list, control, self.vectors, self.normalisers, self.squares,
            self.p_like, self.g_like, self.m_like, self.v_like, self.d_like,
            ELEMENT=constants.element, HIDDEN=constants.hidden, BIAS=constants.bias, OUTPUT=constants.output,
            OUTPUT_BIAS=constants.output_bias, UNITS=self.units, CLIP=self.clips, BLOCK_ROWS=blocks.rows,
            STEP_ROWS=blocks.step_rows, **self.shape, num_warps=blocks.warps, maxnreg=128,
        )  # fmt: skip

    def sum_directions(self, control: Tensor) -> None:
        """Each matrix's sum of squares of the direction, and what Newton-Schulz starts from."""
        launch(sum_directions_kernel, (self.matrices,),
            self.table, control, self.squares, self.starts, EPS=EPS, BLOCK=self.blocks.sums,
        )  # fmt: skip

    def apply(self, control: Tensor, rates: Tensor) -> None:
        """Phase 4."""
        blocks = self.blocks
        launch(apply_update_kernel, (self.tiles,),
            self.table, self.tile_list, control, rates, self.p_like, self.d_like, BLOCK_ROWS=blocks.rows,
            STEP_ROWS=blocks.apply_rows, **self.shape, num_warps=blocks.warps,
        )  # fmt: skip

    def update(self, control: Tensor, rates: Tensor) -> None:
        """Phases 2 to 4 of whole matrices, whose directions lie one after another."""
        self.feature_moments(control)
        self.learned_update(control)
        self.sum_directions(control)
        if self.orthogonalize:
            self._orthogonalize()
        self.apply(control, rates)

    def rehearse(self, control: Tensor, rates: Tensor) -> None:
        """Launch every kernel of a step of whole matrices once, in no order that would make sense."""
        self.gradient_moments(control)
        self.feature_moments(control)
        self.learned_update(control)
        self.sum_directions(control)
        self.apply(control, rates)
        if self.orthogonalize:
            element = 0
            for batch, m, n in self.shapes:
                rehearse_products(self.directions[element : element + batch * m * n].view(batch, m, n))
                element += batch * m * n

    def _orthogonalize(self) -> None:
        """Replace the directions by their orthogonalised form, and note each matrix's sum of squares."""
        matrix = element = 0
        for batch, m, n in self.shapes:
            d = self.directions[element : element + batch * m * n].view(batch, m, n)
            here = slice(matrix, matrix + batch)
            orthogonalize_(d, self.starts[here], self.ns_steps, self.matrix_squares[here])
            matrix, element = matrix + batch, element + batch * m * n


def batches_of(parts: Sequence[Part], device: torch.device) -> list[tuple[Blocks, bool, list[Part]]]:
    """Group parts that one set of launches can step; with each its blocks, and whether accesses may be 16 bytes wide.

    Narrow matrices (heads of 64 columns) have batches of their own, so that the others keep wide tiles.
    """
    batches: dict[tuple[Any, ...], list[Part]] = {}
    for part in parts:
        job = part.job
        blocks = Blocks.choose(part.p.shape[-1] if part.aligned(NARROWEST) else WIDEST, device)
        options = job.theta, job.orthogonalize, job.ns_steps, job.clips
        key = (*part.dtypes, *options, blocks, part.aligned(blocks.columns))
        batches.setdefault(key, []).append(part)
    # equal shapes side by side, so that Newton-Schulz takes them as one batch
    return [(*key[-2:], sorted(batch, key=lambda part: part.p.shape[1:])) for key, batch in batches.items()]


def totals_of(batches: Sequence[tuple[Blocks, bool, list[Part]]], device: torch.device) -> list[Tensor]:
    """Return memory for the matrices' sums of g^2, one after another: a float32 [matrices] for each batch, then all."""
    counts = [sum(part.p.shape[0] for part in parts) for _, _, parts in batches]
    # at multiples of 16 bytes, or kernels would be compiled for another alignment; what lies between stays zero
    starts = np.cumsum([0, *(-(-count // 4) * 4 for count in counts)]).tolist()
    totals = torch.zeros(starts[-1], dtype=torch.float32, device=device)
    return [*(totals[start : start + count] for start, count in zip(starts, counts, strict=False)), totals]


class VectorBatch:
    """Table and scratch memory of the parameters with fewer than two axes.

    `moments` and `squares` are the addresses where the ranks add up the 15 sums and the one of a sharded vector.
    """

    def __init__(
        self,
        jobs: Sequence[LearnedJob],
        seeds: NDArray[np.int64] | None = None,
        moments: NDArray[np.int64] | int = 0,
        squares: NDArray[np.int64] | int = 0,
    ) -> None:
        device = jobs[0].parameter.device
        self.vectors = len(jobs)
        self.constants = _Constants.of(jobs[0].theta)
        self.p_like, self.g_like, self.state_like, _ = (
            torch.empty(16, dtype=dtype, device=device) for dtype in _dtypes(jobs[0])
        )
        buffers = [
            None
            if job.gradient.is_contiguous() and job.gradient.dtype in PARAMETER_DTYPES
            else torch.empty(job.gradient.shape, dtype=_dtypes(job)[1], device=device)
            for job in jobs
        ]
        sources = [job.gradient if buffer is None else buffer for job, buffer in zip(jobs, buffers, strict=True)]
        self.gradients = _Gradients(jobs, [source.reshape(1, -1) for source in sources], buffers)
        lengths = np.array([job.shard.numel() for job in jobs])
        self.direction = torch.empty(int(lengths.sum()), dtype=torch.float32, device=device)
        table = np.zeros((len(jobs), layout.COLUMNS.value), dtype=np.int64)
        _fill(
            table,
            0,
            len(jobs),
            P=np.array([job.shard.data_ptr() for job in jobs]),
            V=np.array([job.state["second_moment"].data_ptr() for job in jobs]),
            D=self.direction.data_ptr() + 4 * (np.cumsum(lengths) - lengths),
            ROWS=1,
            COLS=lengths,
            WHOLE_COLS=np.array([job.parameter.numel() for job in jobs]),
            ROW_FACTOR=np.array([job.state["factor"].data_ptr() for job in jobs]),
            GROUP=np.array([job.group for job in jobs]),
            SEED=np.concatenate([seeds_of(job.position, 1) for job in jobs]) if seeds is None else seeds,
            COUNTER=np.array([job.state["step"].data_ptr() for job in jobs]),
            ELEMENT_MOMENTS=moments,
            DIRECTION_SQUARES=squares,
        )
        for k, name in enumerate(MOMENTUM_KEYS):
            table[:, layout.MOMENTUM.value + k] = [job.state[name].data_ptr() for job in jobs]
        self.table = upload(table, device)

    def update(self, control: Tensor, rates: Tensor, first: int = 0, stop: int = 3) -> None:
        """Take the passes from `first` up to but not including `stop`: sums, accumulators and direction, parameter."""
        constants = self.constants
        if first == 0:
            self._addresses = self.gradients.refresh()
        launch(vector_update_kernel, (self.vectors,),
            self.table, self._addresses, control, rates, self.p_like, self.g_like, self.state_like,
            ELEMENT=constants.vector, FIRST_BIAS=constants.first_bias, HIDDEN=constants.hidden, BIAS=constants.bias,
            OUTPUT=constants.output, OUTPUT_BIAS=constants.output_bias, BLOCK=VECTOR_BLOCK, FIRST=first,
            STOP=stop,
        )  # fmt: skip


class KernelStep:
    """All parameters of one device that the kernels step, and what they share: control, rates and counters.

    `run` updates them and leaves on the device `grad_norm` (float32, before clipping), `skip` (float32, 1 when the
    step was skipped), `skipped` (int64 [1], how often that was) and `control`, whose row 1 + i has what the gradients
    of group i are multiplied by. Directions that Newton-Schulz takes are kept in `ns_dtype`.

    Other steps of the same parameters may share `skipped` and `scratch`; `most` says how many elements all directions
    of a dtype could have.
    """

    def __init__(
        self,
        jobs: Sequence[LearnedJob],
        groups: int,
        device: torch.device,
        ns_dtype: torch.dtype,
        skipped: Tensor | None = None,
        scratch: Scratch | None = None,
        most: Mapping[torch.dtype, int] | None = None,
    ) -> None:
        self.device = device
        self.scratch = Scratch(device) if scratch is None else scratch
        self.parameters = [job.parameter for job in jobs]
        parts = [Part.of(job, scratch=self.scratch) for job in jobs if job.parameter.ndim > 1]
        batches = batches_of(parts, device)
        *totals, self.totals = totals_of(batches, device)
        sizes = [
            (sum(part.p.numel() for part in batch), ns_dtype if batch[0].job.orthogonalize else torch.float32)
            for _, _, batch in batches
        ]
        directions = self.scratch.take_all("directions", sizes, most or {})
        self.batches = [
            MatrixBatch(batch, blocks, aligned, direction, total, self.scratch, f"batch {index}")
            for index, ((blocks, aligned, batch), direction, total) in enumerate(
                zip(batches, directions, totals, strict=True)
            )
        ]
        self.vectors = [VectorBatch(batch) for batch in vector_batches(jobs)]
        self.vector_jobs = [job for batch in vector_batches(jobs) for job in batch]

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.groups = groups
        self.control = zeros(1 + groups, layout.CONTROL.value)
        # on the device, and as last sent there
        self.rates, self.limits = zeros(groups, layout.RATES.value), zeros(groups)
        self._rates: NDArray[np.float32] | None = None
        self._limits: NDArray[np.float32] | None = None
        self._captured: list[Tensor] = []
        self.grad_norm = zeros()
        self.skip = zeros()
        self.skipped = zeros(1, dtype=torch.int64) if skipped is None else skipped
        self.one, self.zero = torch.ones(1, dtype=torch.float32, device=device), zeros(1)

    def _set(self, groups: Sequence[dict[str, Any]]) -> None:
        """Bring learning rates, decays and limits to the device where they have changed."""
        rates = np.zeros((self.groups, layout.RATES.value), np.float32)
        for index, group in enumerate(groups):
            lr = group["lr"]
            # a rate on the device is copied there, below
            rates[index] = (math.nan if _on_device(lr) else float(lr)), group["weight_decay"]
        limits = np.array(
            [math.inf if group["max_grad_norm"] is None else group["max_grad_norm"] for group in groups], np.float32
        )
        if self._rates is None or not np.array_equal(rates, self._rates, equal_nan=True):
            self._rates = rates if _send(self.rates, rates, self._captured) else None
        if self._limits is None or not np.array_equal(limits, self._limits):
            self._limits = limits if _send(self.limits, limits, self._captured) else None
        for index, group in enumerate(groups):
            if _on_device(group["lr"]):
                self.rates[index, 0].copy_(group["lr"], non_blocking=True)

    def run(
        self,
        groups: Sequence[dict[str, Any]],
        others: Sequence[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Step; `others` are the gradients that are not the kernels' own, part of the global norm."""
        with on(self.device):
            self._run(groups, others, grad_scale, found_inf)
        # autograd must not take what it saved for unchanged
        torch.autograd.graph.increment_version(self.parameters)

    def _run(
        self,
        groups: Sequence[dict[str, Any]],
        others: Sequence[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        self._set(groups)
        unscale, found = self._scalers(grad_scale, found_inf)
        norms = norms_of([*others, *(job.gradient for job in self.vector_jobs)], self.zero)
        for batch in self.batches:
            batch.gradient_moments(unscale)
        self._decide(norms, unscale, found)
        self._update()

    def _scalers(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what gradients are multiplied by, and whether the step must be skipped, float32 [1] on the device."""
        unscale = self.one if grad_scale is None else grad_scale.to(self.device, torch.float32).reshape(1).reciprocal()
        found = self.zero if found_inf is None else found_inf.to(self.device, torch.float32).reshape(1)
        return unscale, found

    def _decide(
        self,
        norms: Tensor,
        unscale: Tensor,
        found: Tensor,
        message: Tensor | None = None,
        members: int = 0,
        ranks: int = 1,
    ) -> None:
        """Global norm, clipping and skipping; `message` has what the ranks have added up."""
        launch(control_kernel, (1,),
            self.totals, self.totals.numel(), norms, norms.numel(), unscale, found, self.limits, self.groups,
            self.control, self.grad_norm, self.skip, self.skipped, self.zero if message is None else message, members,
            ranks, SHARDED=message is not None, BLOCK=CONTROL_BLOCK,
        )  # fmt: skip

    def compile(self) -> None:
        """Compile the kernels of a step, several at once; what this leaves out is compiled when it is launched."""
        if can_rehearse(learned_update_kernel):
            with on(self.device), rehearsal():
                self._rehearse()

    def _rehearse(self) -> None:
        """Launch every kernel of a step."""
        for batch in self.batches:
            batch.rehearse(self.control, self.rates)
        self._decide(self.zero, self.one, self.zero)
        for vectors in self.vectors:
            vectors.update(self.control, self.rates)

    def _update(self) -> None:
        """All that follows the decision."""
        for batch in self.batches:
            batch.update(self.control, self.rates)
        for vectors in self.vectors:
            vectors.update(self.control, self.rates)


def norms_of(gradients: Sequence[Tensor], nothing: Tensor) -> Tensor:
    """Return the norms of some gradients, float32 [gradients]; `nothing` when there are none."""
    return torch.stack(foreach_norm(gradients)).float() if gradients else nothing


def vector_batches(jobs: Sequence[LearnedJob]) -> list[list[LearnedJob]]:
    """Group the jobs with fewer than two axes that one launch can step."""
    batches: dict[tuple[Any, ...], list[LearnedJob]] = {}
    for job in jobs:
        if job.parameter.ndim < 2:
            batches.setdefault((*_dtypes(job), job.theta), []).append(job)
    return list(batches.values())


def round_on_device(job: AdamWJob, wide: Tensor) -> None:
    """Round a value of the AdamW side into its parameter, by its step counter on the device."""
    if job.parameter.dtype != torch.bfloat16:
        job.parameter.copy_(wide)
    elif job.parameter.stride() != wide.stride():
        round_on_host(job, wide)
    else:
        size = wide.numel()
        # the same 32 bits, but always an int32 to the compiler
        seed = int(seeds_of(job.position, 1).astype(np.uint32).view(np.int32)[0])
        with on(wide.device):
            launch(round_kernel, (-(-size // 1024),), job.parameter, wide, job.state["step"], seed, size, BLOCK=1024)
        torch.autograd.graph.increment_version(job.parameter)


def _dtypes(job: LearnedJob) -> tuple[torch.dtype, ...]:
    accumulators = job.state[MOMENTUM_KEYS[0]].dtype, job.state["second_moment"].dtype
    gradient = job.gradient.dtype
    return job.parameter.dtype, gradient if gradient in PARAMETER_DTYPES else torch.float32, *accumulators


def _on_device(lr: float | Tensor) -> bool:
    return isinstance(lr, Tensor) and lr.device.type != "cpu"
