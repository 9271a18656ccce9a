"""The step of sharded parameters: statistics over whole matrices from local shards, by a few flat collectives.

1. One all-reduce carries the norm and the sums of g^2 along the axis that is cut, of all matrices.
2. One all-reduce carries the 18 sums of squares of every matrix, and the 6 of the vectors along the cut axis.
3. With Newton-Schulz the directions go to each matrix's owner by one all-to-all, and come back by another; without, one
   all-reduce carries a sum of squares for each matrix.

Results do not depend on the number of ranks, up to the order of sums and the rounding of the wire. The layout of every
message is fixed when the step is made and compared across ranks once; flags in the first all-reduce say which
parameters have gradients, so that ranks that disagree get an error.

The step here is in PyTorch; `celo2.sharded_kernel_step` fills and reads the same messages by the Triton kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from celo2 import reference
from celo2.matrices import MatrixView
from celo2.newton_schulz import newton_schulz
from celo2.norms import foreach_norm
from celo2.phases import (
    Factors,
    FoldedTheta,
    Matrices,
    MatrixStep,
    Workspace,
    advance_factor,
    apply_update,
    gradient_moments,
    has_started,
    vector_sums,
)
from celo2.reference import NORM_EPS
from celo2.sharding import Layout, Piece, Placing, agree, assign_owners
from celo2.state import MOMENTUM_KEYS, compute_dtype, local
from celo2.stochastic_rounding import mix64, round_stochastically_
from celo2.theta import Theta

WIRE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# the first entries of the first message: squared norm, and whether a rank asks to skip the step
HEADER = 2


def padded(length: int) -> int:
    """Round up to a multiple of 16 elements, so that every part of a message begins at 16 bytes."""
    return -(-length // 16) * 16


class ShardedJob(NamedTuple):
    """A sharded parameter of the learned rule."""

    name: str
    group: int
    parameter: Tensor
    state: dict[str, Tensor]
    view: MatrixView
    placing: Placing
    position: int
    theta: Theta
    orthogonalize: bool
    ns_steps: int


@dataclass(eq=False)
class Member:
    """One parameter: its layout, and where its part of each message begins."""

    job: ShardedJob
    layout: Layout | None  # None for fewer than two axes
    pieces: list[Piece]
    sums: int  # in the first message
    moments: int  # in the second
    squares: int  # in the third
    steps: list[MatrixStep] = field(default_factory=list)
    row_sums: list[Tensor] = field(default_factory=list)
    column_sums: list[Tensor] = field(default_factory=list)
    new_factors: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    directions: list[Tensor] = field(default_factory=list)
    columns: Tensor | None = None  # of a vector
    factor: Tensor | None = None  # of a vector: what becomes of it after a gradient

    @property
    def kind(self) -> str:
        return "vector" if self.layout is None else self.layout.kind

    @property
    def batch(self) -> int:
        return 1 if self.layout is None else self.layout.matrices[0]


class Move(NamedTuple):
    """Elements of a message that are a part of a matrix: of piece `piece` of a member, its `index`-th matrix."""

    member: int
    matrix: int  # of the parameter
    piece: Piece
    number: int  # of the piece among its rank's
    offset: int


def _lay_out(parts: list[list[tuple[int, int, Piece, int]]]) -> tuple[list[Move], list[int]]:
    """Give the parts of a message their offsets, one rank after the other; return them, and each rank's elements."""
    moves, counts, offset = [], [], 0
    for there in parts:
        start = offset
        for index, matrix, piece, number in there:
            moves.append(Move(index, matrix, piece, number, offset))
            offset += padded(piece.rows * piece.columns)
        counts.append(offset - start)
    return moves, counts


class ShardedStep:
    """What ranks tell each other in a step, and the step in PyTorch.

    Collective: every rank of the group makes it and calls `run` in step with the others.

    Raises ValueError for parameters of several groups, RuntimeError when ranks were given different parameters.
    """

    def __init__(
        self, jobs: Sequence[ShardedJob], group: dist.ProcessGroup, wire_dtype: str, device: torch.device
    ) -> None:
        self.group, self.device = group, device
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.wire = WIRE_DTYPES[wire_dtype]
        self.members: list[Member] = []
        sums, moments, squares = HEADER + len(jobs), 0, 0
        for job in jobs:
            if job.parameter.ndim < 2:
                self.members.append(Member(job, None, [], sums, moments, squares))
                moments, squares = moments + 15, squares + 1
                continue
            layout = Layout.of(job.parameter.shape, job.view, job.placing.axis, job.name)
            pieces = layout.pieces(self.ranks, self.rank)
            self.members.append(Member(job, layout, pieces, sums, moments, squares))
            batch, m, n = layout.matrices
            if layout.kind != "whole":
                sums += batch * (n if layout.kind == "rows" else m)
                moments += batch * 24
                squares += batch
        self.lengths = (sums, moments, squares)
        self._plan_moves()
        agree(
            [
                (
                    *(job.name, tuple(job.parameter.shape), job.parameter.dtype, job.view, job.placing.axis, job.group),
                    *(job.theta.sha256, job.orthogonalize, job.ns_steps, wire_dtype),
                )
                for job in jobs
            ],
            group,
            "the set of sharded parameters",
        )
        self._noted: tuple[Tensor, torch.cuda.Event | None] | None = None
        self._folded: dict[tuple[str, torch.dtype, torch.device], FoldedTheta] = {}
        self._workspaces: dict[tuple[torch.dtype, torch.device], Workspace] = {}

    # where everything goes

    def _plan_moves(self) -> None:
        """Fix owners and the layout of both all-to-alls: by owner, then by members, pieces and matrices in order."""
        matrices, shapes, holders = [], [], []
        # parameters of one layout have the same pieces
        pieces: dict[Layout, list[list[Piece]]] = {}
        for index, member in enumerate(self.members):
            layout = member.layout
            if layout is None:
                continue
            if layout not in pieces:
                pieces[layout] = [layout.pieces(self.ranks, rank) for rank in range(self.ranks)]
            if not member.job.orthogonalize:
                continue
            batch, m, n = layout.matrices
            held: list[int | None] = [None] * batch
            for rank, there in enumerate(pieces[layout]):
                for piece in there:
                    if (piece.rows, piece.columns) == (m, n):
                        held[piece.matrix : piece.matrix + piece.count] = [rank] * piece.count
            matrices += [(index, b) for b in range(batch)]
            shapes += [(m, n)] * batch
            holders += held
        steps = max((self.members[index].job.ns_steps for index, _ in matrices), default=5)
        owners = assign_owners(shapes, holders, self.ranks, steps)
        self.owner = dict(zip(matrices, owners, strict=True))

        # (member, matrix, piece, its number) for each rank, in order: what goes there, and what comes from there
        going: list[list[tuple[int, int, Piece, int]]] = [[] for _ in range(self.ranks)]
        coming: list[list[tuple[int, int, Piece, int]]] = [[] for _ in range(self.ranks)]
        mine = {index for (index, _), owner in self.owner.items() if owner == self.rank}
        for index, member in enumerate(self.members):
            if member.layout is None or not member.job.orthogonalize:
                continue
            for number, piece in enumerate(pieces[member.layout][self.rank]):
                for b in range(piece.matrix, piece.matrix + piece.count):
                    going[self.owner[index, b]].append((index, b, piece, number))
            for rank in range(self.ranks) if index in mine else ():
                for number, piece in enumerate(pieces[member.layout][rank]):
                    for b in range(piece.matrix, piece.matrix + piece.count):
                        if self.owner[index, b] == self.rank:
                            coming[rank].append((index, b, piece, number))
        self.sends, self.send_counts = _lay_out(going)
        self.receives, self.receive_counts = _lay_out(coming)
        self.sends_of: dict[tuple[int, int], list[Move]] = {}
        for move in self.sends:
            self.sends_of.setdefault((move.member, move.number), []).append(move)
        self.owned: dict[tuple[int, int, int], list[tuple[int, int]]] = {}  # (m, n, ns_steps) -> matrices
        for (index, b), owner in self.owner.items():
            if owner == self.rank:
                layout = self.members[index].layout
                assert layout is not None
                key = (layout.matrices[1], layout.matrices[2], self.members[index].job.ns_steps)
                self.owned.setdefault(key, []).append((index, b))

    def bytes_sent(self) -> dict[str, int]:
        """Bytes that this rank gives to each kind of collective in a step; an all-to-all's part for itself left out."""
        away = sum(self.send_counts) - self.send_counts[self.rank]
        back = sum(self.receive_counts) - self.receive_counts[self.rank]
        itemsize = self.wire.itemsize
        squares = 0 if all(member.job.orthogonalize for member in self.members) else self.lengths[2]
        return {
            "all-reduce": 4 * (self.lengths[0] + self.lengths[1] + squares),
            "all-to-all": itemsize * (away + back),
        }

    # which parameters have gradients

    def _check(self, flags: Sequence[float]) -> None:
        for member, flag in zip(self.members, flags, strict=True):
            if flag not in (0, self.ranks):
                raise RuntimeError(
                    f"{member.job.name} has a gradient on {flag:g} of {self.ranks} ranks: all or none must have one"
                )

    def note_flags(self, flags: Tensor) -> None:
        """Begin to copy the sums of the flags [members] to the host, for `check_flags` to read."""
        if flags.device.type != "cuda":
            self._noted = flags.clone(), None
        elif not torch.cuda.is_current_stream_capturing():
            host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            host.copy_(flags, non_blocking=True)
            event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._noted = host, event

    def check_flags(self) -> None:
        """Raise RuntimeError when ranks did not agree on the gradients of the last step that was noted.

        Waits for the copy, which ends early in that step. A CUDA graph neither notes nor checks.
        """
        if self._noted is None or (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return
        (flags, event), self._noted = self._noted, None
        if event is not None:
            event.synchronize()
        self._check(flags.tolist())

    # the step

    def _views(self, member: Member, tensor: Tensor) -> list[Tensor]:
        assert member.layout is not None
        return member.layout.views(local(tensor), self.ranks, self.rank)

    def _workspace(self, parameter: Tensor) -> Workspace:
        key = (compute_dtype(parameter), parameter.device)
        if key not in self._workspaces:
            self._workspaces[key] = Workspace(*key)
        return self._workspaces[key]

    def _gradient_sums(self, buffer: Tensor, active: Sequence[Member], scale: Sequence[float], clip: bool) -> None:
        """Phase 1: sums of g^2 by row and column of every piece, and their part of the first message."""
        for member in active:
            layout, job = member.layout, member.job
            member.row_sums, member.column_sums = [], []
            if layout is None or job.parameter.grad is None:
                continue
            batch, m, n = layout.matrices
            cut = n if layout.kind == "rows" else m
            size = 0 if layout.kind == "whole" else batch * cut
            part = buffer[member.sums : member.sums + size].view(-1, cut)
            for piece, g in zip(member.pieces, self._views(member, job.parameter.grad), strict=True):
                moments = gradient_moments(g, self._workspace(job.parameter), scale=scale[job.group], clip=clip)
                member.row_sums.append(moments.row_sum)
                member.column_sums.append(moments.column_sum)
                if layout.kind != "whole":
                    along = moments.column_sum if layout.kind == "rows" else moments.row_sum
                    part[piece.matrix : piece.matrix + piece.count] += along

    def run(
        self,
        groups: Sequence[dict[str, Any]],
        sharded: Sequence[Tensor],
        whole_square: float,
        found: bool,
        inverse_scale: float,
        meanwhile: Callable[[Sequence[float], float], None],
    ) -> tuple[float, Sequence[float] | None]:
        """Step; returns the global gradient norm and each group's factor of gradients, None when the step is skipped.

        `sharded` are the local gradients of the AdamW side, `whole_square` the sum of squares of what every rank has
        whole; `meanwhile(scales, norm)` steps both while directions are on their way.
        """
        device = self.device
        first = torch.zeros(self.lengths[0], dtype=torch.float32, device=device)
        gradients = [local(m.job.parameter.grad) for m in self.members if m.job.parameter.grad is not None]
        square = sum(float(norm) ** 2 for norm in foreach_norm([*gradients, *sharded]))
        # what is not sharded may differ between ranks: all must skip when one has to
        first[0], first[1] = square, float(found or not math.isfinite(whole_square))
        for index, member in enumerate(self.members):
            first[HEADER + index] = float(member.job.parameter.grad is not None)
        ones = [1.0] * len(groups)
        self._gradient_sums(first, self.members, ones, clip=False)
        dist.all_reduce(first, group=self.group)
        flags = first[HEADER : HEADER + len(self.members)].tolist()
        self._check(flags)
        square = float(first[0]) + whole_square
        norm = math.sqrt(square) * inverse_scale if square >= 0 else math.nan
        if not math.isfinite(float(first[0])) or float(first[1]) != 0:
            return norm, None
        scales = []
        for group in groups:
            limit = group["max_grad_norm"]
            scales.append(inverse_scale * (1.0 if limit is None else min(1.0, limit / (norm + 1e-6))))
        active = [member for member, flag in zip(self.members, flags, strict=True) if flag]
        # a global norm of at most 1000 rules out an element above the clip
        clip = norm / inverse_scale * max(scales) > reference.GRADIENT_CLIP
        if clip:
            first.zero_()
            self._gradient_sums(first, active, scales, clip=True)
            dist.all_reduce(first, group=self.group)

        second = torch.zeros(self.lengths[1], dtype=torch.float32, device=device)
        for member in active:
            self._feature_sums(member, first, second, scales[member.job.group], clip)
        if second.numel():
            dist.all_reduce(second, group=self.group)
        third = torch.zeros(self.lengths[2], dtype=torch.float32, device=device)
        sent = torch.zeros(sum(self.send_counts), dtype=self.wire, device=device)
        for member in active:
            self._directions(member, second, third, sent)
        if not all(member.job.orthogonalize for member in self.members) and third.numel():
            dist.all_reduce(third, group=self.group)
        received = torch.empty(sum(self.receive_counts), dtype=self.wire, device=device)
        work = self.exchange(received, sent, self.receive_counts, self.send_counts) if self.owner else None
        meanwhile(scales, norm)
        if work is not None:
            work.wait()
            self._orthogonalize(received)
            self.exchange(sent, received, self.send_counts, self.receive_counts).wait()
        for member in active:
            self._apply(member, third, sent, groups[member.job.group])
        return norm, scales

    def exchange(self, out: Tensor, given: Tensor, out_counts: list[int], counts: list[int]) -> dist.Work:
        """Start an all-to-all between messages in the wire's dtype; counts are elements for each rank."""
        # as bytes: every backend takes them
        size = self.wire.itemsize
        work = dist.all_to_all_single(
            out.view(torch.uint8),
            given.view(torch.uint8),
            [count * size for count in out_counts],
            [count * size for count in counts],
            group=self.group,
            async_op=True,
        )
        assert work is not None
        return work

    def _feature_sums(self, member: Member, first: Tensor, second: Tensor, scale: float, clip: bool) -> None:
        """Phase 2: the new factors, and this rank's part of every sum of squares."""
        job, layout, workspace = member.job, member.layout, self._workspace(member.job.parameter)
        member.steps, member.new_factors, member.directions = [], [], []
        gradient = job.parameter.grad
        assert gradient is not None
        if layout is None:
            state = job.state
            flat = local(job.parameter).reshape(-1).to(workspace.dtype)
            momentum = torch.stack([local(state[name]).reshape(-1).to(flat.dtype) for name in MOMENTUM_KEYS], dim=-1)
            second_moment = local(state["second_moment"]).reshape(-1).to(flat.dtype)
            old = reference.VectorState(momentum, second_moment, local(state["factor"]))
            flat_gradient = local(gradient).reshape(-1).to(flat.dtype) * scale
            member.columns, new = reference.vector_columns(flat, flat_gradient, old)
            second[member.moments : member.moments + 15] += member.columns.square().sum(0)
            seed = self._seed(job)
            for k, name in enumerate(MOMENTUM_KEYS):
                target = local(state[name])
                round_stochastically_(target, new.momentum[:, k].view(target.shape), mix64(seed + k) >> 32)
            target = local(state["second_moment"])
            round_stochastically_(target, new.second_moment.view(target.shape), mix64(seed + 3) >> 32)
            member.factor = new.factor
            return
        batch, m, n = layout.matrices
        square_scale = 1.0 if clip else scale * scale
        row, column = local(job.state["row_factor"]), local(job.state["column_factor"])
        rows_cut, columns_cut = layout.kind != "columns", layout.kind != "rows"
        old_rows = layout.factor_views(row, rows_cut, self.ranks, self.rank)
        old_columns = layout.factor_views(column, columns_cut, self.ranks, self.rank)
        whole: Tensor | None = None
        started: Tensor | None = None
        if layout.kind == "rows":
            sums = first[member.sums : member.sums + batch * n].view(batch, n)
            started = has_started(MatrixView.factors(column, batch), sums)
            whole = advance_factor(MatrixView.factors(column, batch), sums, m, square_scale, started)
            MatrixView.factors(column, batch).copy_(whole)
        elif layout.kind == "columns":
            sums = first[member.sums : member.sums + batch * m].view(batch, m)
            started = has_started(MatrixView.factors(row, batch), sums)
            whole = advance_factor(MatrixView.factors(row, batch), sums, n, square_scale, started)
            MatrixView.factors(row, batch).copy_(whole)
        p, g = self._views(member, job.parameter), self._views(member, gradient)
        momenta = [self._views(member, job.state[name]) for name in MOMENTUM_KEYS]
        second_moments = self._views(member, job.state["second_moment"])
        for number, piece in enumerate(member.pieces):
            here = slice(piece.matrix, piece.matrix + piece.count)
            starts = has_started(old_rows[number], member.row_sums[number]) if started is None else started[here]
            if layout.kind == "columns":
                assert whole is not None
                new_row = whole[here]
            else:
                new_row = advance_factor(old_rows[number], member.row_sums[number], n, square_scale, starts)
                old_rows[number].copy_(new_row)
            if layout.kind == "rows":
                assert whole is not None
                new_column = whole[here]
            else:
                new_column = advance_factor(old_columns[number], member.column_sums[number], m, square_scale, starts)
                old_columns[number].copy_(new_column)
            # the means of both factors are the moving average of the matrix's mean g^2: take the one that is whole
            short = new_row if layout.kind == "columns" or (layout.kind == "whole" and m <= n) else new_column
            factors = Factors(new_row, new_column, (m, n), short.mean(-2, keepdim=True))
            matrices = Matrices(
                p[number], g[number], (momenta[0][number], momenta[1][number], momenta[2][number]),
                second_moments[number],
                old_rows[number], old_columns[number],
            )  # fmt: skip
            key = (job.theta.sha256, workspace.dtype, workspace.device)
            if key not in self._folded:
                self._folded[key] = FoldedTheta.from_theta(job.theta, workspace.dtype, workspace.device)
            step = MatrixStep(
                matrices, None, self._folded[key], workspace, factors=factors, scale=scale, clip=clip,
                seed=mix64(self._seed(job) + 16 + number),
            )  # fmt: skip
            member.steps.append(step)
            member.new_factors.append((new_row, new_column))
            if layout.kind != "whole":
                part = second[member.moments : member.moments + batch * 24].view(batch, 24)[here]
                part[:, :18] += step.feature_sums().T
                part[:, 18:] += vector_sums(new_row if layout.kind == "rows" else new_column)

    def _seed(self, job: ShardedJob) -> int:
        """Seed of a shard's rounding: replicas of a shard round alike, different shards do not."""
        return mix64(mix64(mix64(job.position) ^ mix64(-1 - self.rank)) ^ int(job.state["step"]))

    def _directions(self, member: Member, second: Tensor, third: Tensor, sent: Tensor) -> None:
        """Phase 3: momenta, second moment and direction of every piece, into the message or with its sum of squares."""
        job, layout = member.job, member.layout
        job.state["step"] += 1
        if layout is None:
            assert member.columns is not None
            total = second[member.moments : member.moments + 15]
            scale = torch.rsqrt(total / max(1, job.parameter.numel()) + NORM_EPS).to(member.columns.dtype)
            theta = job.theta.tensors(member.columns.dtype, member.columns.device)
            factor = local(job.state["factor"])
            started = reference.vector_has_started(factor, total[0])
            d = torch.where(started, reference.mlp(theta, member.columns * scale), 0.0)
            assert member.factor is not None
            factor.copy_(member.factor * started)
            member.directions = [d]
            third[member.squares] += d.square().sum()
            return
        batch, m, n = layout.matrices
        index = self.members.index(member)
        for number, (piece, step) in enumerate(zip(member.pieces, member.steps, strict=True)):
            here = slice(piece.matrix, piece.matrix + piece.count)
            if layout.kind == "whole":
                direction = step.learned_update(step.feature_scales())
            else:
                part = second[member.moments : member.moments + batch * 24].view(batch, 24)[here]
                part = part.to(step.workspace.dtype)
                scales = torch.rsqrt(part[:, :18].T / (m * n) + NORM_EPS)
                new_row, new_column = member.new_factors[number]
                row_sums = part[:, 18:] if layout.kind == "rows" else vector_sums(new_row)
                column_sums = part[:, 18:] if layout.kind == "columns" else vector_sums(new_column)
                vectors = torch.rsqrt(row_sums / m + NORM_EPS), torch.rsqrt(column_sums / n + NORM_EPS)
                direction = step.learned_update(scales, vectors)
            if job.orthogonalize:
                for move in self.sends_of[index, number]:
                    size = piece.rows * piece.columns
                    target = sent[move.offset : move.offset + size].view(piece.rows, piece.columns)
                    target.copy_(direction[move.matrix - piece.matrix])
            else:
                member.directions.append(direction.clone())
                if layout.kind != "whole":
                    squares = third[member.squares : member.squares + batch]
                    squares[here] += direction.square().sum(-1).sum(-1)

    def _orthogonalize(self, received: Tensor) -> None:
        """Newton-Schulz and an RMS of 1 on the whole matrices that this rank owns, in place of what it received."""
        parts: dict[tuple[int, int], list[Move]] = {}
        for move in self.receives:
            parts.setdefault((move.member, move.matrix), []).append(move)
        for (m, n, ns_steps), matrices in self.owned.items():
            dtype = compute_dtype(self.members[matrices[0][0]].job.parameter)
            x = torch.empty(len(matrices), m, n, dtype=dtype, device=received.device)
            places = [
                (position, move, received[move.offset : move.offset + move.piece.rows * move.piece.columns])
                for position, key in enumerate(matrices)
                for move in parts[key]
            ]
            for position, move, values in places:
                target = _part_of(x[position], move.piece)
                target.copy_(values.view(target.shape))
            x = newton_schulz(x, ns_steps)
            square = x.square().sum(-1).sum(-1)[:, None, None]
            x = x * torch.rsqrt(square / (m * n) + NORM_EPS)
            for position, move, values in places:
                source = _part_of(x[position], move.piece)
                values.view(source.shape).copy_(source)

    def _apply(self, member: Member, third: Tensor, returned: Tensor, group: dict[str, Any]) -> None:
        """Phase 4: p <- p - lr (u + weight_decay p) on this rank's shard."""
        job, layout = member.job, member.layout
        options = {"lr": float(group["lr"]), "weight_decay": group["weight_decay"]}
        dtype, shard = compute_dtype(job.parameter), local(job.parameter)
        wide = shard if shard.dtype == dtype else shard.to(dtype)
        if layout is None:
            square = third[member.squares].to(dtype) / max(1, job.parameter.numel())
            u = member.directions[0].view(wide.shape) * torch.rsqrt(square + NORM_EPS)
            apply_update(wide, u, torch.ones((), dtype=dtype, device=u.device), **options)
        else:
            batch, m, n = layout.matrices
            index = self.members.index(member)
            for number, p in enumerate(layout.views(wide, self.ranks, self.rank)):
                piece = member.pieces[number]
                if job.orthogonalize:
                    u = torch.empty(p.shape, dtype=dtype, device=p.device)
                    for move in self.sends_of[index, number]:
                        values = returned[move.offset : move.offset + piece.rows * piece.columns]
                        u[move.matrix - piece.matrix] = values.view(piece.rows, piece.columns)
                    scale = member.steps[number].moves
                else:
                    u = member.directions[number]
                    if layout.kind == "whole":
                        square = u.square().sum(-1).sum(-1)
                    else:
                        square = third[member.squares : member.squares + batch][
                            piece.matrix : piece.matrix + piece.count
                        ].to(dtype)
                    scale = torch.rsqrt(square / (m * n) + NORM_EPS)[:, None, None] * member.steps[number].moves
                apply_update(p, u, scale, **options)
        if wide is not shard:
            round_stochastically_(shard, wide, mix64(self._seed(job) + 8) >> 32)
        member.steps, member.directions, member.columns, member.factor = [], [], None, None


def _part_of(matrix: Tensor, piece: Piece) -> Tensor:
    """View the part of a matrix [m, n] that a piece has."""
    return matrix[piece.row : piece.row + piece.rows, piece.column : piece.column + piece.columns]
