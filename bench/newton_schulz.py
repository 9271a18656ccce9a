"""How exact Newton-Schulz is: errors of five iterations against float64, by matrix and by form, as a table.

    python bench/newton_schulz.py
    python bench/newton_schulz.py --small      # without the matrices of GPT-3 XL, which take minutes

Runs on a CPU, whose products of 16-bit matrices accumulate in float32 as tensor cores do. Symmetric products are those
of the kernels: one half, mirrored, from 512 rows on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from celo2.newton_schulz import (
    SYMMETRIC_FROM,
    SymmetricProduct,
    _gram_form,
    _standard_form,
    in_best_form,
    product,
    takes_one_program,
)

FLOAT64 = torch.float64
TILE = 128


def noise(m: int, n: int) -> Tensor:
    return torch.randn(m, n, dtype=FLOAT64)


def decades(m: int, n: int, count: float = 3) -> Tensor:
    """Singular values evenly spaced in their logarithms, over so many decades."""
    u, _ = torch.linalg.qr(noise(m, m))
    v, _ = torch.linalg.qr(noise(n, m))
    return (u * torch.logspace(0, -count, m, dtype=FLOAT64)) @ v.mT


def low_rank(m: int, n: int) -> Tensor:
    """Rank 4 and 1 % noise."""
    strong = noise(m, 4) @ noise(4, n) / 2
    return strong + 0.01 * noise(m, n)


def mean(m: int, n: int, size: float = 1) -> Tensor:
    """Noise around a mean: one direction far above the others."""
    return noise(m, n) + size


def mirrored(x: Tensor, y: Tensor, *, low: Tensor | None = None, **options: object) -> Tensor:
    """A symmetric product as the kernel has it: the tiles below the diagonal, twice, and those on it."""
    out = product(x, y, low=low, **options)  # type: ignore[arg-type]
    for part in (out,) if low is None else (out, low):
        for start in range(TILE, part.shape[-1], TILE):
            part[:, :start, start : start + TILE] = part[:, start : start + TILE, :start].mT
    return out


def symmetric_for(x: Tensor) -> SymmetricProduct:
    return mirrored if x.shape[-2] >= SYMMETRIC_FROM else product


def ours(x: Tensor) -> Tensor:
    """As a GPU takes a matrix in float16: small ones always in the Gram form."""
    form = _gram_form if takes_one_program(x.shape[-2], 5) else in_best_form
    return form(x, 5, symmetric_for(x))


def muon(x: Tensor) -> Tensor:
    """What `torch.optim.Muon` does, in bfloat16."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    return _zeropower_via_newtonschulz(x[0], (3.4445, -4.7750, 2.0315), 5, 1e-7)[None]


FORMS: dict[str, tuple[torch.dtype, Callable[[Tensor], Tensor]]] = {
    "torch.optim.Muon": (torch.float32, muon),
    "bfloat16, standard": (torch.bfloat16, lambda x: _standard_form(x, 5, symmetric_for(x))),
    "float16, standard": (torch.float16, lambda x: _standard_form(x, 5, symmetric_for(x))),
    "float16, ours": (torch.float16, ours),
    "float32, ours": (torch.float32, lambda x: in_best_form(x, 5, product)),
}
MATRICES: list[tuple[str, Callable[[], Tensor]]] = [
    ("384 x 1536, three decades", lambda: decades(384, 1536)),
    ("384 x 1536, noise", lambda: noise(384, 1536)),
    ("384 x 1536, noise and mean", lambda: mean(384, 1536)),
    ("128 x 768, three decades", lambda: decades(128, 768)),
    ("128 x 768, rank 4 and 1% noise", lambda: low_rank(128, 768)),
    ("64 x 768 (head of GPT-2 124M), three decades", lambda: decades(64, 768)),
    ("64 x 768, noise and mean", lambda: mean(64, 768, 2)),
    ("768 x 768, three decades", lambda: decades(768, 768)),
    ("768 x 3072 (MLP of GPT-2 124M), three decades", lambda: decades(768, 3072)),
    ("768 x 3072, rank 4 and 1% noise", lambda: low_rank(768, 3072)),
    ("768 x 3072, noise and mean", lambda: mean(768, 3072)),
    ("128 x 2048 (head of GPT-3 XL), three decades", lambda: decades(128, 2048)),
    ("128 x 2048, noise and mean", lambda: mean(128, 2048)),
]
LARGE: list[tuple[str, Callable[[], Tensor]]] = [
    ("2048 x 8192 (MLP of GPT-3 XL), three decades", lambda: decades(2048, 8192)),
    ("2048 x 8192, noise and mean", lambda: mean(2048, 8192)),
]


def errors(d: Tensor) -> list[float]:
    """Norm of each form's error over that of the result; all start from what float16 holds."""
    start = (d / torch.linalg.matrix_norm(d)).half().double()[None]
    start /= torch.linalg.matrix_norm(start)
    exact = _standard_form(start, 5, product)
    norm = torch.linalg.matrix_norm(exact)
    results = (form(start.to(dtype)).double() for dtype, form in FORMS.values())
    return [float(torch.linalg.matrix_norm(result - exact) / norm) for result in results]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="Errors of Newton-Schulz against float64.")
    parser.add_argument("--small", action="store_true", help="leave out the matrices of GPT-3 XL")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    print(f"| matrix | {' | '.join(FORMS)} | ours over bfloat16 |")
    print("|---" * (len(FORMS) + 2) + "|")
    worst = 0.0
    for name, make in MATRICES if arguments.small else [*MATRICES, *LARGE]:
        found = errors(make())
        ratio = found[3] / found[1]
        worst = max(worst, ratio)
        print(f"| {name} | {' | '.join(f'{error:.1e}' for error in found)} | {ratio:.2f} |", flush=True)
    print(f"\nOurs in float16 over bfloat16 in the standard form, at most: {worst:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
