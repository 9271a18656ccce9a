"""The rule in four phases over blocks that stay in cache: the path that runs on a CPU, in plain PyTorch.

Phase 1 (`gradient_moments`) reads the gradient and gives row and column sums of g^2. Phase 2 (`feature_scales`) gives
the normaliser of each of the 18 per-element columns and writes nothing. Phase 3 (`learned_update`) advances the
accumulators and writes the direction. Phase 4 (`apply_update`) normalises the direction and moves the parameter.

The algebra is exact: the 12 columns that depend on a row or a column only are one vector per row and one per column,
added to the first layer's bias, and the normalisers fold into the first layer. `celo2.reference` is the oracle.

Shapes: B matrices of m rows and n columns, h and k hidden units, a block of b matrices and r rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from celo2.folded import ELEMENT_COLUMNS, FoldedTheta
from celo2.newton_schulz import newton_schulz
from celo2.reference import (
    FACTOR_DECAYS,
    FACTOR_EPS,
    FEATURE_CLIP,
    GRADIENT_CLIP,
    MOMENTUM_DECAYS,
    NORM_EPS,
    RMS_EPS,
    SECOND_MOMENT_DECAY,
    SQUARE_EPS,
    had_gradient,
)
from celo2.stochastic_rounding import mix64, round_stochastically_

# elements of a block: large enough to hide the cost of about 40 calls and to give each thread its share (PyTorch splits
# an operation from 32,768 elements on), small enough for the 34 planes of a block to stay in the last-level cache
BLOCK = 98304
# the statistics of phases 1 and 2 need at most 12 planes, so they take fewer, larger blocks
STATISTICS_BLOCK = 2 * BLOCK

LARGEST_SUM = 3e38

Block = tuple[slice, slice, slice]  # matrices, rows, columns


def iterate_blocks(shape: torch.Size, block: int) -> Iterator[Block]:
    """Cut [B, m, n] into blocks of at most `block` elements: several small matrices, or rows (then columns) of one."""
    batch, m, n = shape
    columns = min(n, block)
    rows = min(m, max(1, block // columns))
    matrices = max(1, block // (m * n))
    for b in range(0, batch, matrices):
        for r in range(0, m, rows):
            for c in range(0, n, columns):
                yield slice(b, min(b + matrices, batch)), slice(r, min(r + rows, m)), slice(c, min(c + columns, n))


class Workspace:
    """Scratch planes for one block and one direction, allocated once and reused by every step."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Return an uninitialised contiguous tensor of `shape`; the next call with the same name reuses its memory."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            # an inference tensor could not be written in a later step outside of inference mode
            with torch.inference_mode(False):
                buffer = self._buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return buffer[:size].view(shape)


@dataclass(frozen=True)
class Matrices:
    """One parameter as B matrices, with its accumulators as views of the optimizer's state.

    `p`, `g`, `momenta` (three) and `v` are [B, m, n]; `row_factor` is [B, m, 3], `column_factor` [B, n, 3]. The factors
    are float32 (float64 for a float64 parameter); the rest may be of lower precision, and accumulators in bfloat16 are
    rounded stochastically.
    """

    p: Tensor
    g: Tensor
    momenta: tuple[Tensor, Tensor, Tensor]
    v: Tensor
    row_factor: Tensor
    column_factor: Tensor


@dataclass(frozen=True)
class GradientMoments:
    """Sums of g^2 over each row [B, m] and column [B, n], and over all elements, of the raw gradient."""

    row_sum: Tensor
    column_sum: Tensor
    total: float


@dataclass(frozen=True)
class Factors:
    """The new factored second moments of the rows [B, r, 3] and columns [B, c, 3] at hand, and of what they are part.

    `shape` is that of the whole matrices; `short_mean` [B, 1, 3] the mean over all of the factor of the shorter axis.
    """

    row: Tensor
    column: Tensor
    shape: tuple[int, int]
    short_mean: Tensor


def has_started(old: Tensor, square_sum: Tensor) -> Tensor:
    """Whether matrices have a gradient now or had one, bool [B, 1, 1], by a whole factor [B, L, 3] and its sums [B, L].

    The factors of those that never had one stay zero (`celo2.reference`).
    """
    return (square_sum.sum(-1)[:, None, None] > 0) | had_gradient(old)


def advance_factor(old: Tensor, square_sum: Tensor, length: int, square_scale: float, started: Tensor) -> Tensor:
    """Return the new factor [B, L, 3], given sums of g^2 [B, L] over an axis of `length` elements."""
    # 1 - decay in float64: of 0.999 in float32 it is off by 1.3e-5
    decay, rate = (
        torch.tensor(values, dtype=old.dtype, device=old.device)
        for values in (FACTOR_DECAYS, [1 - decay for decay in FACTOR_DECAYS])
    )
    new = decay * old + rate * (square_sum[..., None] / length * square_scale + SQUARE_EPS)
    return torch.where(started, new, 0.0)


def within_clip(total: float, scale: float) -> bool:
    """Whether a sum of squares rules out an element of the scaled gradient above the clip of 1000.

    A larger sum than float32 has may have overflowed in a row or a column.
    """
    return total * scale * scale <= GRADIENT_CLIP**2 and total < LARGEST_SUM


def _scaled_gradient(g: Tensor, scale: float, clip: bool, out: Tensor) -> Tensor:
    """Write scale * g, clipped where asked, to `out` and return it; both are [b, r, c]."""
    # widened first: the product of a bfloat16 tensor and a number rounds to bfloat16, whatever the output
    out.copy_(g)
    if scale != 1.0:
        out.mul_(scale)
    return out.clamp_(-GRADIENT_CLIP, GRADIENT_CLIP) if clip else out


def _wide(accumulator: Tensor, out: Tensor) -> Tensor:
    """Return the accumulator, or its values in `out` when it is of lower precision."""
    return accumulator if accumulator.dtype == out.dtype else out.copy_(accumulator)


def gradient_moments(
    g: Tensor, workspace: Workspace, *, scale: float = 1.0, clip: bool = False, block: int = STATISTICS_BLOCK
) -> GradientMoments:
    """Phase 1: row and column sums of g^2 for g [B, m, n]; reads g once.

    With `clip`, of clamp(scale * g, -1000, 1000) instead of g: needed only when an element may exceed the clip, which a
    sum of squares of at most 1e6 rules out.
    """
    batch, m, n = g.shape
    row_sum = torch.zeros(batch, m, dtype=workspace.dtype, device=workspace.device)
    column_sum = torch.zeros(batch, n, dtype=workspace.dtype, device=workspace.device)
    for b, r, c in iterate_blocks(g.shape, block):
        g_block = g[b, r, c]
        square = workspace.take("x", *g_block.shape)
        if clip:
            _scaled_gradient(g_block, scale, clip, out=square).square_()
        elif g_block.dtype == square.dtype:
            torch.mul(g_block, g_block, out=square)
        else:
            square.copy_(g_block).square_()
        row_sum[b, r] += square.sum(-1)
        column_sum[b, c] += square.sum(-2)
    # on the host: Apple's GPUs have no float64
    total = float(row_sum.cpu().sum(dtype=torch.float64))
    return GradientMoments(row_sum, column_sum, total)


class MatrixStep:
    """Phases 2 to 4 for one parameter, given its gradient moments; nothing is written before `learned_update`.

    `scale` multiplies the gradient (loss unscaling and global-norm clipping), then the rule's elementwise clip applies
    where `clip` says that an element may exceed it. `seed` is that of the rounding of bfloat16 accumulators. With
    `factors`, the matrices are parts of larger ones, and `moments` is not read: sums and normalisers over the whole are
    the caller's.
    """

    def __init__(
        self,
        matrices: Matrices,
        moments: GradientMoments | None,
        theta: FoldedTheta,
        workspace: Workspace,
        *,
        factors: Factors | None = None,
        scale: float = 1.0,
        clip: bool = False,
        seed: int = 0,
        block: int = BLOCK,
        statistics_block: int = STATISTICS_BLOCK,
    ) -> None:
        self.seed = seed
        self.matrices, self.theta, self.workspace = matrices, theta, workspace
        self.scale, self.clip = scale, clip
        self.block, self.statistics_block = block, statistics_block
        if factors is None:
            assert moments is not None
            # moments of a clipped gradient are taken after scaling
            square_scale = 1.0 if clip else scale * scale
            m, n = matrices.p.shape[-2:]
            started = has_started(matrices.row_factor, moments.row_sum)
            row = advance_factor(matrices.row_factor, moments.row_sum, n, square_scale, started)
            column = advance_factor(matrices.column_factor, moments.column_sum, m, square_scale, started)
            factors = Factors(row, column, (m, n), (row if m <= n else column).mean(-2, keepdim=True))
        self.row_factor, self.column_factor = factors.row, factors.column
        # what the learned part of the step is multiplied by, [B, 1, 1]: 0 for matrices that never had a gradient
        self.moves = had_gradient(factors.short_mean).to(factors.short_mean.dtype)
        # the shorter axis carries R, the longer one C; a square matrix counts axis 0 as the shorter
        m, n = self.shape = factors.shape
        short, long = (self.row_factor, self.column_factor) if m <= n else (self.column_factor, self.row_factor)
        rf = torch.rsqrt((short / (factors.short_mean + FACTOR_EPS)).clamp_min(FACTOR_EPS))
        cf = torch.rsqrt(long.clamp_min(FACTOR_EPS))
        row_scale, column_scale = (rf, cf) if m <= n else (cf, rf)
        self.row_scale = row_scale.permute(2, 0, 1).contiguous()  # [3, B, m]
        self.column_scale = column_scale.permute(2, 0, 1).contiguous()  # [3, B, n]

    def _features(self, where: Block) -> Tensor:
        """Fill the 18 planes [18, b, r, c] of one block with the columns of the new accumulators, not normalised."""
        b, r, c = where
        source = self.matrices
        x = self.workspace.take("x", ELEMENT_COLUMNS, *source.g[b, r, c].shape)
        momenta, v, q = x[1:4], x[16], x[17]
        g = _scaled_gradient(source.g[b, r, c], self.scale, self.clip, out=x[0])
        for k, decay in enumerate(MOMENTUM_DECAYS):
            torch.lerp(_wide(source.momenta[k][b, r, c], momenta[k]), g, 1 - decay, out=momenta[k])
        old_v = _wide(source.v[b, r, c], v)
        torch.mul(old_v, SECOND_MOMENT_DECAY, out=v).addcmul_(g, g, value=1 - SECOND_MOMENT_DECAY)
        torch.add(v, RMS_EPS, out=q).rsqrt_()
        torch.mul(x[0:4], q, out=x[4:8])
        factors = x[11:14]
        torch.mul(self.row_scale[:, b, r, None], self.column_scale[:, b, None, c], out=factors)
        torch.mul(factors, g, out=x[8:11])
        factors.mul_(momenta)
        torch.clamp(g, -FEATURE_CLIP, FEATURE_CLIP, out=x[14])
        x[15].copy_(source.p[b, r, c])
        return x

    def feature_scales(self) -> Tensor:
        """Phase 2: the normalisers rsqrt(mean(x^2) + 1e-9) of the 18 columns of whole matrices, [18, B]."""
        m, n = self.shape
        return torch.rsqrt(self.feature_sums() / (m * n) + NORM_EPS)

    def feature_sums(self) -> Tensor:
        """Sums of the squares of the 18 columns, [18, B]; reads p, g and accumulators.

        Only squares are formed, so no root is taken: q^2 = 1 / (v + eps), clip(g)^2 = min(g^2, clip^2), and the six
        sums with factors are sum_ij x_ij^2 rf_i^2 cf_j^2, a product of matrices.
        """
        source = self.matrices
        batch = source.p.shape[0]
        row_square, column_square = (scale.square().transpose(0, 1) for scale in (self.row_scale, self.column_scale))
        total = torch.zeros(ELEMENT_COLUMNS, batch, dtype=self.workspace.dtype, device=self.workspace.device)
        for b, r, c in iterate_blocks(source.p.shape, self.statistics_block):
            # [12, b, r, c]: the squares of g m0 m1 m2, of the same four times q, and of clip(g) p v q
            x = self.workspace.take("x", 12, *source.p[b, r, c].shape)
            g = _scaled_gradient(source.g[b, r, c], self.scale, self.clip, out=x[0])
            for k, decay in enumerate(MOMENTUM_DECAYS):
                torch.lerp(_wide(source.momenta[k][b, r, c], x[1 + k]), g, 1 - decay, out=x[1 + k])
            linear = x[0:4].square_()
            torch.lerp(_wide(source.v[b, r, c], x[10]), linear[0], 1 - SECOND_MOMENT_DECAY, out=x[10])
            torch.add(x[10], RMS_EPS, out=x[11]).reciprocal_()
            torch.mul(linear, x[11], out=x[4:8])
            torch.clamp_max(linear[0], FEATURE_CLIP**2, out=x[8])
            x[9].copy_(source.p[b, r, c])
            x[9:11].square_()
            sums = x.flatten(2).sum(-1)
            factored = (torch.matmul(row_square[b, :, r], linear) * column_square[b, :, c]).sum(-1)  # [4, b, 3]
            total[0:8, b] += sums[0:8]
            total[8:11, b] += factored[0].T
            total[11:14, b] += factored[1:4].diagonal(dim1=0, dim2=2).T
            total[14:18, b] += sums[8:12]
        return total

    def vector_scales(self) -> tuple[Tensor, Tensor]:
        """Normalisers [B, 6] of the columns of rows and of columns, of whole matrices."""
        m, n = self.shape
        row, column = vector_sums(self.row_factor), vector_sums(self.column_factor)
        return torch.rsqrt(row / m + NORM_EPS), torch.rsqrt(column / n + NORM_EPS)

    def vector_terms(self, vector_scales: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """What the first layer takes from rows [h, B, m] and from columns [h, B, n], to which the bias is added."""
        theta = self.theta
        rows_are_short = self.shape[0] <= self.shape[1]
        row_weights, column_weights = (theta.short, theta.long) if rows_are_short else (theta.long, theta.short)
        row_scale, column_scale = self.vector_scales() if vector_scales is None else vector_scales
        row_term = _vector_contribution(self.row_factor, row_scale, row_weights)
        column_term = _vector_contribution(self.column_factor, column_scale, column_weights)
        return row_term, column_term.add_(theta.bias0[:, None, None])

    def learned_update(self, scales: Tensor, vector_scales: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Phase 3: write momenta and second moment, return the direction d [B, m, n] (scratch, valid until reused).

        `scales` [18, B] and `vector_scales` (rows and columns, [B, 6] each) are normalisers over the whole matrices.
        """
        source, theta, take = self.matrices, self.theta, self.workspace.take
        batch, m, n = source.p.shape
        row_term, column_term = self.vector_terms(vector_scales)
        direction = take("direction", batch, m, n)
        h, k = theta.element.shape[1], theta.hidden.shape[0]
        for index, where in enumerate(iterate_blocks(source.p.shape, self.block)):
            b, r, c = where
            x = self._features(where)
            for j, accumulator in enumerate((*source.momenta, source.v)):
                seed = mix64(self.seed ^ mix64(4 * index + j)) >> 32 if accumulator.dtype == torch.bfloat16 else 0
                round_stochastically_(accumulator[b, r, c], x[1 + j] if j < 3 else x[16], seed)
            shape = x.shape[1:]
            size = shape.numel()
            if shape[0] == 1:
                first = (theta.element * scales[:, b]).T
            else:
                x.mul_(scales[:, b, None, None])
                first = theta.element.T
            hidden = take("hidden0", h, size)
            torch.add(row_term[:, b, r, None], column_term[:, b, None, c], out=hidden.view(h, *shape))
            hidden.addmm_(first, x.view(ELEMENT_COLUMNS, size)).relu_()
            # a separate bias add: addmm would first broadcast the bias into the output
            hidden = torch.mm(theta.hidden, hidden, out=take("hidden1", k, size)).add_(theta.bias1).relu_()
            output = torch.mm(theta.output, hidden, out=take("output", 1, size))
            torch.add(output.view(shape), theta.bias2, out=direction[b, r, c])
        return direction

    def commit_factors(self) -> None:
        """Write the new factors of whole matrices."""
        self.matrices.row_factor.copy_(self.row_factor)
        self.matrices.column_factor.copy_(self.column_factor)


def _vector_columns(factor: Tensor) -> Tensor:
    """Return F_k and rsqrt(F_k + eps), [B, length, 6], of a factor [B, length, 3]."""
    return torch.cat([factor, torch.rsqrt(factor + RMS_EPS)], dim=-1)


def vector_sums(factor: Tensor) -> Tensor:
    """Sums of the squares, [B, 6], of the six columns that depend on a row or a column only."""
    return _vector_columns(factor).square().sum(-2)


def _vector_contribution(factor: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    """First-layer contribution [h, B, length] of a factor [B, length, 3], given its normalisers [B, 6]."""
    return ((_vector_columns(factor) * scale[:, None]) @ weights).permute(2, 0, 1).contiguous()


def normalise_direction(
    direction: Tensor, moves: Tensor, *, orthogonalize: bool, ns_steps: int
) -> tuple[Tensor, Tensor]:
    """Between phases 3 and 4: Newton-Schulz when asked, and the factor [B, 1, 1] that gives each matrix an RMS of 1.

    It is 0 for matrices that `moves` (`MatrixStep.moves`) keeps where they are.
    """
    if orthogonalize:
        direction = newton_schulz(direction, ns_steps)
    size = direction.shape[-2] * direction.shape[-1]
    # row by row: one float32 sum over all elements loses digits
    norms = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    square = torch.linalg.vector_norm(norms, dim=-2, keepdim=True).square()
    return direction, torch.rsqrt(square / size + NORM_EPS) * moves


def apply_update(p: Tensor, direction: Tensor, rms_scale: Tensor, *, lr: float, weight_decay: float) -> None:
    """Phase 4: p <- p - lr (u + weight_decay p), in place, for p [B, m, n] of the direction's dtype."""
    if weight_decay:
        p.mul_(1 - lr * weight_decay)
    p.addcmul_(direction, rms_scale, value=-lr)
