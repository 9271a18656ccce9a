"""A step of VeLO over stacks: tensors of one shape as one, in blocks of bounded size; and the sums that ranks exchange.

1. `Stack.gather_sums` reads everything once: sums of the LSTM's features, and of g^2 by row and column.
2. With sharded parameters one all-reduce carries these, the loss, and which parameters have gradients.
3. `Stack.columns_squared` gives the sums of squares of the 30 columns, of sharded parameters by a second all-reduce.
4. `Stack.update` writes accumulators and parameters.

A parameter is sharded along one axis. Rows that are cut give means by an all-reduce, whole ones without; either way the
factor of an axis that is cut is sharded, and the other one is whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from celo2.reference import GRADIENT_CLIP
from celo2.state import MOMENTUM_KEYS, compute_dtype
from celo2.stochastic_rounding import mix64, round_stochastically_
from celo2.velo_rule import (
    SUMS,
    Block,
    Factors,
    advance_factor,
    column_scales,
    column_sums,
    directions,
    element_columns,
    iterate_blocks,
)

# elements of a block: 18 columns of float32 are 36 MiB, and as much again is in flight
BLOCK = 1 << 19


@dataclass(eq=False)
class Job:
    """A parameter with a gradient: this rank's part of it, of the gradient and of the state."""

    name: str
    shape: torch.Size  # of the whole
    order: tuple[int, ...]  # `axis_order`
    parameter: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    cut: int | None  # the axis that is sharded
    ranks: int  # that have a part

    def part(self, tensor: Tensor) -> Tensor:
        """Return a view of the parameter, or of what is like it, in the order of the rule; a scalar as [1]."""
        return tensor.permute(self.order) if tensor.ndim else tensor.reshape(1)


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64, and float32 where there is none (Apple's GPUs)."""
    return torch.float32 if device.type == "mps" else torch.float64


class Stack:
    """Tensors of one shape, dtype, device and sharding, stepped as one [t, ...]."""

    def __init__(self, jobs: Sequence[Job], *, inverse_scale: Tensor | float, weight_decay: float, seed: int) -> None:
        first = jobs[0]
        self.jobs, self.seed = jobs, seed
        self.inverse_scale, self.weight_decay = inverse_scale, weight_decay
        self.dtype, self.device = compute_dtype(first.parameter), first.parameter.device
        self.wide = sum_dtype(self.device)
        self.shape = first.part(first.parameter).shape  # of this rank's part
        self.size = first.shape.numel()  # of the whole
        self.whole = torch.Size([first.shape[axis] for axis in first.order] or [1])
        self.is_vector = len(self.shape) < 2
        # the axis of `shape` that is sharded, counted from the end
        self.cut = None if first.cut is None else first.order.index(first.cut) - len(self.shape)
        self.blocks = list(iterate_blocks(self.shape, max(1, BLOCK // len(jobs))))
        self.row_sum = self.column_sum = torch.empty(0)
        self.factors: Factors | None = None
        self._kept: Tensor | None = None

    # reading and writing blocks

    def _sources(self, key: str) -> list[Tensor]:
        if key == "parameter":
            return [job.part(job.parameter) for job in self.jobs]
        if key == "gradient":
            return [job.part(job.gradient) for job in self.jobs]
        return [job.part(job.state[key]) for job in self.jobs]

    def read(self, key: str, block: Block) -> Tensor:
        """Return a block of a parameter, gradient or accumulator of all tensors, [t, ...] of the compute dtype."""
        return torch.stack([source[block] for source in self._sources(key)]).to(self.dtype)

    def _write(self, key: str, block: Block, new: Tensor, accepted: Tensor | None) -> None:
        if accepted is not None:
            new = torch.where(accepted, new, self.read(key, block))
        targets = [source[block] for source in self._sources(key)]
        if targets[0].dtype == torch.bfloat16:
            # steps are smaller than the last bit of most elements
            new = round_stochastically_(torch.empty_like(new, dtype=torch.bfloat16), new, self._next_seed())
        torch._foreach_copy_(targets, list(new.unbind()))

    def _next_seed(self) -> int:
        self.seed = mix64(self.seed)
        return self.seed >> 32

    def _gradient(self, block: Block) -> tuple[Tensor, Tensor]:
        """Return the gradient as the rule takes it, and whether it is finite, 0-d."""
        g = self.read("gradient", block) * self.inverse_scale
        finite = torch.isfinite(g).all()
        if self.weight_decay:
            g = g + self.weight_decay * self.read("parameter", block)
        return g.clamp_(-GRADIENT_CLIP, GRADIENT_CLIP), finite

    def _factor(self, key: str) -> Tensor:
        return torch.stack([job.state[key] for job in self.jobs])

    # the phases

    def gather_sums(self) -> tuple[Tensor, Tensor]:
        """Return this rank's sums [t, 9] (`velo_rule.SUMS`) and how many of its blocks are not finite, 0-d."""
        t = len(self.jobs)
        sums = torch.zeros(t, SUMS, dtype=self.wide, device=self.device)
        bad = torch.zeros((), dtype=self.wide, device=self.device)
        if not self.is_vector:
            self.row_sum = torch.zeros(t, *self.shape[:-1], dtype=self.wide, device=self.device)
            self.column_sum = torch.zeros(t, *self.shape[:-2], self.shape[-1], dtype=self.wide, device=self.device)
        for block in self.blocks:
            p, v = self.read("parameter", block), self.read("second_moment", block)
            m = [self.read(key, block) for key in MOMENTUM_KEYS]
            planes = torch.stack([*m, v], dim=1).flatten(2).to(self.wide)
            sums[:, 0] += p.flatten(1).to(self.wide).square().sum(1)
            sums[:, 1:5] += planes.sum(2)
            sums[:, 5:] += planes.square_().sum(2)
            g, finite = self._gradient(block)
            bad += ~finite
            if not self.is_vector:
                *rest, rows, columns = block
                square = g.square_()
                self.row_sum[:, *rest, rows] += square.sum(-1, dtype=self.wide)
                self.column_sum[:, *rest, columns] += square.sum(-2, dtype=self.wide)
        return sums, bad

    @property
    def exchanged(self) -> list[Tensor]:
        """What of the sums of g^2, and of the factors, ranks add up: of the axis along which a sum is cut."""
        if self.is_vector or self.cut is None or self.cut < -2:
            return []
        if self.cut == -1:
            return [self.row_sum]
        # rows are whole here: the mean over all of them is a sum over ranks
        return [self.column_sum, self._short_sum]

    def advance_rows(self) -> None:
        """Prepare what ranks add up of the rows' factor, where rows are on several ranks."""
        if not self.is_vector and self.cut == -2:
            self._short = advance_factor(self._factor("row_factor"), self._mean(self.row_sum, -1))
            self._short_sum = self._short.sum(-2, dtype=self.wide)

    def _mean(self, sums: Tensor, axis: int) -> Tensor:
        return (sums / self.whole[axis]).to(self.dtype)

    def advance_factors(self) -> None:
        """Advance the factored second moments; sums of g^2 are those of whole tensors now."""
        if self.is_vector:
            square = torch.zeros(len(self.jobs), *self.shape, dtype=self.dtype, device=self.device)
            for block in self.blocks:
                square[:, *block] = self._gradient(block)[0].square()
            self.factors = Factors(advance_factor(self._factor("factor"), square), None, None)
            return
        long = advance_factor(self._factor("column_factor"), self._mean(self.column_sum, -2))
        if self.cut == -2:
            self.factors = Factors(self._short, long, self._mean(self._short_sum, -2)[..., None, :])
            return
        short = advance_factor(self._factor("row_factor"), self._mean(self.row_sum, -1))
        self.factors = Factors(short, long, short.mean(-2, keepdim=True))

    def _columns(self) -> Iterator[tuple[Block, Factors, Tensor]]:
        assert self.factors is not None
        for block in self.blocks:
            factors = self.factors.cut(block)
            if self._kept is not None:
                yield block, factors, self._kept
                continue
            g, _ = self._gradient(block)
            momenta = tuple(self.read(key, block) for key in MOMENTUM_KEYS)
            x = element_columns(self.read("parameter", block), g, momenta, self.read("second_moment", block), factors)
            yield block, factors, x

    def columns_squared(self, *, keep: bool) -> Tensor:
        """Return sums of squares of this rank's part of the 30 columns, [t, 30].

        With `keep`, the columns of a stack of one block stay for `update`, which is next then.
        """
        sums = torch.zeros(len(self.jobs), 30, dtype=self.wide, device=self.device)
        for _, factors, x in self._columns():
            sums += column_sums(x, factors, self.wide)
            if keep and len(self.blocks) == 1:
                self._kept = x
        return sums

    def update(self, sums: Tensor, mlp: list[Tensor], scale: Tensor, accepted: Tensor | None) -> None:
        """Write new accumulators and parameters; `scale` [t] is what directions are multiplied by.

        `accepted`, 0-d bool, keeps everything as it was where it is false; None accepts.
        """
        scales = column_scales(sums, self.size)
        for block, factors, x in self._columns():
            step = directions(x, factors, mlp, scales) * scale.view(-1, *(1 for _ in self.shape))
            self._write("parameter", block, x[:, 15] - step, accepted)
            for index, key in enumerate(MOMENTUM_KEYS):
                self._write(key, block, x[:, 1 + index], accepted)
            self._write("second_moment", block, x[:, 16], accepted)
        self._kept = None
        assert self.factors is not None
        new = {"factor": self.factors.short}
        if self.factors.long is not None:
            new = {"row_factor": self.factors.short, "column_factor": self.factors.long}
        for key, value in new.items():
            if accepted is not None:
                value = torch.where(accepted, value, self._factor(key))
            torch._foreach_copy_([job.state[key] for job in self.jobs], list(value.unbind()))
        self.factors = None


def stack_jobs(
    jobs: Sequence[Job], *, inverse_scale: Tensor | float, weight_decay: float, seed: int
) -> list[tuple[Stack, list[int]]]:
    """Put jobs of one kind together, as many in a stack as a block has room for; with their positions among all.

    Every rank comes to the same stacks: they go by whole shapes.
    """
    kinds: dict[tuple[object, ...], list[int]] = {}
    for position, job in enumerate(jobs):
        whole, cut = tuple(job.shape[axis] for axis in job.order), None
        if job.cut is not None:
            cut = job.order.index(job.cut), job.ranks
        key = (whole, cut, job.parameter.dtype, job.gradient.dtype, job.parameter.device)
        kinds.setdefault(key, []).append(position)
    stacks = []
    for kind, positions in enumerate(kinds.values()):
        first = jobs[positions[0]]
        most = max(1, BLOCK * first.ranks // max(1, first.shape.numel()))
        for start in range(0, len(positions), most):
            chosen = positions[start : start + most]
            stack = Stack(
                [jobs[position] for position in chosen],
                inverse_scale=inverse_scale,
                weight_decay=weight_decay,
                seed=mix64(seed + (kind << 20) + start),
            )
            stacks.append((stack, chosen))
    return stacks


def add_up(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Add tensors of one dtype over the ranks of a group, in place, by one message."""
    message = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(message, group=group)
    parts = torch.split(message, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))


def rates_of(rates: Sequence[float | Tensor], like: Tensor) -> Tensor | float:
    """Return the rates of all jobs, one number where all are the same."""
    if all(rate is rates[0] or (not isinstance(rate, Tensor) and rate == rates[0]) for rate in rates):
        return rates[0].to(like.device, like.dtype) if isinstance(rates[0], Tensor) else float(rates[0])
    parts = [
        rate.to(like.device, like.dtype) if isinstance(rate, Tensor) else torch.full_like(like, rate) for rate in rates
    ]
    return torch.stack(parts)
