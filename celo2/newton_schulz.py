"""Newton-Schulz orthogonalisation: the five quintic iterations that Celo2 shares with Muon, in two forms.

    A = X X^T        P = a I + b A + c A A        X <- P X

Every iterate is a polynomial of A times X, so the iterations can stay among m x m matrices (the Gram form):

    R = X X^T        Q = I        then        P = a I + b R + c R R,   Q <- P Q,   R <- P R P        and  X <- Q X

Rounding grows in R, so it is formed anew from X after two iterations. The long axis is then touched 4 times in five
iterations instead of 10, and nearly all else is symmetric: half of such a product is enough. In units of m^3 multiply-
adds, with n = r m columns: 7.5 r + 2.5 for the standard form, 3 r + 8 for the Gram form, used from r = 2 on.

What keeps its digits in float16, where a matrix has one direction far above all others (`docs/newton-schulz.md`):
segments of 2 and 3 iterations, not 3 and 2; R P R as P (R P), whose halves mirror each other but for one rounding,
while (R P) P has that of P against R; Q as a whole in a segment of 3; and for such a segment what rounding took from R.
Sources: Celo2 (arXiv 2602.19142); Muon (Keller Jordan, 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

# quintic coefficients of Muon (https://kellerjordan.github.io/posts/muon/), used unchanged by Celo2
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-8
# iterations among m x m matrices before R is formed anew for the first time, and afterwards at most
FIRST_SEGMENT, SEGMENT = 2, 3
# columns over rows from which the Gram form is used: a fifth less work there, more above
GRAM_FROM = 2.0
# rows of a symmetric product computed at once: few enough to skip most of the half above the diagonal, enough for
# matrix products at full speed
STRIP = 128
# rows up to which a GPU takes a matrix whole, in one program
SMALL = 128
# rows from which half of a symmetric product is worth a kernel of our own on a GPU
SYMMETRIC_FROM = 512


class SymmetricProduct(Protocol):
    """X Y, or alpha X Y + beta add, [B, m, m] and known to be symmetric, of X [B, m, k], Y [B, k, m], `add` [B, m, m].

    `diagonal` is added to what lies there; `low`, [B, m, m], is written what rounding took from X Y.
    """

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        add: Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        diagonal: float = 0.0,
        low: Tensor | None = None,
    ) -> Tensor: ...


def newton_schulz(direction: Tensor, steps: int = 5) -> Tensor:
    """Approximately orthogonalise each matrix of `direction`.

    `direction` is `[..., rows, columns]` in float32 or float64, and so is the result (a new tensor, or a transposed
    view of one). Works on the shorter side: a tall matrix is taken transposed. An all-zero matrix stays zero. Not
    differentiable; `celo2.reference` is.
    """
    shape = direction.shape
    x = direction.reshape(-1, *shape[-2:])
    # row by row: a norm over all elements at once is one long float32 sum, which loses digits
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1, keepdim=True), dim=-2, keepdim=True)
    return orthogonalize(x / (norm + EPS), steps).reshape(shape)


def orthogonalize(x: Tensor, steps: int, symmetric: SymmetricProduct | None = None) -> Tensor:
    """Return `x` [B, m, n], of norms of at most 1 and of any dtype, after the iterations, in the form that pays.

    `symmetric` computes symmetric products, by default PyTorch.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.mT, steps, symmetric).mT
    return in_best_form(x, steps, symmetric or product_for(x))


def orthogonalize_part(
    x: Tensor,
    length: int,
    steps: int,
    add_up: Callable[[Tensor], None],
    symmetric: SymmetricProduct | None = None,
    wide_gram: Callable[[Tensor], Tensor] | None = None,
    exact: bool | None = None,
) -> Tensor:
    """Return this rank's columns `x` [B, m, w] of matrices [B, m, length], of norms of at most 1, after the iterations.

    `add_up` adds up a tensor over the ranks that share the matrices, in place; it is called with X X^T, [B, m, m] in
    float32 or wider, as often as `summed_grams` says. `wide_gram` computes that, by default PyTorch. `exact` says
    whether PyTorch leaves products of float32 as they are, by default what it is set to.
    """
    symmetric = symmetric or product_for(x)
    wide = wide_gram or (lambda x: symmetric(x, x.mT) if x.itemsize >= 4 else torch.bmm(x.float(), x.mT.float()))

    def gram(x: Tensor, low: Tensor | None = None) -> Tensor:
        total = wide(x)
        add_up(total)
        rounded = total.to(x.dtype)
        if low is not None:
            low.copy_(total.sub_(rounded))
        return rounded

    form = _gram_form if takes_gram_form(x, length, exact) else _standard_form
    return form(x, steps, symmetric, gram)


def product_for(x: Tensor) -> SymmetricProduct:
    """Return what computes symmetric products of matrices like `x` through PyTorch."""
    return product_by_strips if x.device.type == "cpu" and x.itemsize >= 4 else product


def takes_gram_form(x: Tensor, length: int | None = None, exact: bool | None = None) -> bool:
    """Whether matrices [B, m, n], m <= n, are iterated in the Gram form; of which `x` has some columns of `length`.

    bfloat16 has too few digits for it, and so has a float32 whose products PyTorch may round to fewer
    (`torch.set_float32_matmul_precision`).
    """
    columns = x.shape[-1] if length is None else length
    if columns < GRAM_FROM * x.shape[-2] or x.dtype == torch.bfloat16:
        return False
    if exact is None:
        exact = torch.get_float32_matmul_precision() == "highest"
    return x.dtype != torch.float32 or exact


def segments(steps: int) -> Iterator[int]:
    """Iterate over the numbers of iterations between which R is formed anew: 2 and 3 of five."""
    length = FIRST_SEGMENT
    while steps > 0:
        yield min(length, steps)
        steps, length = steps - length, SEGMENT


def newton_schulz_flops(m: int, n: int, steps: int, parts: int = 1) -> int:
    """Floating-point operations on one matrix on a GPU in float16; half of a large symmetric product is left out.

    Of so many ranks that share it, of the one with most.
    """
    m, n = min(m, n), max(m, n)
    is_gram = n >= GRAM_FROM * m
    if parts > 1:
        n = -(-n // parts)
    elif takes_one_program(m, steps):
        # nothing is left out there, and X after the first segment is computed twice
        m = padded_rows(m)
        return sum(4 * m * m * n + 2 * (4 * k - 3) * m**3 for k in segments(steps)) + 2 * m * m * n
    symmetric = 1 if m >= SYMMETRIC_FROM else 2
    if not is_gram:
        return steps * ((symmetric + 2) * m * m * n + symmetric * m**3)
    # R and Q X; of m x m each P, the two products of the next R, and Q
    of_q = {length: 2 if length > FIRST_SEGMENT else symmetric for length in segments(steps)}
    return sum(
        (symmetric + 2) * m * m * n + (symmetric * k + (k - 1) * (2 * symmetric + of_q[k])) * m**3
        for k in segments(steps)
    )


def summed_grams(m: int, n: int, steps: int) -> int:
    """How often ranks that share a matrix add up their Gram matrices, iterating in float16 or exact float32."""
    return len(list(segments(steps))) if max(m, n) >= GRAM_FROM * min(m, n) else steps


def passes(m: int, n: int, steps: int) -> int:
    """How often a matrix is read or written as a GPU takes it in float16."""
    m, n = min(m, n), max(m, n)
    if takes_one_program(m, steps):
        return 4
    # scaled, written back, and its norm; into the symmetric product, and into and out of the other
    return 5 + (3 * len(list(segments(steps))) if n >= GRAM_FROM * m else 4 * steps)


def takes_one_program(rows: int, steps: int) -> bool:
    """Whether a GPU takes matrices with a shorter side of so many rows whole, a program each."""
    return rows <= SMALL and FIRST_SEGMENT < steps <= FIRST_SEGMENT + SEGMENT


def padded_rows(rows: int) -> int:
    """Return how many rows a program takes for a matrix of so many."""
    return max(16, 1 << (rows - 1).bit_length())


def in_best_form(x: Tensor, steps: int, symmetric: SymmetricProduct) -> Tensor:
    """Return `x` [B, m, n], m <= n, after the iterations, with symmetric products by a function."""
    form = _gram_form if takes_gram_form(x) else _standard_form
    return form(x, steps, symmetric)


class Gram(Protocol):
    """X X^T, [B, m, m] in the dtype of X [B, m, n]; `low`, alike, is written what rounding took from it."""

    def __call__(self, x: Tensor, low: Tensor | None = None) -> Tensor: ...


def _own_gram(symmetric: SymmetricProduct) -> Gram:
    return lambda x, low=None: symmetric(x, x.mT, low=low)


def _standard_form(x: Tensor, steps: int, symmetric: SymmetricProduct, gram: Gram | None = None) -> Tensor:
    a, b, c = COEFFICIENTS
    gram = gram or _own_gram(symmetric)
    for _ in range(steps):
        r = gram(x)
        x = torch.baddbmm(x, symmetric(r, r, alpha=c, add=r, beta=b), x, beta=a)
    return x


def _gram_form(x: Tensor, steps: int, symmetric: SymmetricProduct, gram: Gram | None = None) -> Tensor:
    a, b, c = COEFFICIENTS
    gram = gram or _own_gram(symmetric)
    for length in segments(steps):
        is_long, low = length > FIRST_SEGMENT, None
        if is_long and x.itemsize == 2:
            low = x.new_empty(x.shape[0], x.shape[1], x.shape[1])
        r, q = gram(x, low), None
        for left in reversed(range(length)):
            # polynomials of one R commute: in this order, for rounding leaves no matrix symmetric that is not mirrored
            p = symmetric(r, r, alpha=c, add=r, beta=b, diagonal=a)
            # in a long segment rounding takes too much of the symmetry of P Q
            q = p if q is None else p @ q if is_long else symmetric(p, q)
            if left:
                # P is near a I where R is small, and what rounding took counts
                half = symmetric(r, p) if low is None else symmetric(r, p, add=low, beta=a)
                r, low = symmetric(p, half), None
        assert q is not None
        x = q @ x
    return x


def product(
    x: Tensor,
    y: Tensor,
    *,
    add: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    diagonal: float = 0.0,
    low: Tensor | None = None,
) -> Tensor:
    """Return a symmetric product, computed as a whole."""
    if low is not None:
        wide = torch.bmm(x.float(), y.float())
        out = wide.to(x.dtype)
        low.copy_(wide - out)
        return out
    out = torch.bmm(x, y) if add is None else torch.baddbmm(add, x, y, beta=beta, alpha=alpha)
    if diagonal:
        there = out.diagonal(dim1=-2, dim2=-1)
        # in float16 a CPU would round the number that is added, by as much for all
        there.copy_(there.to(torch.promote_types(out.dtype, torch.float32)) + diagonal)
    return out


def product_by_strips(
    x: Tensor,
    y: Tensor,
    *,
    add: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    diagonal: float = 0.0,
    low: Tensor | None = None,
) -> Tensor:
    """Return a symmetric product in float32 or wider by strips of rows up to the diagonal, mirrored."""
    assert low is None
    m = x.shape[-2]
    if m <= STRIP:
        return product(x, y, add=add, alpha=alpha, beta=beta, diagonal=diagonal)
    out = x.new_empty(x.shape[0], m, m)
    for matrix in range(x.shape[0]):
        left, right, whole = x[matrix], y[matrix], out[matrix]
        for start in range(0, m, STRIP):
            strip, stop = slice(start, start + STRIP), min(start + STRIP, m)
            here = whole[strip, :stop]
            if add is None:
                torch.mm(left[strip], right[:, :stop], out=here)
            else:
                torch.addmm(add[matrix, strip, :stop], left[strip], right[:, :stop], beta=beta, alpha=alpha, out=here)
            whole[:start, strip] = here[:, :start].mT
    if diagonal:
        out.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return out
