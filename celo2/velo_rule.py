"""The rule of VeLO (arXiv 2211.09760, `hyper_v2` of google/learned_optimization) as functions of stacks of tensors.

The loss buffer gives 9 features of the training loss, every tensor 12 of its own, the time 9. An LSTM
over [tensors, 30] gives each tensor a step size, and the weights of an MLP of its own that maps 30 columns of each
element to its step. The rule computes in the dtype of its inputs, float32 or float64.

Shapes: n tensors, t of one shape; a tensor is `rest + (m, n)`, its two largest axes last and the largest at the end
(`axis_order`), or a vector; h units; L the LSTM's width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from celo2.folded import ELEMENT_ROWS, LONG_ROWS, SHORT_ROWS
from celo2.reference import FACTOR_DECAYS, FACTOR_EPS, FEATURE_CLIP, MOMENTUM_DECAYS, SQUARE_EPS
from celo2.state import local

SECOND_MOMENT_DECAY = 0.999
RMS_EPS = 1e-6  # inside rsqrt(v + eps)
FACTOR_COLUMN_EPS = 1e-8  # inside rsqrt(R + eps), rsqrt(C + eps)
COLUMN_EPS = 1e-5  # inside every rsqrt(mean(column^2) + eps)
SCALE_EPS = 1e-9  # floor and summand of mean(p^2)
MLP_MULT = 100.0
EXP_MULT = 1e-3
STEP_MULT = 1e-3
LOSS_DECAYS = 10
# steps before the loss is a feature
LOSS_WARM_UP = 2
FIRST_MINIMUM = 999999999999.0
FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
# sums over a tensor: p^2, m (3), v, m^2 (3), v^2
SUMS = 9

Block = tuple[slice, ...]


@lru_cache(maxsize=256)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers on a device; to copy them there in every step would wait for it."""
    return torch.tensor(values, dtype=dtype, device=device)


def _rows(rows: tuple[int, ...], device: torch.device) -> Tensor:
    return constant(rows, torch.int64, device)


def axis_order(shape: torch.Size, *, linear: bool = False) -> tuple[int, ...]:
    """Return the axes in the order of the rule: the other ones, the second largest, the largest; as is for a vector.

    Of equal axes the later one counts as larger, as in the authors' argsort over [in, out] weights. With `linear`, a
    square matrix is the [out, in] weight of an `nn.Linear`, and its axis 0 counts as larger.
    """
    axes = sorted(range(len(shape)), key=lambda axis: shape[axis])
    if linear and len(shape) == 2 and shape[0] == shape[1]:
        axes.reverse()
    return (*sorted(axes[:-2]), *axes[-2:])


def iterate_blocks(shape: torch.Size, limit: int) -> Iterator[Block]:
    """Cut a tensor into blocks of at most `limit` elements: runs along one axis, of single indices of those before."""
    if not shape.numel():
        return
    for axis in range(len(shape)):
        inner = shape[axis + 1 :].numel()
        if inner <= limit or axis == len(shape) - 1:
            run = max(1, limit // inner)
            for lead in product(*(range(size) for size in shape[:axis])):
                for start in range(0, shape[axis], run):
                    stop = min(start + run, shape[axis])
                    rest = (slice(None),) * (len(shape) - axis - 1)
                    yield (*(slice(index, index + 1) for index in lead), slice(start, stop), *rest)
            return


# the training loss


@dataclass(frozen=True)
class LossDecays:
    """The ten decays exp(-1 / h) of the loss buffer, h from 10 to `num_steps` on a logarithmic scale.

    1 - d^t is -expm1(-t / h): exact where float32 would leave few digits of it, for a long horizon.
    """

    rate: Tensor  # 1 / h, [10]

    @classmethod
    def of(cls, num_steps: int, dtype: torch.dtype, device: torch.device) -> LossDecays:
        last = math.log10(num_steps)
        rates = [10.0 ** -(1 + (last - 1) * index / (LOSS_DECAYS - 1)) for index in range(LOSS_DECAYS)]
        return cls(constant(tuple(rates), dtype, device))

    def complement(self, steps: Tensor | int) -> Tensor:
        """Return 1 - d^steps, [10]."""
        return -torch.expm1(-self.rate * steps)


def advance_loss_buffer(buffer: Tensor, iteration: Tensor, loss: Tensor, decays: LossDecays) -> tuple[Tensor, Tensor]:
    """Return the new loss buffer and its 9 features, [9]; `iteration` 0-d counts the steps before this one.

    A buffer [2, 10] has the running means of the loss and the least that each was, bias taken out.
    """
    means, least = buffer
    largest = (means / decays.complement(iteration + 1)).max()
    # a loss that jumps counts as twice the largest mean
    bounded = torch.where(iteration == 0, loss, torch.minimum(2 * largest.abs(), loss))
    new = decays.complement(1)
    means = means + new * (bounded - means)
    current = means / decays.complement(iteration + 1)
    least = torch.minimum(least, current)
    short, long, floor = current[:-1], current[1:], least[:-1]
    feature = ((short - floor) / (long - floor).clamp_min(1e-8) - 1).clamp(-1, 1)
    return torch.stack([means, least]), torch.where(iteration + 1 <= LOSS_WARM_UP, 0.0, feature)


# features of a tensor


def _log_abs(x: Tensor) -> Tensor:
    return 0.5 * (1e-8 + (10 * x).abs()).log().clamp(-5, 5)


def lstm_features(
    sums: Tensor, sizes: Tensor, ranks: Tensor, iteration: Tensor, num_steps: int, loss_features: Tensor
) -> Tensor:
    """Return what the LSTM reads, [n, 30], of the dtype of `loss_features`.

    `sums` [n, 9] (`SUMS`) are over accumulators before this step, in float64 where there is one: variances are
    differences of their means. `sizes` [n] counts elements, `ranks` [n] axes longer than 1.
    """
    means = sums / sizes[:, None]
    square, m, v, m_square, v_square = torch.split(means, [1, 3, 1, 3, 1], dim=1)
    scale = square.clamp_min(SCALE_EPS).rsqrt()
    var_m = (m_square - m * m).clamp_min(0) * scale * scale
    # of v about the mean of m, as the authors have it
    var_v = ((v_square - v * v).clamp_min(0) + (v - m).square()) * scale * scale
    n, dtype = len(sums), loss_features.dtype
    fractions = constant(FRACTIONS, dtype, sums.device)
    left = torch.tanh(10 * (iteration.to(dtype) / num_steps - fractions))
    parts = [
        left.expand(n, -1),
        loss_features.expand(n, -1),
        _log_abs(v * scale).to(dtype),
        (ranks[:, None] == torch.arange(5, device=ranks.device)).to(dtype),
        _log_abs(var_m).to(dtype),
        _log_abs(var_v).to(dtype),
    ]
    return torch.cat(parts, dim=1)


# the networks


@dataclass(frozen=True)
class Networks:
    """The LSTM's linear maps as (w, b), and the MLPs as one matrix [MLPs, floats of an MLP]."""

    own: tuple[Tensor, Tensor]
    shared: tuple[Tensor, Tensor]
    gates: tuple[Tensor, Tensor]
    controls: tuple[Tensor, Tensor]
    step_size: tuple[Tensor, Tensor]
    mlps: Tensor
    shapes: tuple[tuple[int, ...], ...]  # of one MLP's w0, b0, w1, b1, w2, b2

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor]) -> Networks:
        """Lay out arrays that go by their paths (`VeLOWeights.tensors`)."""

        def linear(name: str) -> tuple[Tensor, Tensor]:
            return arrays[f"rnn_params/{name}/w"], arrays[f"rnn_params/{name}/b"]

        prefix = "ff_mod_stack/~/"
        first = torch.cat([arrays[f"{prefix}w0__{group}"] for group in range(14)], dim=1)
        parts = [first, *(arrays[prefix + name] for name in ("b0", "w1", "b1", "w2", "b2"))]
        return cls(
            own=linear("linear_2"),
            shared=linear("linear_1"),
            gates=linear("rnn/linear"),
            controls=linear("rnn_to_controls"),
            step_size=linear("step_size"),
            mlps=torch.cat([part.flatten(1) for part in parts], dim=1),
            shapes=tuple(tuple(part.shape[1:]) for part in parts),
        )

    def advance(self, features: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return MLP weights [n, floats], step sizes [n], and the LSTM's new hidden and cell state [n, L]."""
        shared = torch.addmm(self.shared[1], features, self.shared[0]).relu().amax(0)
        x = torch.addmm(self.own[1], features, self.own[0]) + shared
        gates = torch.addmm(self.gates[1], torch.cat([x, hidden], dim=1), self.gates[0])
        i, g, f, o = gates.chunk(4, dim=1)
        cell = torch.sigmoid(f + 1) * cell + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        controls = torch.addmm(self.controls[1], hidden, self.controls[0])
        step_size = torch.addmm(self.step_size[1], hidden, self.step_size[0])[:, 0]
        return controls @ self.mlps * (MLP_MULT / len(self.mlps)), step_size, hidden, cell

    def split(self, mlps: Tensor) -> list[Tensor]:
        """Return w0 [t, 30, h], b0 [t, h], w1, b1, w2, b2 of mixed MLPs [t, floats]."""
        sizes = [math.prod(shape) for shape in self.shapes]
        parts = torch.split(mlps, sizes, dim=1)
        return [part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]


# columns of an element


@dataclass(frozen=True)
class Factors:
    """New factored second moments of t tensors: `short` [t, rest, m, 3] and `long` [t, rest, n, 3].

    `short_mean` [t, rest, 1, 3] is the mean of `short` over m. A vector has V [t, n, 3] as `short`, and no `long`.
    """

    short: Tensor
    long: Tensor | None
    short_mean: Tensor | None

    def cut(self, block: Block) -> Factors:
        """Return the part that belongs to a block of the elements."""
        if self.long is None or self.short_mean is None:
            return Factors(self.short[:, *block], None, None)
        *rest, rows, columns = block
        return Factors(self.short[:, *rest, rows], self.long[:, *rest, columns], self.short_mean[:, *rest])

    def scales(self) -> tuple[Tensor, Tensor]:
        """Return what g and m are multiplied by, [t, 3, elements]: rf cf; of a vector about V^-1/2 each."""
        if self.long is None or self.short_mean is None:
            v = self.short.movedim(-1, 1)
            return (v + FACTOR_EPS).clamp_min(FACTOR_EPS).rsqrt(), v.rsqrt()
        rf = (self.short / (self.short_mean + FACTOR_EPS)).clamp_min(FACTOR_EPS).rsqrt()
        cf = self.long.clamp_min(FACTOR_EPS).rsqrt()
        both = rf.movedim(-1, 1)[..., :, None] * cf.movedim(-1, 1)[..., None, :]
        return both, both


def advance_factor(old: Tensor, square_mean: Tensor) -> Tensor:
    """Return the new factor [..., 3], given means of g^2 [...]."""
    decay = constant(FACTOR_DECAYS, old.dtype, old.device)
    rate = constant(tuple(1 - decay for decay in FACTOR_DECAYS), old.dtype, old.device)
    return decay * old + rate * (square_mean[..., None] + SQUARE_EPS)


def element_columns(p: Tensor, g: Tensor, momenta: tuple[Tensor, ...], v: Tensor, factors: Factors) -> Tensor:
    """Return the 18 columns that an element has for itself, [t, 18, elements], in the order of `ELEMENT_ROWS`.

    All are [t, elements]; g is clipped; the accumulators are those before this step; columns 1 to 3 and 16 are the
    new ones.
    """
    x = p.new_empty(len(p), len(ELEMENT_ROWS), *p.shape[1:])
    x[:, 0] = g
    for index, (momentum, decay) in enumerate(zip(momenta, MOMENTUM_DECAYS, strict=True)):
        torch.lerp(momentum, g, 1 - decay, out=x[:, 1 + index])
    torch.mul(v, SECOND_MOMENT_DECAY, out=x[:, 16]).addcmul_(g, g, value=1 - SECOND_MOMENT_DECAY)
    q = torch.add(x[:, 16], RMS_EPS, out=x[:, 17]).rsqrt_()
    torch.mul(x[:, :4], q[:, None], out=x[:, 4:8])
    of_g, of_m = factors.scales()
    torch.mul(of_g, g[:, None], out=x[:, 8:11])
    torch.mul(of_m, x[:, 1:4], out=x[:, 11:14])
    torch.clamp(g, -FEATURE_CLIP, FEATURE_CLIP, out=x[:, 14])
    x[:, 15] = p
    return x


def factor_columns(factor: Tensor) -> Tensor:
    """Return the six columns of a factor [..., 3]: itself, and rsqrt(factor + 1e-8)."""
    return torch.cat([factor, (factor + FACTOR_COLUMN_EPS).rsqrt()], dim=-1)


def column_sums(x: Tensor, factors: Factors, dtype: torch.dtype) -> Tensor:
    """Return sums of squares of all 30 columns over the elements at hand, [t, 30] of `dtype`, in the authors' order."""
    sums = torch.empty(len(x), 30, dtype=dtype, device=x.device)
    rows_of_short, rows_of_long = _rows(SHORT_ROWS, x.device), _rows(LONG_ROWS, x.device)
    sums[:, _rows(ELEMENT_ROWS, x.device)] = x.flatten(2).square().sum(-1, dtype=dtype)
    short = factor_columns(factors.short).flatten(1, -2).square().sum(1, dtype=dtype)
    if factors.long is None:
        sums[:, rows_of_short] = sums[:, rows_of_long] = short
        return sums
    long = factor_columns(factors.long).flatten(1, -2).square().sum(1, dtype=dtype)
    sums[:, rows_of_short] = short * factors.long.shape[-2]
    sums[:, rows_of_long] = long * factors.short.shape[-2]
    return sums


def column_scales(sums: Tensor, size: int) -> Tensor:
    """Return the normalisers [t, 30] of the columns of whole tensors of `size` elements."""
    return (sums / size + COLUMN_EPS).rsqrt()


def directions(x: Tensor, factors: Factors, mlp: list[Tensor], scales: Tensor) -> Tensor:
    """Return o0 exp(1e-3 o1) of the MLP [t, elements], given `Networks.split` and the normalisers [t, 30].

    The normalisers are folded into the first layer, and what depends on an axis only is added by axis.
    """
    w0, b0, w1, b1, w2, b2 = mlp
    w0 = w0 * scales.to(w0.dtype)[..., None]
    of_element, of_short, of_long = (
        w0.index_select(1, _rows(rows, x.device)) for rows in (ELEMENT_ROWS, SHORT_ROWS, LONG_ROWS)
    )
    z = torch.baddbmm(b0[..., None], of_element.mT, x.flatten(2))
    z = z.reshape(*z.shape[:2], *x.shape[2:])
    short = factor_columns(factors.short)
    if factors.long is None:
        z += _by_axis(short, of_short + of_long)
    else:
        z += _by_axis(short, of_short)[..., None]
        z += _by_axis(factor_columns(factors.long), of_long)[..., None, :]
    z = torch.baddbmm(b1[..., None], w1.mT, z.flatten(2).relu_()).relu_()
    # the third output is not used
    out = torch.baddbmm(b2[:, :2, None], w2[..., :2].mT, z)
    return (out[:, 0] * torch.exp(EXP_MULT * out[:, 1])).reshape(len(x), *x.shape[2:])


def _by_axis(columns: Tensor, weights: Tensor) -> Tensor:
    """Return columns [t, ..., 6] times weights [t, 6, h], [t, h, ...]."""
    return torch.bmm(columns.flatten(1, -2), weights).reshape(*columns.shape[:-1], -1).movedim(-1, 1)


def step_scale(step_size: Tensor, square_sum: Tensor, size: Tensor) -> Tensor:
    """Return what a tensor's directions are multiplied by, [n]."""
    return step_size * (square_sum / size + SCALE_EPS).sqrt().to(step_size.dtype) * STEP_MULT


def loss_tensor(loss: Any, buffer: Tensor) -> Tensor:
    """Return the loss, 0-d, on the device and in the dtype of the buffer of losses, the LSTM's."""
    if isinstance(loss, Tensor):
        value = local(loss.detach())
        if value.numel() != 1 or value.is_complex():
            raise ValueError(f"loss of shape {tuple(value.shape)} and {value.dtype}: must be one real number")
        return value.reshape(()).to(buffer.device, buffer.dtype, non_blocking=True)
    try:
        return torch.full((), float(loss), dtype=buffer.dtype, device=buffer.device)
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss={loss!r}: must be a number or a tensor of one element") from error
