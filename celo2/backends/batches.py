"""Tables and scratch memory of what one set of launches steps: batches of matrices, and of vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celo2.backends.parts import PARAMETER_DTYPES, Part, addresses, fill, row_stride, seeds_of, send, upload
from celo2.batched_newton_schulz import orthogonalize_, rehearse_products
from celo2.blocks import NARROWEST, VECTOR_BLOCK, WIDEST, Blocks
from celo2.compilation import launch
from celo2.folded import KernelTheta, direction_scale
from celo2.kernels import layout, sharing
from celo2.kernels.apply_update import apply_update_kernel
from celo2.kernels.feature_moments import feature_moments_kernel, normalisers_kernel
from celo2.kernels.gradient_moments import factors_kernel, gradient_moments_kernel
from celo2.kernels.learned_update import learned_update_kernel
from celo2.kernels.reductions import MOMENT_PROGRAMS, sum_directions_kernel, sum_gradients_kernel, sum_moments_kernel
from celo2.kernels.vector_update import vector_update_kernel
from celo2.newton_schulz import EPS
from celo2.plan import Slot
from celo2.scratch import Scratch, padded
from celo2.state import MOMENTUM_KEYS


class _Gradients:
    """Addresses of a batch's gradients on the device, uploaded again when one has moved."""

    def __init__(self, slots: Sequence[Slot], views: Sequence[Tensor], buffers: Sequence[Tensor | None]) -> None:
        self._slots, self._buffers = list(slots), list(buffers)
        # in bytes, from the start of a gradient to each of its matrices
        self._offsets = [
            addresses(view) - (slot.gradient if buffer is None else buffer).data_ptr()
            for slot, view, buffer in zip(slots, views, buffers, strict=True)
        ]
        self._bases: list[int] = []
        self._captured: list[Tensor] = []
        self._addresses = torch.zeros(
            sum(offset.size for offset in self._offsets), dtype=torch.int64, device=slots[0].parameter.device
        )

    def refresh(self) -> Tensor:
        """Return the addresses, int64 [matrices], always in the same memory: a captured graph reads it."""
        bases = []
        for slot, buffer in zip(self._slots, self._buffers, strict=True):
            gradient = slot.gradient if buffer is None else buffer.copy_(slot.gradient)
            bases.append(gradient.data_ptr())
        if bases != self._bases:
            table = np.concatenate([base + offset for base, offset in zip(bases, self._offsets, strict=True)])
            sent = send(self._addresses, table, self._captured)
            self._bases = bases if sent else []
        return self._addresses


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
        first, device = parts[0].slot, totals.device
        self.orthogonalize, self.ns_steps, self.clips = first.orthogonalize, first.ns_steps, first.clips
        self.blocks, self.aligned, self.totals, self.directions = blocks, aligned, totals, directions
        scale = direction_scale(first.theta) if first.orthogonalize else 1.0
        self.constants = KernelTheta.of(first.theta, scale)
        self.units = len(self.constants.first_bias)
        # they only name a dtype: no gradient or state is kept alive by them
        self.p_like, self.g_like, self.m_like, self.v_like, self.d_like = (
            torch.empty(16, dtype=dtype, device=device) for dtype in (*parts[0].dtypes, directions.dtype)
        )
        self.gradients = _Gradients(
            [part.slot for part in parts], [part.g for part in parts], [part.buffer for part in parts]
        )
        self.matrices = sum(part.p.shape[0] for part in parts)

        table = np.zeros((self.matrices, layout.COLUMNS.value), dtype=np.int64)
        tiles, chunks = [], []
        self.shapes: list[tuple[int, int, int]] = []  # matrices, rows, columns of each run of equal shapes
        matrix = tile = chunk = sums = elements = 0
        for part in parts:
            slot, (batch, m, n) = part.slot, part.p.shape
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
            fill(
                table,
                matrix,
                batch,
                P=addresses(part.p),
                V=addresses(part.v),
                D=directions.data_ptr() + directions.element_size() * directed,
                ROWS=m,
                COLS=n,
                P_STRIDE=row_stride(part.p),
                G_STRIDE=row_stride(part.g),
                STATE_STRIDE=row_stride(part.v),
                ROW_FACTOR=addresses(part.row_factor),
                COLUMN_FACTOR=addresses(part.column_factor),
                ROW_SUMS=sums + steps * sum(size_of_sums),
                COLUMN_SUMS=sums + steps * sum(size_of_sums) + size_of_sums[0],
                FIRST_TILE=tile + steps * len(tile_grid),
                TILES=len(tile_grid),
                ROW_CHUNK=chunk + steps * len(starts),
                ROW_CHUNKS=row_chunks,
                COLUMN_CHUNK=chunk + steps * len(starts) + row_chunks,
                COLUMN_CHUNKS=column_chunks,
                ROWS_ARE_SHORT=int(part.rows_are_short),
                GROUP=slot.group,
                SEED=part.seeds,
                COUNTER=slot.state["step"].data_ptr(),
                COUNTS=((steps == 0) & part.counts).astype(np.int64),
                WHOLE_ROWS=part.whole[0],
                WHOLE_COLS=part.whole[1],
                ROW_PARTS=tile_columns,
                COLUMN_PARTS=tile_rows,
            )
            if part.scale is not None:
                fill(table, matrix, batch, MOMENTUM_SCALE=addresses(part.scale))
            for k, momentum in enumerate(part.momenta):
                table[matrix : matrix + batch, layout.MOMENTUM.value + k] = addresses(momentum)
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
        fill(
            table,
            0,
            self.matrices,
            ROW_TOTALS=address(self.sums, column("ROW_SUMS")),
            COLUMN_TOTALS=address(self.sums, column("COLUMN_SUMS")),
            SQUARES=address(self.clipped_totals if self.clips else self.totals, index),
            SQUARE_PARTS=1,
            MEAN_FACTOR=np.where(column("ROWS_ARE_SHORT"), column("ROW_FACTOR"), column("COLUMN_FACTOR")),
            MEAN_LENGTH=np.where(column("ROWS_ARE_SHORT"), column("WHOLE_ROWS"), column("WHOLE_COLS")),
            ELEMENT_MOMENTS=address(self.matrix_moments, index, stride),
            ROW_MOMENTS=address(self.matrix_moments, index, stride) + 4 * columns,
            COLUMN_MOMENTS=address(self.matrix_moments, index, stride) + 4 * (columns + sums),
            DIRECTION_SQUARES=address(self.matrix_squares, index),
        )
        first = 0
        for part in parts:
            count = part.p.shape[0]
            if part.sums is not None:
                part.sums.fill(table, first, count)
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

    def share_gradient_sums(self) -> None:
        """Add the sums along the cut axis to the message of gradients."""
        launch(sharing.share_gradient_sums_kernel, (self.chunks,),
            self.table, self.chunk_list, self.sums, BLOCK_ROWS=self.blocks.rows, PARTS=self.blocks.parts, **self.shape,
        )  # fmt: skip

    def update(self, control: Tensor, rates: Tensor) -> None:
        """Phases 2 to 4 of whole matrices, whose directions lie one after another."""
        self.feature_moments(control)
        self.learned_update(control)
        self.sum_directions(control)
        if self.orthogonalize:
            self._orthogonalize()
        self.apply(control, rates)

    def rehearse(self, control: Tensor, rates: Tensor, *, shared: bool) -> None:
        """Launch every kernel of a step once, in no order that would make sense; `shared`: with the ranks' sums."""
        self.gradient_moments(control)
        if shared:
            self.share_gradient_sums()
        self.feature_moments(control)
        self.learned_update(control)
        if not (shared and self.orthogonalize):
            self.sum_directions(control)
        self.apply(control, rates)
        if self.orthogonalize and not shared:
            for d, here in self._directions():
                rehearse_products(d, self.ns_steps, self.matrix_squares[here])

    def _directions(self) -> Iterator[tuple[Tensor, slice]]:
        """Iterate over the directions [B, m, n] of equal shapes, with the numbers of their matrices."""
        matrix = element = 0
        for batch, m, n in self.shapes:
            d = self.directions[element : element + batch * m * n].view(batch, m, n)
            yield d, slice(matrix, matrix + batch)
            matrix, element = matrix + batch, element + batch * m * n

    def _orthogonalize(self) -> None:
        """Replace the directions by their orthogonalised form, and note each matrix's sum of squares."""
        for d, here in self._directions():
            orthogonalize_(d, self.starts[here], self.ns_steps, self.matrix_squares[here])


def batches_of(parts: Sequence[Part], device: torch.device) -> list[tuple[Blocks, bool, list[Part]]]:
    """Group parts that one set of launches can step; with each its blocks, and whether accesses may be 16 bytes wide.

    Narrow matrices (heads of 64 columns) have batches of their own, so that the others keep wide tiles.
    """
    batches: dict[tuple[Any, ...], list[Part]] = {}
    for part in parts:
        slot = part.slot
        blocks = Blocks.choose(part.p.shape[-1] if part.aligned(NARROWEST) else WIDEST, device)
        options = slot.theta, slot.orthogonalize, slot.ns_steps, slot.clips
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
        slots: Sequence[Slot],
        seeds: NDArray[np.int64] | None = None,
        moments: NDArray[np.int64] | int = 0,
        squares: NDArray[np.int64] | int = 0,
    ) -> None:
        device = slots[0].parameter.device
        self.vectors = len(slots)
        self.constants = KernelTheta.of(slots[0].theta)
        self.p_like, self.g_like, self.state_like, _ = (
            torch.empty(16, dtype=dtype, device=device) for dtype in _dtypes(slots[0])
        )
        buffers = [
            None
            if slot.gradient.is_contiguous() and slot.gradient.dtype in PARAMETER_DTYPES
            else torch.empty(slot.gradient.shape, dtype=_dtypes(slot)[1], device=device)
            for slot in slots
        ]
        sources = [slot.gradient if buffer is None else buffer for slot, buffer in zip(slots, buffers, strict=True)]
        self.gradients = _Gradients(slots, [source.reshape(1, -1) for source in sources], buffers)
        lengths = np.array([slot.shard.numel() for slot in slots])
        self.direction = torch.empty(int(lengths.sum()), dtype=torch.float32, device=device)
        table = np.zeros((len(slots), layout.COLUMNS.value), dtype=np.int64)
        fill(
            table,
            0,
            len(slots),
            P=np.array([slot.shard.data_ptr() for slot in slots]),
            V=np.array([slot.state["second_moment"].data_ptr() for slot in slots]),
            D=self.direction.data_ptr() + 4 * (np.cumsum(lengths) - lengths),
            ROWS=1,
            COLS=lengths,
            WHOLE_COLS=np.array([slot.parameter.numel() for slot in slots]),
            ROW_FACTOR=np.array([slot.state["factor"].data_ptr() for slot in slots]),
            GROUP=np.array([slot.group for slot in slots]),
            SEED=np.concatenate([seeds_of(slot.position, 1) for slot in slots]) if seeds is None else seeds,
            COUNTER=np.array([slot.state["step"].data_ptr() for slot in slots]),
            ELEMENT_MOMENTS=moments,
            DIRECTION_SQUARES=squares,
        )
        for k, name in enumerate(MOMENTUM_KEYS):
            table[:, layout.MOMENTUM.value + k] = [slot.state[name].data_ptr() for slot in slots]
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


def vector_batches(slots: Sequence[Slot]) -> list[list[Slot]]:
    """Group the slots with fewer than two axes that one launch can step."""
    batches: dict[tuple[Any, ...], list[Slot]] = {}
    for slot in slots:
        if slot.parameter.ndim < 2:
            batches.setdefault((*_dtypes(slot), slot.theta), []).append(slot)
    return list(batches.values())


def _dtypes(slot: Slot) -> tuple[torch.dtype, ...]:
    accumulators = slot.state[MOMENTUM_KEYS[0]].dtype, slot.state["second_moment"].dtype
    gradient = slot.gradient.dtype
    return slot.parameter.dtype, gradient if gradient in PARAMETER_DTYPES else torch.float32, *accumulators
