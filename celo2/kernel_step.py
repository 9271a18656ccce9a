"""The step through the Triton kernels: what they need in memory, made once, and the order of their launches.

Parameters that share dtypes, theta and options form a batch, and a batch is stepped by seven launches whatever its
number of matrices: gradient moments, (once for all batches) control, factors, feature moments, normalisers, learned
update, and after Newton-Schulz the new parameters. Nothing waits for the device: the global norm, clipping and the
decision to skip a step stay there. Addresses of gradients are refreshed when they move; all else is rebuilt when a
parameter, its state or its layout changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from celo2.adamw import AdamWJob, round_on_host
from celo2.kernels import layout
from celo2.kernels.apply_update import apply_update_kernel
from celo2.kernels.feature_moments import feature_moments_kernel, normalisers_kernel
from celo2.kernels.gradient_moments import control_kernel, factors_kernel, gradient_moments_kernel
from celo2.kernels.learned_update import learned_update_kernel
from celo2.kernels.newton_schulz import start_kernel, symmetric_product_kernel
from celo2.kernels.rounding import round_kernel
from celo2.kernels.vector_update import vector_update_kernel
from celo2.matrices import MatrixView
from celo2.newton_schulz import COEFFICIENTS, EPS, iterate
from celo2.norms import foreach_norm
from celo2.phases import ELEMENT_ROWS, LONG_ROWS, SHORT_ROWS
from celo2.state import MOMENTUM_KEYS, is_transposed
from celo2.stochastic_rounding import mix64
from celo2.theta import Theta

PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Blocks:
    """Sizes of a program's work: a tile of `rows` x `columns`, of which a kernel takes `step_rows` at a time.

    Vectors are cut in chunks of `columns`, so `rows` divides it.
    """

    rows: int = 64
    columns: int = 128
    step_rows: int = 4
    apply_rows: int = 16
    parts: int = 16
    vector: int = 256
    control: int = 1024

    @classmethod
    def choose(cls, columns: int, device: torch.device) -> Blocks:
        """Blocks for a batch whose narrowest matrix has that many columns."""
        if device.type == "cpu":
            # the interpreter's time is in calls, not in elements
            width = min(512, max(64, 1 << (columns.bit_length() - 1)))
            return cls(rows=width, columns=width, step_rows=width, apply_rows=width)
        # 512 elements a step: four a thread
        width = 128 if columns >= 128 else 64
        return cls(columns=width, step_rows=512 // width)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: `TRITON_INTERPRET=1` when they were imported."""
    return not isinstance(learned_update_kernel, triton.JITFunction)


class LearnedJob(NamedTuple):
    """One parameter of the learned rule, and the options of its group that its kernels depend on."""

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
    def gradient(self) -> Tensor:
        assert self.parameter.grad is not None
        return self.parameter.grad

    @property
    def clips(self) -> bool:
        """Whether the rule's clip of an element can act: it cannot behind a global norm of at most that."""
        return self.max_grad_norm is None


def refusal(job: LearnedJob) -> str | None:
    """Return why the kernels cannot take a parameter, or None when they can."""
    parameter, moment = job.parameter, job.state["second_moment"]
    limit = float(layout.GRADIENT_CLIP.value)
    if parameter.dtype not in PARAMETER_DTYPES or job.gradient.dtype not in PARAMETER_DTYPES:
        return f"{parameter.dtype} with a gradient of {job.gradient.dtype}"
    if job.max_grad_norm is not None and job.max_grad_norm > limit:
        return f"max_grad_norm={job.max_grad_norm}, above the rule's own clip of {limit:g}"
    if parameter.ndim < 2:
        return None if parameter.is_contiguous() and moment.is_contiguous() else "a vector with gaps"
    p, v = job.view.matrices(parameter.detach()), job.view.matrices(moment)
    if is_transposed(p) != is_transposed(v):
        return "a parameter and a state that are transposed to each other"
    for tensor in (p, v):
        oriented = tensor.mT if is_transposed(tensor) else tensor
        if oriented.stride(-1) != 1 and oriented.shape[-1] != 1:
            return f"strides {tuple(parameter.stride())}: contiguous along no axis of its matrices"
        if oriented.stride(-2) >= 1 << 24 and oriented.shape[-2] > 1:
            return "rows of more than 16 million elements"
    return None


class _Oriented(NamedTuple):
    """The matrices of a job, [B, rows, columns] with contiguous columns; the rule's axes may be swapped."""

    p: Tensor
    g: Tensor
    momenta: tuple[Tensor, ...]
    v: Tensor
    row_factor: Tensor  # [B, rows, 3]
    column_factor: Tensor  # [B, columns, 3]
    rows_are_short: bool
    buffer: Tensor | None  # where the gradient is copied to when its own layout does not fit

    @classmethod
    def of(cls, job: LearnedJob) -> _Oriented:
        state, view = job.state, job.view
        p = view.matrices(job.parameter.detach())
        swap = is_transposed(p)

        def oriented(tensor: Tensor) -> Tensor:
            matrices = view.matrices(tensor)
            return matrices.mT if swap else matrices

        buffer = None
        try:
            g = oriented(job.gradient)
            fits = g.stride(-1) == 1 or g.shape[-1] == 1
        except ValueError:
            fits = False
        if not fits:
            buffer = torch.empty_like(state["second_moment"], dtype=job.gradient.dtype)
            g = oriented(buffer)
        factors = [view.factors(state[name], p.shape[0]) for name in ("row_factor", "column_factor")]
        return cls(
            oriented(job.parameter.detach()),
            g,
            tuple(oriented(state[name]) for name in MOMENTUM_KEYS),
            oriented(state["second_moment"]),
            factors[1] if swap else factors[0],
            factors[0] if swap else factors[1],
            (p.shape[1] <= p.shape[2]) != swap,
            buffer,
        )

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
    return tensor.pin_memory() if device.type == "cuda" else tensor


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


def _upload(array: NDArray[Any], device: torch.device) -> Tensor:
    return _pinned(array, device).to(device, non_blocking=True)


class _Gradients:
    """Addresses of a batch's gradients on the device, uploaded again when one has moved."""

    def __init__(self, jobs: list[LearnedJob], views: Sequence[Tensor], buffers: Sequence[Tensor | None]) -> None:
        self._parameters = [job.parameter for job in jobs]
        self._buffers = list(buffers)
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
        for parameter, buffer in zip(self._parameters, self._buffers, strict=True):
            assert parameter.grad is not None
            if buffer is not None:
                buffer.copy_(parameter.grad)
            bases.append((parameter.grad if buffer is None else buffer).data_ptr())
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


def _seeds(position: int, count: int) -> NDArray[np.int64]:
    """Seeds of 32 bits for the matrices of the parameter at `position` of the optimizer."""
    return np.array([mix64(mix64(position) ^ index) >> 32 for index in range(count)], dtype=np.int64)


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    table: Tensor,
    *arguments: Any,
    maxnreg: int | None = None,
    num_warps: int = 4,
    **constants: Any,
) -> None:
    """Launch a kernel whose first argument is a tensor, with the options of its device's compiler."""
    options = {}
    if table.device.type != "cpu":
        # AMD's waves are twice as wide, and the limit on registers is NVIDIA's
        options["num_warps"] = num_warps // 2 if torch.version.hip else num_warps
        if maxnreg is not None and not torch.version.hip:
            options["maxnreg"] = maxnreg
    kernel[grid](table, *arguments, **constants, **options)


class _MatrixBatch:
    """Tables and scratch memory of the matrices that one set of launches steps."""

    def __init__(self, jobs: list[LearnedJob], blocks: Blocks, aligned: bool, direction_dtype: torch.dtype) -> None:
        # equal shapes side by side, so that Newton-Schulz takes them as one batch
        pairs = sorted(((job, _Oriented.of(job)) for job in jobs), key=lambda pair: pair[1].p.shape[1:])
        jobs, views = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        first, device = jobs[0], jobs[0].parameter.device
        self.orthogonalize, self.ns_steps, self.clips = first.orthogonalize, first.ns_steps, first.clips
        self.device, self.blocks, self.aligned = device, blocks, aligned
        self.constants = _Constants.of(first.theta)
        self.units = len(self.constants.first_bias)
        # they only name a dtype: no gradient or state is kept alive by them
        self.p_like, self.g_like, self.m_like, self.v_like = (
            torch.empty(16, dtype=dtype, device=device) for dtype in _dtypes(first)
        )
        self.gradients = _Gradients(jobs, [view.g for view in views], [view.buffer for view in views])
        self.matrices = sum(view.p.shape[0] for view in views)
        self.direction = torch.empty(sum(view.p.numel() for view in views), dtype=direction_dtype, device=device)

        table = np.zeros((self.matrices, layout.COLUMNS.value), dtype=np.int64)
        tiles, chunks = [], []
        self.shapes: list[tuple[int, int, int]] = []  # matrices, rows, columns of each run of equal shapes
        matrix = tile = chunk = sums = elements = 0
        for job, view in zip(jobs, views, strict=True):
            batch, m, n = view.p.shape
            tile_grid = np.stack(
                np.meshgrid(np.arange(0, m, blocks.rows), np.arange(0, n, blocks.columns), indexing="ij"), axis=-1
            ).reshape(-1, 2)
            tile_rows, tile_columns = -(-m // blocks.rows), -(-n // blocks.columns)
            row_chunks, column_chunks = -(-m // blocks.columns), tile_columns
            starts = [*((0, start) for start in range(0, m, blocks.columns))]
            starts += [(1, start) for start in range(0, n, blocks.columns)]
            # a matrix's partial sums begin at a multiple of 16
            size_of_sums = -(-(tile_columns * m) // 16) * 16, -(-(tile_rows * n) // 16) * 16
            steps = np.arange(batch)
            _fill(
                table,
                matrix,
                batch,
                P=_addresses(view.p),
                V=_addresses(view.v),
                D=self.direction.data_ptr() + self.direction.element_size() * (elements + steps * m * n),
                ROWS=m,
                COLS=n,
                P_STRIDE=_row_stride(view.p),
                G_STRIDE=_row_stride(view.g),
                STATE_STRIDE=_row_stride(view.v),
                ROW_FACTOR=_addresses(view.row_factor),
                COLUMN_FACTOR=_addresses(view.column_factor),
                ROW_SUMS=sums + steps * sum(size_of_sums),
                COLUMN_SUMS=sums + steps * sum(size_of_sums) + size_of_sums[0],
                FIRST_TILE=tile + steps * len(tile_grid),
                TILES=len(tile_grid),
                ROW_CHUNK=chunk + steps * len(starts),
                ROW_CHUNKS=row_chunks,
                COLUMN_CHUNK=chunk + steps * len(starts) + row_chunks,
                COLUMN_CHUNKS=column_chunks,
                ROWS_ARE_SHORT=int(view.rows_are_short),
                GROUP=job.group,
                SEED=_seeds(job.position, batch),
                COUNTER=job.state["step"].data_ptr(),
                COUNTS=(steps == 0).astype(np.int64),
            )
            if "momentum_scale" in job.state:
                _fill(table, matrix, batch, MOMENTUM_SCALE=_addresses(job.state["momentum_scale"]))
            for k, momentum in enumerate(view.momenta):
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
        self.table = _upload(table, device)
        self.tile_list = _upload(np.concatenate(tiles).astype(np.int32), device)
        self.chunk_list = _upload(np.concatenate(chunks).astype(np.int32), device)
        self.first_layer = _upload(self.constants.first_layer, device)

        def scratch(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        self.sums = scratch(sums)
        self.clipped_totals = scratch(tile)
        self.vectors = scratch(chunk, layout.UNIT.value + self.units, blocks.columns)
        self.chunk_sums = scratch(chunk, layout.CHUNK_SUMS.value)
        self.moments = scratch(tile, layout.ELEMENT_STRIDE.value)
        self.normalisers = scratch(matrix, layout.ELEMENT_STRIDE.value)
        self.squares = scratch(tile)
        self.matrix_squares = scratch(matrix)
        self.starts = scratch(matrix)

    def gradient_moments(self, unscale: Tensor, totals: Tensor) -> None:
        """Phase 1; `totals` [tiles] is this batch's part of the sums of squares of all gradients."""
        self._addresses = self.gradients.refresh()
        _launch(gradient_moments_kernel, (self.tiles,),
            self.table, self._addresses, self.tile_list, unscale, self.sums, totals, self.clipped_totals,
            self.g_like, CLIP=self.clips, ALIGNED=self.aligned, BLOCK_ROWS=self.blocks.rows,
            BLOCK_COLUMNS=self.blocks.columns,
        )  # fmt: skip

    def update(self, control: Tensor, rates: Tensor, totals: Tensor) -> None:
        """Phases 2 to 4, once `control` [1 + groups, 2] has the gradients' factors."""
        blocks, gradients = self.blocks, self._addresses
        shape = {"ALIGNED": self.aligned, "BLOCK_COLUMNS": blocks.columns}
        _launch(factors_kernel, (self.chunks,),
            self.table, self.chunk_list, control, self.sums, self.clipped_totals if self.clips else totals,
            self.vectors, self.chunk_sums, UNITS=self.units, BLOCK_ROWS=blocks.rows, PARTS=blocks.parts, **shape,
        )  # fmt: skip
        _launch(feature_moments_kernel, (self.tiles,),
            self.table, gradients, self.tile_list, control, self.vectors, self.moments,
            self.p_like, self.g_like, self.m_like, self.v_like, UNITS=self.units, CLIP=self.clips,
            BLOCK_ROWS=blocks.rows, STEP_ROWS=blocks.step_rows, **shape,
        )  # fmt: skip
        _launch(normalisers_kernel, (self.chunks,),
            self.table, self.chunk_list, control, self.chunk_sums, self.moments, self.first_layer, self.vectors,
            self.normalisers, UNITS=self.units, PARTS=blocks.parts, **shape,
        )  # fmt: skip
        constants = self.constants
        _launch(learned_update_kernel, (self.tiles,),
            self.table, gradients, self.tile_list, control, self.vectors, self.normalisers, self.squares,
            self.p_like, self.g_like, self.m_like, self.v_like, self.direction,
            ELEMENT=constants.element, HIDDEN=constants.hidden, BIAS=constants.bias, OUTPUT=constants.output,
            OUTPUT_BIAS=constants.output_bias, UNITS=self.units, CLIP=self.clips, BLOCK_ROWS=blocks.rows,
            STEP_ROWS=blocks.step_rows, **shape, maxnreg=128,
        )  # fmt: skip
        if self.orthogonalize:
            self._orthogonalize()
        _launch(apply_update_kernel, (self.tiles,),
            self.table, self.tile_list, control, self.matrix_squares if self.orthogonalize else self.squares, rates,
            self.p_like, self.direction, ORTHOGONAL=self.orthogonalize, BLOCK_ROWS=blocks.rows,
            STEP_ROWS=blocks.apply_rows, **shape,
        )  # fmt: skip

    def _orthogonalize(self) -> None:
        """Replace the directions by their orthogonalised form, and note each matrix's sum of squares."""
        _launch(start_kernel, (self.matrices,), self.table, self.squares, self.starts, EPS=EPS)
        matrix = element = 0
        for batch, m, n in self.shapes:
            d = self.direction[element : element + batch * m * n].view(batch, m, n)
            x = d * self.starts[matrix : matrix + batch, None, None].to(d.dtype)
            d.copy_(orthogonalize(x, self.ns_steps))
            norm = torch.linalg.vector_norm(d, dim=-1, dtype=torch.float32).square()
            torch.sum(norm, dim=-1, out=self.matrix_squares[matrix : matrix + batch])
            matrix, element = matrix + batch, element + batch * m * n


# the shorter side from which half of a symmetric product is worth a kernel of our own
SYMMETRIC_FROM = 512


def orthogonalize(x: Tensor, steps: int, symmetric_from: int = SYMMETRIC_FROM, block: int = 128) -> Tensor:
    """Newton-Schulz on `x` [B, m, n], of a norm of at most 1 each, in its dtype; small ones and CPUs by PyTorch."""
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.mT, steps, symmetric_from, block).mT
    if x.shape[-2] < symmetric_from or (x.device.type == "cpu" and symmetric_from == SYMMETRIC_FROM):
        return iterate(x, steps)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = symmetric_product(x, block=block)
        x = torch.baddbmm(x, symmetric_product(gram, alpha=c, add=gram, beta=b, block=block), x, beta=a)
    return x


def symmetric_product(
    x: Tensor, *, alpha: float = 1.0, add: Tensor | None = None, beta: float = 0.0, block: int = 128
) -> Tensor:
    """Return alpha X X^T + beta add, [B, m, m], for X [B, m, n] and a symmetric `add` [B, m, m]."""
    batch, size, inner = x.shape
    out = x.new_empty(batch, size, size)
    tiles = -(-size // block)
    _launch(symmetric_product_kernel, (tiles * (tiles + 1) // 2, batch),
        x, x if add is None else add, out, size, inner, *x.stride(), ALPHA=alpha, BETA=beta, PRECISION="ieee",
        BLOCK=block, BLOCK_INNER=32 if x.element_size() == 4 else 64, num_warps=8,
    )  # fmt: skip
    return out


class _VectorBatch:
    """Table and scratch memory of the parameters with fewer than two axes."""

    def __init__(self, jobs: list[LearnedJob], blocks: Blocks) -> None:
        device = jobs[0].parameter.device
        self.blocks, self.vectors = blocks, len(jobs)
        self.constants = _Constants.of(jobs[0].theta)
        self.p_like, self.g_like, self.state_like, _ = (
            torch.empty(16, dtype=dtype, device=device) for dtype in _dtypes(jobs[0])
        )
        buffers = [
            None
            if job.gradient.is_contiguous()
            else torch.empty(job.gradient.shape, dtype=job.gradient.dtype, device=device)
            for job in jobs
        ]
        sources = [job.gradient if buffer is None else buffer for job, buffer in zip(jobs, buffers, strict=True)]
        self.gradients = _Gradients(jobs, [source.reshape(1, -1) for source in sources], buffers)
        self.direction = torch.empty(sum(job.parameter.numel() for job in jobs), dtype=torch.float32, device=device)
        table = np.zeros((len(jobs), layout.COLUMNS.value), dtype=np.int64)
        element = 0
        for index, job in enumerate(jobs):
            _fill(
                table,
                index,
                1,
                P=job.parameter.data_ptr(),
                V=job.state["second_moment"].data_ptr(),
                D=self.direction.data_ptr() + 4 * element,
                ROWS=1,
                COLS=job.parameter.numel(),
                ROW_FACTOR=job.state["factor"].data_ptr(),
                GROUP=job.group,
                SEED=_seeds(job.position, 1),
                COUNTER=job.state["step"].data_ptr(),
            )
            for k, name in enumerate(MOMENTUM_KEYS):
                table[index, layout.MOMENTUM.value + k] = job.state[name].data_ptr()
            element += job.parameter.numel()
        self.table = _upload(table, device)

    def update(self, control: Tensor, rates: Tensor) -> None:
        constants = self.constants
        _launch(vector_update_kernel, (self.vectors,),
            self.table, self.gradients.refresh(), control, rates, self.p_like, self.g_like, self.state_like,
            ELEMENT=constants.vector, FIRST_BIAS=constants.first_bias, HIDDEN=constants.hidden, BIAS=constants.bias,
            OUTPUT=constants.output, OUTPUT_BIAS=constants.output_bias, BLOCK=self.blocks.vector,
        )  # fmt: skip


class KernelStep:
    """All parameters of one device that the kernels step, and what they share: control, rates and counters.

    `run` updates them and leaves on the device `grad_norm` (float32, before clipping), `skip` (float32, 1 when the
    step was skipped), `skipped` (int64 [1], how often that was) and `control`, whose row 1 + i has what the gradients
    of group i are multiplied by.
    """

    def __init__(self, jobs: list[LearnedJob], groups: int, skipped: Tensor | None = None) -> None:
        device = self.device = jobs[0].parameter.device
        self.parameters = [job.parameter for job in jobs]
        matrices = [job for job in jobs if job.parameter.ndim > 1]
        views = [_Oriented.of(job) for job in matrices]
        # narrow heads take narrow tiles, and all matrices then share them: fewer launches
        wide = [view.p.shape[-1] for view in views if view.aligned(64)]
        self.blocks = Blocks.choose(min(wide, default=128), device)
        batches: dict[tuple[Any, ...], list[LearnedJob]] = {}
        for job, view in zip(matrices, views, strict=True):
            key = (
                *_dtypes(job),
                job.theta,
                job.orthogonalize,
                job.ns_steps,
                job.clips,
                view.aligned(self.blocks.columns),
            )
            batches.setdefault(key, []).append(job)
        low = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.batches = [
            _MatrixBatch(batch, self.blocks, key[-1], low if batch[0].orthogonalize else torch.float32)
            for key, batch in batches.items()
        ]
        vectors: dict[tuple[Any, ...], list[LearnedJob]] = {}
        for job in jobs:
            if job.parameter.ndim < 2:
                vectors.setdefault((*_dtypes(job), job.theta), []).append(job)
        self.vectors = [_VectorBatch(batch, self.blocks) for batch in vectors.values()]
        self.vector_jobs = [job for batch in vectors.values() for job in batch]
        self.totals = torch.zeros(sum(batch.tiles for batch in self.batches), dtype=torch.float32, device=device)

        def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.groups = groups
        self.control = scratch(1 + groups, layout.CONTROL.value)
        # on the device, and as last sent there
        self.rates, self.limits = scratch(groups, layout.RATES.value), scratch(groups)
        self._rates: NDArray[np.float32] | None = None
        self._limits: NDArray[np.float32] | None = None
        self._captured: list[Tensor] = []
        self.grad_norm = scratch()
        self.skip = scratch()
        self.skipped = scratch(1, dtype=torch.int64) if skipped is None else skipped
        self.one, self.zero = torch.ones(1, dtype=torch.float32, device=device), scratch(1)

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
        unscale = self.one if grad_scale is None else grad_scale.to(self.device, torch.float32).reshape(1).reciprocal()
        found = self.zero if found_inf is None else found_inf.to(self.device, torch.float32).reshape(1)
        gradients = [*others, *(job.gradient for job in self.vector_jobs)]
        norms = torch.stack(foreach_norm(gradients)).float() if gradients else self.zero
        first, parts = 0, []
        for batch in self.batches:
            parts.append(self.totals[first : first + batch.tiles])
            batch.gradient_moments(unscale, parts[-1])
            first += batch.tiles
        _launch(control_kernel, (1,),
            self.totals, first, norms, norms.numel(), unscale, found, self.limits, self.groups, self.control,
            self.grad_norm, self.skip, self.skipped, BLOCK=self.blocks.control,
        )  # fmt: skip
        for batch, totals in zip(self.batches, parts, strict=True):
            batch.update(self.control, self.rates, totals)
        for vectors in self.vectors:
            vectors.update(self.control, self.rates)


def round_on_device(job: AdamWJob, wide: Tensor) -> None:
    """Round a value of the AdamW side into its parameter, by its step counter on the device."""
    if job.parameter.dtype != torch.bfloat16:
        job.parameter.copy_(wide)
    elif job.parameter.stride() != wide.stride():
        round_on_host(job, wide)
    else:
        size = wide.numel()
        seed = int(_seeds(job.position, 1)[0])
        with on(wide.device):
            _launch(round_kernel, (-(-size // 1024),), job.parameter, wide, job.state["step"], seed, size, BLOCK=1024)
        torch.autograd.graph.increment_version(job.parameter)


def _dtypes(job: LearnedJob) -> tuple[torch.dtype, ...]:
    accumulators = job.state[MOMENTUM_KEYS[0]].dtype, job.state["second_moment"].dtype
    return job.parameter.dtype, job.gradient.dtype, *accumulators


def _on_device(lr: float | Tensor) -> bool:
    return isinstance(lr, Tensor) and lr.device.type != "cpu"
