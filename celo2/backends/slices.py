"""The phases in PyTorch on what a rank has of parameters that are divided among ranks: slices of matrices.

Each phase goes over all of them, and leaves its sums in the messages (`celo2.plan`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from celo2 import reference
from celo2.comm import Comm
from celo2.exchanges import Owned, Transfer
from celo2.folded import FoldedTheta, direction_scale
from celo2.matrices import MatrixView
from celo2.newton_schulz import EPS, newton_schulz, orthogonalize_part
from celo2.phases import (
    Factors,
    GradientMoments,
    Matrices,
    MatrixStep,
    Workspace,
    advance_factor,
    apply_update,
    gradient_moments,
    has_started,
    vector_sums,
)
from celo2.plan import Entry, Plan, Slot
from celo2.quantisation import dequantise, quantise_
from celo2.reference import NORM_EPS
from celo2.shard_layout import Slice
from celo2.state import MOMENTUM_KEYS
from celo2.step import Messages
from celo2.stochastic_rounding import mix64, round_stochastically_


class Memory:
    """Scratch planes and folded thetas, kept from step to step."""

    def __init__(self) -> None:
        self._workspaces: dict[tuple[torch.dtype, torch.device], Workspace] = {}
        self._folded: dict[tuple[str, torch.dtype, torch.device], FoldedTheta] = {}
        self._unfolded: dict[tuple[str, torch.dtype, torch.device], dict[str, Tensor]] = {}

    def workspace(self, slot: Slot) -> Workspace:
        key = (slot.compute_dtype, slot.parameter.device)
        if key not in self._workspaces:
            self._workspaces[key] = Workspace(*key)
        return self._workspaces[key]

    def folded(self, slot: Slot) -> FoldedTheta:
        key = (slot.theta.sha256, slot.compute_dtype, slot.parameter.device)
        if key not in self._folded:
            self._folded[key] = FoldedTheta.from_theta(slot.theta, *key[1:])
        return self._folded[key]

    def unfolded(self, slot: Slot) -> dict[str, Tensor]:
        key = (slot.theta.sha256, slot.compute_dtype, slot.parameter.device)
        if key not in self._unfolded:
            self._unfolded[key] = slot.theta.tensors(*key[1:])
        return self._unfolded[key]


@dataclass(eq=False)
class _Sliced:
    """An entry of the plan in one step: its tensors on this rank, and what each phase leaves for the next."""

    entry: Entry
    shard: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    moments: list[GradientMoments] = field(default_factory=list)
    steps: list[MatrixStep] = field(default_factory=list)
    stored: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # momenta as they are kept
    scales: list[Tensor] = field(default_factory=list)  # of 8-bit momenta, [count, rows, quanta, 3]
    vector_sums: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # over rows and columns, [count, 6] each
    directions: list[Tensor] = field(default_factory=list)
    columns: Tensor | None = None  # of a vector
    factor: Tensor | None = None  # of a vector: what becomes of it after a gradient

    @classmethod
    def of(cls, entry: Entry) -> _Sliced:
        slot = entry.slot
        shard, gradient = slot.shard, slot.gradient
        if gradient.stride() != shard.stride():
            gradient = torch.empty_like(shard, dtype=gradient.dtype).copy_(gradient)
        return cls(entry, shard, gradient, slot.state)


class Slices:
    """The entries of a plan that have gradients in one step."""

    def __init__(self, plan: Plan, memory: Memory) -> None:
        self.plan, self.memory = plan, memory
        self.sliced = {
            index: _Sliced.of(entry)
            for index, entry in enumerate(plan.entries)
            if entry.slot.parameter.grad is not None
        }
        self.messages: Messages
        self.scales: Sequence[float] = ()  # of the gradients of each group
        self.clip = False

    @property
    def square(self) -> float:
        """Sum of squares of the gradients of all slices of matrices that count on this rank."""
        return sum(m.total for sliced in self.sliced.values() if sliced.entry.counts for m in sliced.moments)

    def gradient_moments(self, *, clipped: bool) -> None:
        """Phase 1."""
        for sliced in self.sliced.values():
            self._gradient_sums(sliced, clipped)

    def _gradient_sums(self, sliced: _Sliced, clipped: bool) -> None:
        """Sums of g^2 by row and column of every slice, and their part of the message."""
        entry, slot, layout = sliced.entry, sliced.entry.slot, sliced.entry.layout
        if layout is None:
            return
        sliced.moments = []
        row_totals, column_totals = self._totals(entry)
        scale = self.scales[slot.group]
        for piece, g in zip(entry.slices, self._views(sliced, sliced.gradient), strict=True):
            moments = gradient_moments(g, self.memory.workspace(slot), scale=scale, clip=clipped)
            sliced.moments.append(moments)
            here = slice(piece.matrix, piece.matrix + piece.count)
            if row_totals is not None:
                row_totals[here, piece.row : piece.row + piece.rows] += moments.row_sum
            if column_totals is not None:
                column_totals[here, piece.column : piece.column + piece.columns] += moments.column_sum

    def _totals(self, entry: Entry) -> tuple[Tensor | None, Tensor | None]:
        """The sums of g^2 over whole rows [B, m] and columns [B, n] in the message, of axes that are cut."""
        assert entry.layout is not None
        batch, m, n = entry.layout.matrices
        rows, columns = (
            None if start is None else self.messages.gradients[start : start + batch * length].view(batch, length)
            for start, length in ((entry.row_totals, m), (entry.column_totals, n))
        )
        return rows, columns

    def _views(self, sliced: _Sliced, tensor: Tensor) -> list[Tensor]:
        assert sliced.entry.layout is not None
        return sliced.entry.layout.views(tensor, self.plan.rank)

    def _seed(self, entry: Entry) -> int:
        """Seed of a shard's rounding: replicas of a shard round alike, different shards do not."""
        shard = mix64(entry.slot.position) ^ mix64(-1 - entry.home)
        return mix64(mix64(shard) ^ int(entry.slot.states["step"]))

    def feature_moments(self) -> None:
        """Phase 2."""
        for sliced in self.sliced.values():
            if sliced.entry.layout is None:
                self._vector_sums(sliced)
            else:
                self._feature_sums(sliced)

    def _vector_sums(self, sliced: _Sliced) -> None:
        """New accumulators of a shard of a vector, and its part of the 15 sums of squares."""
        slot, state = sliced.entry.slot, sliced.state
        flat = sliced.shard.reshape(-1).to(slot.compute_dtype)
        old = vector_state(state, flat.dtype)
        gradient = sliced.gradient.reshape(-1).to(flat.dtype) * self.scales[slot.group]
        sliced.columns, new = reference.vector_columns(flat, gradient, old)
        sliced.factor = new.factor
        start = sliced.entry.feature_sumsq
        self.messages.features[start : start + 15] += sliced.columns.square().sum(0)
        write_vector_state(state, new, self._seed(sliced.entry))

    def _feature_sums(self, sliced: _Sliced) -> None:
        """New factors of every slice of a parameter, and its part of the sums of squares."""
        entry, slot, layout, state = sliced.entry, sliced.entry.slot, sliced.entry.layout, sliced.state
        assert layout is not None
        workspace, scale = self.memory.workspace(slot), self.scales[slot.group]
        batch, m, n = layout.matrices
        # moments of a clipped gradient are taken after scaling
        square_scale = 1.0 if self.clip else scale * scale
        row, column = state["row_factor"], state["column_factor"]
        old_rows, old_columns = layout.factor_views(row, column, self.plan.rank)
        # factors along cut axes are whole on every rank
        row_totals, column_totals = self._totals(entry)
        whole_rows = whole_columns = started = None
        if column_totals is not None:
            factor = MatrixView.factors(column, batch)
            started = has_started(factor, column_totals)
            whole_columns = advance_factor(factor, column_totals, m, square_scale, started)
            factor.copy_(whole_columns)
        if row_totals is not None:
            factor = MatrixView.factors(row, batch)
            started = has_started(factor, row_totals) if started is None else started
            whole_rows = advance_factor(factor, row_totals, n, square_scale, started)
            factor.copy_(whole_rows)
        p, g = self._views(sliced, sliced.shard), self._views(sliced, sliced.gradient)
        momenta = [self._views(sliced, state[name]) for name in MOMENTUM_KEYS]
        if "momentum_scale" in state:
            scales, _ = layout.factor_views(state["momentum_scale"].flatten(-2), column, self.plan.rank)
            sliced.scales = [scale.view(*scale.shape[:2], -1, 3) for scale in scales]
        second_moments = self._views(sliced, state["second_moment"])
        for number, piece in enumerate(entry.slices):
            here = slice(piece.matrix, piece.matrix + piece.count)
            moments = sliced.moments[number]
            starts = has_started(old_rows[number], moments.row_sum) if started is None else started[here]
            if whole_rows is not None:
                new_row = whole_rows[here, piece.row : piece.row + piece.rows]
            else:
                new_row = advance_factor(old_rows[number], moments.row_sum, n, square_scale, starts)
                old_rows[number].copy_(new_row)
            if whole_columns is not None:
                new_column = whole_columns[here, piece.column : piece.column + piece.columns]
            else:
                new_column = advance_factor(old_columns[number], moments.column_sum, m, square_scale, starts)
                old_columns[number].copy_(new_column)
            # the means of both factors are the moving average of the matrix's mean g^2: take one that is whole
            all_rows = new_row if whole_rows is None else whole_rows[here]
            all_columns = new_column if whole_columns is None else whole_columns[here]
            by_rows = not layout.cuts_rows and (layout.cuts_columns or m <= n)
            short = all_rows if by_rows else all_columns
            factors = Factors(new_row, new_column, (m, n), short.mean(-2, keepdim=True))
            fast, medium, slow = (momentum[number] for momentum in momenta)
            stored = fast, medium, slow
            if sliced.scales:
                fast, medium, slow = _dequantised(stored, sliced.scales[number])
            matrices = Matrices(
                *(p[number], g[number], (fast, medium, slow), second_moments[number]),
                *(old_rows[number], old_columns[number]),
            )
            step = MatrixStep(
                matrices,
                None,
                self.memory.folded(slot),
                workspace,
                factors=factors,
                scale=scale,
                clip=self.clip,
                seed=mix64(self._seed(entry) + 16 + number),
            )
            sliced.steps.append(step)
            sliced.stored.append(stored)
            sliced.vector_sums.append((vector_sums(all_rows), vector_sums(all_columns)))
            if not layout.whole:
                part = self._feature_part(entry)[here]
                part[:, :18] += step.feature_sums().T
                # of the vectors along an axis that is on no rank as a whole
                for which, factor in enumerate(sliced.vector_sums[-1]):
                    if layout.shares_vectors[which]:
                        part[:, 18:24] += factor
            # wide copies of 8 bits are not kept until the next phase
            step.matrices = replace(step.matrices, momenta=stored)

    def _feature_part(self, entry: Entry) -> Tensor:
        """The sums of every matrix of an entry in the message, [B, feature_width]."""
        assert entry.layout is not None
        size = entry.feature_width * entry.layout.matrices[0]
        return self.messages.features[entry.feature_sumsq :][:size].view(-1, entry.feature_width)

    def learned_update(self) -> None:
        """Phase 3."""
        for index, sliced in self.sliced.items():
            sliced.entry.slot.states["step"] += 1
            if sliced.entry.layout is None:
                self._vector_direction(sliced)
            else:
                self._directions(index, sliced)

    def _vector_direction(self, sliced: _Sliced) -> None:
        entry, slot, columns, factor = sliced.entry, sliced.entry.slot, sliced.columns, sliced.state["factor"]
        assert columns is not None and sliced.factor is not None
        total = self.messages.features[entry.feature_sumsq : entry.feature_sumsq + 15]
        scale = torch.rsqrt(total / max(1, slot.parameter.numel()) + NORM_EPS).to(columns.dtype)
        started = reference.vector_has_started(factor, total[0])
        d = torch.where(started, reference.mlp(self.memory.unfolded(slot), columns * scale), 0.0)
        factor.copy_(sliced.factor * started)
        sliced.directions = [d]
        self.messages.directions[entry.direction_sumsq] += d.square().sum()

    def _directions(self, index: int, sliced: _Sliced) -> None:
        """Momenta, second moment and direction of every slice; the direction into the message, or kept."""
        entry, slot, layout = sliced.entry, sliced.entry.slot, sliced.entry.layout
        assert layout is not None
        batch, m, n = layout.matrices
        for number, (piece, step) in enumerate(zip(entry.slices, sliced.steps, strict=True)):
            here = slice(piece.matrix, piece.matrix + piece.count)
            if sliced.scales:
                wide = _dequantised(sliced.stored[number], sliced.scales[number])
                step.matrices = replace(step.matrices, momenta=wide)
            if layout.whole:
                direction = step.learned_update(step.feature_scales())
            else:
                part = self._feature_part(entry)[here].to(step.workspace.dtype)
                scales = torch.rsqrt(part[:, :18].T / (m * n) + NORM_EPS)
                row_sums, column_sums = (
                    part[:, 18:24] if shared else own
                    for shared, own in zip(layout.shares_vectors, sliced.vector_sums[number], strict=True)
                )
                vectors = torch.rsqrt(row_sums / m + NORM_EPS), torch.rsqrt(column_sums / n + NORM_EPS)
                direction = step.learned_update(scales, vectors)
            if sliced.scales:
                for k, levels in enumerate(sliced.stored[number]):
                    seed = mix64(self._seed(entry) + 32 + 3 * number + k) >> 32
                    quantise_(levels, sliced.scales[number][..., k], step.matrices.momenta[k], seed)
                step.matrices = replace(step.matrices, momenta=sliced.stored[number])
            if slot.orthogonalize:
                if self.plan.comm_dtype == torch.float16:
                    limit = torch.finfo(torch.float16).max
                    direction = (direction * direction_scale(slot.theta)).clamp_(-limit, limit)
                for transfer, values in self._sent(index, number):
                    values.copy_(_part_of(direction[transfer.matrix - piece.matrix], transfer, piece))
            else:
                sliced.directions.append(direction.clone())
                if not layout.whole:
                    squares = self.messages.directions[entry.direction_sumsq :][:batch]
                    squares[here] += direction.square().sum(-1).sum(-1)

    def _sent(self, index: int, number: int) -> Iterator[tuple[Transfer, Tensor]]:
        """The parts of a slice in the message, [rows, columns] each."""
        for transfer in self.plan.parts_of[index, number]:
            yield transfer, _values(self.messages.sent, transfer)

    def orthogonalize(self, comm: Comm) -> None:
        """Newton-Schulz and an RMS of 1 on the matrices that this rank owns, in place of what it received."""
        parts: dict[tuple[int, int], list[Transfer]] = {}
        for transfer in self.plan.receives:
            parts.setdefault((transfer.entry, transfer.matrix), []).append(transfer)
        for owned, matrices in self.plan.owned.items():
            dtype = self.plan.entries[matrices[0][0]].slot.compute_dtype
            shape = len(matrices), owned.block.rows, owned.block.columns
            x = torch.empty(shape, dtype=dtype, device=self.messages.received.device)
            places = [
                (_part_of(x[position], transfer, owned.block), _values(self.messages.received, transfer))
                for position, key in enumerate(matrices)
                for transfer in parts.get(key, ())
            ]
            for target, values in places:
                target.copy_(values)
            if owned.parts > 1:
                y, square = _orthogonalized_block(x, owned, comm, self.plan.exact_products)
            else:
                y = newton_schulz(x, owned.ns_steps)
                square = y.square().sum(-1).sum(-1)
            torch.mul(y, torch.rsqrt(square / (owned.m * owned.n) + NORM_EPS)[:, None, None], out=x)
            for source, values in places:
                values.copy_(source)

    def apply(self, groups: Sequence[dict[str, Any]]) -> None:
        """Phase 4: p <- p - lr (u + weight_decay p) on this rank's shards."""
        for index, sliced in self.sliced.items():
            slot, shard = sliced.entry.slot, sliced.shard
            group = groups[slot.group]
            options = {"lr": float(group["lr"]), "weight_decay": group["weight_decay"]}
            wide = shard if shard.dtype == slot.compute_dtype else shard.to(slot.compute_dtype)
            for p, u, scale in self._updates(index, sliced, wide):
                apply_update(p, u, scale, **options)
            if wide is not shard:
                round_stochastically_(shard, wide, mix64(self._seed(sliced.entry) + 8) >> 32)

    def _updates(self, index: int, sliced: _Sliced, wide: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What is moved, [B, rows, columns] of `wide`, the direction, and what that is multiplied by."""
        entry, layout, dtype = sliced.entry, sliced.entry.layout, wide.dtype
        squares = self.messages.directions[entry.direction_sumsq :]
        if layout is None:
            square = squares[0].to(dtype) / max(1, entry.slot.parameter.numel())
            u = sliced.directions[0].view(wide.shape) * torch.rsqrt(square + NORM_EPS)
            yield wide, u, torch.ones((), dtype=dtype, device=u.device)
            return
        _, m, n = layout.matrices
        for number, p in enumerate(self._views(sliced, wide)):
            piece, moves = entry.slices[number], sliced.steps[number].moves
            if entry.slot.orthogonalize:
                u = torch.empty(p.shape, dtype=dtype, device=p.device)
                for transfer, values in self._sent(index, number):
                    _part_of(u[transfer.matrix - piece.matrix], transfer, piece).copy_(values)
                yield p, u, moves
                continue
            u = sliced.directions[number]
            if layout.whole:
                square = u.square().sum(-1).sum(-1)
            else:
                square = squares[piece.matrix : piece.matrix + piece.count].to(dtype)
            yield p, u, torch.rsqrt(square / (m * n) + NORM_EPS)[:, None, None] * moves


def _dequantised(levels: tuple[Tensor, Tensor, Tensor], scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    fast, medium, slow = (dequantise(level, scales[..., k]) for k, level in enumerate(levels))
    return fast, medium, slow


def _values(message: Tensor, transfer: Transfer) -> Tensor:
    """View a part of a matrix in a message, [rows, columns]."""
    rows, columns = transfer.piece.rows, transfer.piece.columns
    return message[transfer.offset : transfer.offset + rows * columns].view(rows, columns)


def _part_of(matrix: Tensor, transfer: Transfer, within: Slice) -> Tensor:
    """View the part that travels in a slice of its matrix, [rows, columns]."""
    piece = transfer.piece
    row, column = piece.row - within.row, piece.column - within.column
    return matrix[row : row + piece.rows, column : column + piece.columns]


def _orthogonalized_block(x: Tensor, owned: Owned, comm: Comm, exact: bool) -> tuple[Tensor, Tensor]:
    """Return this rank's block [B, rows, columns] of shared matrices orthogonalised, and their sums of squares [B]."""
    square = torch.linalg.vector_norm(x, dim=-1).square().sum(-1)
    comm.all_reduce_shared(square)
    x = x / (square.sqrt() + EPS)[:, None, None]
    is_tall, length = owned.m > owned.n, max(owned.m, owned.n)
    y = orthogonalize_part(x.mT if is_tall else x, length, owned.ns_steps, comm.all_reduce_shared, exact=exact)
    square = y.square().sum(-1).sum(-1)
    comm.all_reduce_shared(square)
    return y.mT if is_tall else y, square


def vector_state(state: dict[str, Tensor], dtype: torch.dtype) -> reference.VectorState:
    momentum = torch.stack([state[name].reshape(-1).to(dtype) for name in MOMENTUM_KEYS], dim=-1)
    return reference.VectorState(momentum, state["second_moment"].reshape(-1).to(dtype), state["factor"])


def write_vector_state(state: dict[str, Tensor], new: reference.VectorState, seed: int) -> None:
    """Write the new momenta and second moment, the factor left out."""
    for index, name in enumerate(MOMENTUM_KEYS):
        target = state[name]
        round_stochastically_(target, new.momentum[:, index].view(target.shape), mix64(seed + index) >> 32)
    target = state["second_moment"]
    round_stochastically_(target, new.second_moment.view(target.shape), mix64(seed + 3) >> 32)
