"""The step of sharded parameters through the Triton kernels: the launches of `celo2.kernel_step` on local shards.

`celo2.sharded_step` says where every part of every message lies. The tables of the kernels have those addresses: what a
rank adds to a sum over a whole matrix is written into the message by one small launch for all matrices, an all-reduce
adds it up, and the next kernel reads it there. Phase 3 writes directions into the all-to-all's message itself. Between
the first launch and the last nothing waits for the device: clipping, the decision to skip a step and whether ranks
agree on gradients are in its memory, and what the host has to know of them is copied there and read in the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from celo2.batched_newton_schulz import orthogonalize_, rehearse_products
from celo2.blocks import CONTROL_BLOCK, Blocks
from celo2.compilation import launch
from celo2.kernel_step import (
    PARAMETER_DTYPES,
    KernelStep,
    LearnedJob,
    MatrixBatch,
    Part,
    Sums,
    VectorBatch,
    batches_of,
    norms_of,
    on,
    refused_layout,
    totals_of,
    upload,
    vector_batches,
)
from celo2.kernels import layout, sharing
from celo2.matrices import MatrixView
from celo2.newton_schulz import EPS
from celo2.scratch import Scratch
from celo2.sharded_step import HEADER, Member, ShardedJob, ShardedStep, padded
from celo2.sharding import Layout
from celo2.state import local
from celo2.stochastic_rounding import mix64

assert layout.FLAGS.value == HEADER


def refused_shard(job: ShardedJob, ranks: int, rank: int) -> str | None:
    """Return why the kernels cannot take this rank's shard of a parameter, or None when they can."""
    p, v = local(job.parameter.detach()), local(job.state["second_moment"])
    if p.dtype not in PARAMETER_DTYPES:
        return str(p.dtype)
    if devices := {value.device for value in job.state.values()} - {p.device}:
        return f"state on {devices}, the parameter on {p.device}"
    if p.ndim < 2:
        return None if p.is_contiguous() and v.is_contiguous() else "a vector with gaps"
    cut = Layout.of(job.parameter.shape, job.view, job.placing.axis, job.name)
    pairs = zip(cut.views(p, ranks, rank), cut.views(v, ranks, rank), strict=True)
    return next((reason for pair in pairs if (reason := refused_layout(*pair)) is not None), None)


class _ShardBatch(MatrixBatch):
    """A batch of parts of matrices, with what their ranks tell each other."""

    def rehearse(self, control: Tensor, rates: Tensor) -> None:
        self.gradient_moments(control)
        self.share_gradient_sums()
        self.feature_moments(control)
        self.learned_update(control)
        if not self.orthogonalize:
            self.sum_directions(control)
        self.apply(control, rates)

    def share_gradient_sums(self) -> None:
        launch(sharing.share_gradient_sums_kernel, (self.chunks,),
            self.table, self.chunk_list, self.sums, BLOCK_ROWS=self.blocks.rows, PARTS=self.blocks.parts, **self.shape,
        )  # fmt: skip


class _Owner:
    """Newton-Schulz on the matrices that this rank owns: from the message that brings them into one that returns them.

    Directions are orthogonalised in `ns_dtype`, as without sharding.
    """

    def __init__(self, plan: ShardedStep, ns_dtype: torch.dtype, scratch: Scratch) -> None:
        device = plan.device
        self.blocks = (512, 512) if device.type == "cpu" else (16, 128)
        places: dict[tuple[int, int], tuple[int, int, int, int]] = {}  # number, first element, rows, columns
        groups: list[tuple[int, int, int, int, int, int]] = []
        number = element = 0
        for (m, n, ns_steps), matrices in plan.owned.items():
            groups.append((element, number, len(matrices), m, n, ns_steps))
            for key in matrices:
                places[key] = number, element, m, n
                number, element = number + 1, element + m * n
            element = padded(element)
        self.matrices = scratch.take("owned", element, dtype=ns_dtype)
        self.squares = torch.empty(number, dtype=torch.float32, device=device)
        self.groups = [
            (
                self.matrices[start : start + count * m * n].view(count, m, n),
                self.squares[first : first + count],
                ns_steps,
            )
            for start, first, count, m, n, ns_steps in groups
        ]
        parts = np.zeros((len(plan.receives), sharing.PART_COLUMNS.value), dtype=np.int64)
        tiles = []
        for index, move in enumerate(plan.receives):
            number, element, m, n = places[move.member, move.matrix]
            piece = move.piece
            target = element + piece.row * n + piece.column
            parts[index] = move.offset, target, piece.rows, piece.columns, n, number, m * n
            tiles += [
                (index, row, column)
                for row in range(0, piece.rows, self.blocks[0])
                for column in range(0, piece.columns, self.blocks[1])
            ]
        self.aligned = not (parts[:, [0, 1, 3, 4]] % 16).any()
        self.tiles = len(tiles)
        self.parts = upload(parts, device)
        self.tile_list = upload(np.array(tiles, dtype=np.int32).reshape(-1, 3), device)

    def _move(self, message: Tensor, back: bool) -> None:
        launch(sharing.move_parts_kernel, (self.tiles,),
            self.parts, self.tile_list, message, self.matrices, self.squares, BACK=back, ALIGNED=self.aligned,
            BLOCK_ROWS=self.blocks[0], BLOCK_COLUMNS=self.blocks[1],
        )  # fmt: skip

    def rehearse(self, message: Tensor) -> None:
        for back in (False, True):
            self._move(message, back)
        for x, _, _ in self.groups:
            rehearse_products(x)

    def orthogonalize(self, message: Tensor) -> None:
        """Replace the parts of directions in a message by those of updates, of an RMS of 1 over each matrix."""
        if not self.tiles:
            return
        self._move(message, back=False)
        for x, squares, ns_steps in self.groups:
            # row by row: one float32 sum over all elements loses digits
            norm = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32), dim=-1)
            orthogonalize_(x, norm.add_(EPS).reciprocal_(), ns_steps, squares)
        self._move(message, back=True)


class ShardedKernelStep(KernelStep):
    """All parameters of one device that the kernels step, some of them sharded over the ranks of `plan`.

    `jobs` are the parameters that every rank has whole; the plan has the sharded ones, and those with a gradient are
    stepped. Making one is not collective: addresses may change on one rank alone. `run_sharded` is.
    """

    def __init__(
        self,
        plan: ShardedStep,
        jobs: Sequence[LearnedJob],
        groups: Sequence[dict[str, Any]],
        ns_dtype: torch.dtype,
        skipped: Tensor | None = None,
        scratch: Scratch | None = None,
        most: Mapping[torch.dtype, int] | None = None,
    ) -> None:
        device = self.device = plan.device
        super().__init__(jobs, len(groups), device, ns_dtype, skipped, scratch, most)
        self.plan = plan
        # one memory, so that one launch clears all messages
        starts = np.cumsum([0, *(-(-length // 64) * 64 for length in plan.lengths)]).tolist()
        self.messages = self.scratch.take("messages", starts[-1]).zero_()
        self.first, self.second, self.third = (
            self.messages[start : start + length] for start, length in zip(starts, plan.lengths, strict=False)
        )
        active = {
            index: _learned_job(member.job, groups)
            for index, member in enumerate(plan.members)
            if member.job.parameter.grad is not None
        }
        self.flags = upload(np.array([index in active for index in range(len(plan.members))], np.float32), device)
        self.parameters += [job.parameter for job in active.values()]

        # phase 3 writes into the message, and directions of transposed storage behind it
        self._sent_size = sum(plan.send_counts)
        size, behind_it = self._sent_size, []
        parts: list[Part] = []
        for index, job in active.items():
            for number, part in self._parts(index, job) if job.parameter.ndim > 1 else ():
                if job.orthogonalize and number is not None:
                    moves = sorted(plan.sends_of[index, number], key=lambda move: move.matrix)
                    offsets = [move.offset for move in moves]
                    for b, move in enumerate(moves) if part.swapped and min(part.p.shape[1:]) > 1 else ():
                        behind_it.append((move, size))
                        offsets[b], size = size, size + padded(move.piece.rows * move.piece.columns)
                    part = part._replace(directions=np.array(offsets, dtype=np.int64))
                parts.append(part)
        # every rank sends all parts; those without gradients come back to nobody
        self.sent = self.scratch.take("sent", size, dtype=plan.wire).zero_()
        self.received = self.scratch.take("received", sum(plan.receive_counts), dtype=plan.wire).zero_()
        self.transposed = []
        for move, offset in behind_it:
            rows, columns = move.piece.rows, move.piece.columns
            there, behind = (self.sent[start : start + rows * columns] for start in (move.offset, offset))
            self.transposed.append((there.view(rows, columns), behind.view(columns, rows).mT))

        batches = batches_of(parts, device)
        *totals, self.shard_totals = totals_of(batches, device)
        sizes = [
            # those for Newton-Schulz go into the message
            (0 if batch[0].job.orthogonalize else sum(part.p.numel() for part in batch), torch.float32)
            for _, _, batch in batches
        ]
        directions = self.scratch.take_all("shards' directions", sizes, {})
        self.shards = [
            self._shard_batch(index, *batch, *memory)
            for index, (batch, *memory) in enumerate(zip(batches, directions, totals, strict=True))
        ]
        self.shard_vectors = list(self._vector_batches(active))
        self.shard_vector_jobs = [job for job in active.values() if job.parameter.ndim < 2]
        self.owner = _Owner(plan, ns_dtype, self.scratch)
        # the same on every rank, with gradients or without
        self.shares_squares = bool(self.third.numel()) and not all(member.job.orthogonalize for member in plan.members)

    # where everything lies

    def _parts(self, index: int, job: LearnedJob) -> Iterator[tuple[int | None, Part]]:
        """Yield what this rank has of the matrices of a member of the plan, each with the number of its piece.

        Of matrices that are on other ranks alone it has a factor, when that is whole on every rank, and the counter of
        the parameter advances also where the shard is empty: parts without rows.
        """
        plan, member = self.plan, self.plan.members[index]
        cut, ranks, rank = member.layout, self.plan.ranks, self.plan.rank
        assert cut is not None
        batch, m, n = cut.matrices
        row_factors, column_factors = (
            cut.factor_views(job.state[name], cut.kind != whole, ranks, rank)
            for name, whole in (("row_factor", "columns"), ("column_factor", "rows"))
        )
        counts = True
        for number, piece in enumerate(member.pieces):
            matrices = np.arange(piece.matrix, piece.matrix + piece.count)
            part = Part.of(
                job,
                partial(_piece_of, cut, ranks, rank, number),
                (row_factors[number], column_factors[number]),
                (m, n),
                _seeds(job.position, plan.rank, matrices),
                self.scratch,
            )
            sums = None if cut.kind == "whole" else self._sums(member, matrices, (cut.kind == "rows") != part.swapped)
            yield number, part._replace(counts=counts, sums=sums)
            counts = False
        if cut.kind == "whole" or not batch * m * n:
            if counts:
                yield None, _without_rows(job, job.shard.new_empty(1, 0, 3), (m, n), swapped=False)
            return
        name = "column_factor" if cut.kind == "rows" else "row_factor"
        factor = MatrixView.factors(job.state[name], batch)
        here = [b for piece in member.pieces for b in range(piece.matrix, piece.matrix + piece.count)]
        for first, stop in ((0, min(here, default=batch)), (max(here, default=batch - 1) + 1, batch)):
            if first < stop:
                part = _without_rows(job, factor[first:stop], (m, n), swapped=cut.kind != "rows")
                yield None, part._replace(counts=counts, sums=self._sums(member, np.arange(first, stop), True))
                counts = False

    def _sums(self, member: Member, matrices: NDArray[np.int64], cuts_rows: bool) -> Sums:
        """Addresses in the messages of some matrices of a member; `cuts_rows` is about the rows of a part."""
        assert member.layout is not None
        _, m, n = member.layout.matrices
        length = n if member.layout.kind == "rows" else m
        return Sums(
            (layout.CUT_ROWS if cuts_rows else layout.CUT_COLS).value,
            self.first.data_ptr() + 4 * (member.sums + length * matrices),
            self.second.data_ptr() + 4 * (member.moments + 24 * matrices),
            None if member.job.orthogonalize else self.third.data_ptr() + 4 * (member.squares + matrices),
        )

    def _shard_batch(
        self, index: int, blocks: Blocks, aligned: bool, parts: Sequence[Part], directions: Tensor, totals: Tensor
    ) -> _ShardBatch:
        orthogonal = parts[0].job.orthogonalize
        directions = self.sent if orthogonal else directions
        batch = _ShardBatch(parts, blocks, aligned, directions, totals, self.scratch, f"shards {index}")
        if orthogonal:
            # what comes back from the owners has an RMS of 1
            sizes = [np.full(part.p.shape[0], part.whole[0] * part.whole[1], np.float32) for part in parts]
            batch.matrix_squares.copy_(upload(np.concatenate(sizes), self.device))
        return batch

    def _vector_batches(self, active: dict[int, LearnedJob]) -> Iterator[VectorBatch]:
        members = {job.position: self.plan.members[index] for index, job in active.items()}
        for batch in vector_batches(list(active.values())):
            moments, squares = (
                message.data_ptr() + 4 * np.array([getattr(members[job.position], name) for job in batch])
                for message, name in ((self.second, "moments"), (self.third, "squares"))
            )
            seeds = [_seeds(job.position, self.plan.rank, np.zeros(1, dtype=np.int64)) for job in batch]
            yield VectorBatch(batch, np.concatenate(seeds), moments, squares)

    # the step

    def run_sharded(
        self,
        groups: Sequence[dict[str, Any]],
        others: Sequence[Tensor],
        sharded: Sequence[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        meanwhile: Callable[[], None],
    ) -> None:
        """Step, with all ranks; `meanwhile()` steps more while directions are on their way, by `control` and `skip`.

        `others` are the gradients that are not the kernels' own and that every rank has whole, `sharded` the shards of
        such: part of the global norm. Raises RuntimeError on a CPU when ranks disagree on which gradients there are; on
        a GPU `ShardedStep.check_flags` does.
        """
        with on(self.device):
            self._run_sharded(groups, others, sharded, grad_scale, found_inf, meanwhile)
        torch.autograd.graph.increment_version(self.parameters)
        if self.device.type == "cpu":
            self.plan.check_flags()

    def _share_norm(self, norms: Tensor, shard_norms: Tensor, unscale: Tensor, found: Tensor) -> None:
        """Write the head of the first message."""
        launch(sharing.share_norm_kernel, (1,),
            self.shard_totals, self.shard_totals.numel(), shard_norms, shard_norms.numel(), self.totals,
            self.totals.numel(), norms, norms.numel(), unscale, found, self.flags, len(self.plan.members), self.first,
            BLOCK=CONTROL_BLOCK,
        )  # fmt: skip

    def _rehearse(self) -> None:
        for batch in self.batches:
            batch.rehearse(self.control, self.rates)
        for vectors in self.vectors:
            vectors.update(self.control, self.rates)
        for shards in self.shards:
            shards.rehearse(self.control, self.rates)
        for vectors in self.shard_vectors:
            for first in range(3):
                vectors.update(self.control, self.rates, first, first + 1)
        self._share_norm(self.zero, self.zero, self.one, self.zero)
        self._decide(self.zero, self.one, self.zero, self.first, len(self.plan.members), self.plan.ranks)
        self.owner.rehearse(self.received)

    def _run_sharded(
        self,
        groups: Sequence[dict[str, Any]],
        others: Sequence[Tensor],
        sharded: Sequence[Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        meanwhile: Callable[[], None],
    ) -> None:
        plan, control = self.plan, self.control
        self._set(groups)
        unscale, found = self._scalers(grad_scale, found_inf)
        self.messages.zero_()
        norms = norms_of([*others, *(job.gradient for job in self.vector_jobs)], self.zero)
        shards = [*sharded, *(job.gradient for job in self.shard_vector_jobs)]
        shard_norms = norms_of([gradient for gradient in shards if gradient.numel()], self.zero)
        for whole in self.batches:
            whole.gradient_moments(unscale)
        for batch in self.shards:
            batch.gradient_moments(unscale)
            batch.share_gradient_sums()
        members = len(plan.members)
        self._share_norm(norms, shard_norms, unscale, found)
        dist.all_reduce(self.first, group=plan.group)
        plan.note_flags(self.first[HEADER : HEADER + members])
        self._decide(norms, unscale, self.zero, self.first, members, plan.ranks)

        for batch in self.shards:
            batch.feature_moments(control)
        for vectors in self.shard_vectors:
            vectors.update(control, self.rates, 0, 1)
        if self.second.numel():
            dist.all_reduce(self.second, group=plan.group)

        for batch in self.shards:
            batch.learned_update(control)
            if not batch.orthogonalize:
                batch.sum_directions(control)
        for vectors in self.shard_vectors:
            vectors.update(control, self.rates, 1, 2)
        if self.shares_squares:
            dist.all_reduce(self.third, group=plan.group)
        sent = self.sent[: self._sent_size]
        work = None
        if plan.owner:
            for there, behind in self.transposed:
                there.copy_(behind)
            work = plan.exchange(self.received, sent, plan.receive_counts, plan.send_counts)

        self._update()
        for batch in self.shards:
            if not batch.orthogonalize:
                batch.apply(control, self.rates)
        for vectors in self.shard_vectors:
            vectors.update(control, self.rates, 2, 3)
        meanwhile()

        if work is not None:
            work.wait()
            self.owner.orthogonalize(self.received)
            plan.exchange(sent, self.received, plan.send_counts, plan.receive_counts).wait()
            for there, behind in self.transposed:
                behind.copy_(there)
            for batch in self.shards:
                if batch.orthogonalize:
                    batch.apply(control, self.rates)


def _piece_of(cut: Layout, ranks: int, rank: int, number: int, shard: Tensor) -> Tensor:
    """View the matrices of a piece, [B, rows, columns], in this rank's shard."""
    return cut.views(shard, ranks, rank)[number]


def _learned_job(job: ShardedJob, groups: Sequence[dict[str, Any]]) -> LearnedJob:
    return LearnedJob(
        job.group,
        job.parameter,
        {key: local(value) for key, value in job.state.items()},
        job.view,
        job.position,
        job.theta,
        job.orthogonalize,
        job.ns_steps,
        groups[job.group]["max_grad_norm"],
    )


def _seeds(position: int, rank: int, matrices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Seeds of 32 bits: replicas of a shard round alike, different shards do not."""
    shard = mix64(position) ^ mix64(-1 - rank)
    return np.array([mix64(shard ^ int(matrix)) >> 32 for matrix in matrices], dtype=np.int64)


def _without_rows(job: LearnedJob, factor: Tensor, shape: tuple[int, int], *, swapped: bool) -> Part:
    """Return matrices [B, 0, length] of which this rank has nothing but a factor of the columns, [B, length, 3]."""
    count, length = factor.shape[:2]
    p = job.shard.new_empty(count, 0, length)
    moment = p.to(job.state["second_moment"].dtype)
    gradient = job.gradient.dtype if job.gradient.dtype in PARAMETER_DTYPES else torch.float32
    m, n = shape
    return Part(
        job,
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
