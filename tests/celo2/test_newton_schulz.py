"""Both forms of Newton-Schulz against the polynomial of the singular values, which float64 gives to ten digits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from celo2 import reference
from celo2.newton_schulz import (
    COEFFICIENTS,
    GRAM_FROM,
    STRIP,
    _gram_form,
    _standard_form,
    in_best_form,
    newton_schulz,
    newton_schulz_flops,
    orthogonalize,
    product,
    product_by_strips,
    takes_gram_form,
    takes_one_program,
)


def polynomial(d: Tensor, steps: int = 5) -> Tensor:
    """What the iterations do, from the singular values."""
    u, s, vh = torch.linalg.svd(d, full_matrices=False)
    a, b, c = COEFFICIENTS
    s = s / (torch.linalg.vector_norm(d, dim=(-2, -1))[..., None] + 1e-8)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ vh


def of_singular_values(m: int, n: int, decades: float) -> Tensor:
    """A matrix whose singular values lie in so many decades, evenly spaced in their logarithms."""
    u, _ = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, m, dtype=torch.float64))
    return (u * torch.logspace(0, -decades, m, dtype=torch.float64)) @ v.mT


def mirrored(x: Tensor, y: Tensor, *, low: Tensor | None = None, **options: Any) -> Tensor:
    """A symmetric product of which one half is computed."""
    out = product(x, y, low=low, **options)
    for half in (out,) if low is None else (out, low):
        half.copy_(half.tril() + half.tril(-1).mT)
    return out


LOW_RANK = torch.randn(128, 4, dtype=torch.float64) @ torch.randn(4, 768, dtype=torch.float64) / 2


@pytest.mark.parametrize(
    "shape", [(8, 8), (5, 17), (17, 5), (1, 1), (1, 9), (9, 1), (3, 6, 4), (2, 2, 4, 7), (2, 290, 640), (140, 150)]
)
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5, 6, 7])
def test_equals_the_polynomial_of_the_singular_values(shape, steps):
    d = torch.randn(shape, dtype=torch.float64)
    result = newton_schulz(d, steps)
    assert result.shape == d.shape
    torch.testing.assert_close(result, polynomial(d, steps), rtol=0, atol=1e-10)


def test_the_oracle_is_the_polynomial_too_and_differentiable():
    d = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(reference._orthogonalize(d, 5), polynomial(d.detach()), rtol=0, atol=1e-12)
    torch.testing.assert_close(reference._orthogonalize(d.mT, 5), polynomial(d.detach()).mT, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: reference._orthogonalize(x, 1), (d,))


def test_the_gram_form_begins_at_twice_as_many_columns():
    assert GRAM_FROM == 2
    assert not takes_gram_form(torch.zeros(1, 64, 127))
    assert takes_gram_form(torch.zeros(1, 64, 128))
    # in which it loses all digits
    assert not takes_gram_form(torch.zeros(1, 64, 640, dtype=torch.bfloat16))


@pytest.mark.parametrize("symmetric", [product, mirrored], ids=["whole", "mirrored"])
@pytest.mark.parametrize(
    "d",
    [
        pytest.param(of_singular_values(128, 768, 3), id="three decades"),
        pytest.param(torch.randn(128, 768, dtype=torch.float64), id="noise"),
        # one direction, or four, far above all others
        pytest.param(torch.randn(96, 192, dtype=torch.float64) + 3, id="noise and mean"),
        pytest.param(torch.randn(64, 768, dtype=torch.float64) + 2, id="wide noise and mean"),
        pytest.param(LOW_RANK + 0.01 * torch.randn(128, 768, dtype=torch.float64), id="rank 4 and noise"),
    ],
)
def test_float16_has_five_times_the_digits_of_bfloat16(d, symmetric):
    x = (d / torch.linalg.matrix_norm(d))[None].half()
    exact = polynomial(x.double())

    def error(result: Tensor) -> float:
        return float(torch.linalg.matrix_norm(result.double() - exact) / torch.linalg.matrix_norm(exact))

    ours = error(_gram_form(x, 5, symmetric))
    before = error(_standard_form(x.bfloat16(), 5, product))
    print(f"{ours:.1e}, bfloat16 {before:.1e}: {ours / before:.2f}")
    assert ours <= 0.21 * before


def test_float32_keeps_its_digits_where_pytorch_may_round_products():
    d = of_singular_values(96, 384, 3).float()
    torch.set_float32_matmul_precision("medium")
    try:
        # as far as a CPU has such products; the Gram form would lose ten times as much
        assert not takes_gram_form(d[None])
        assert takes_gram_form(d[None].double()) and takes_gram_form(d[None].half())
        error = float((newton_schulz(d).double() - polynomial(d.double())).norm() / 96**0.5)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert error < 5e-2


def test_bfloat16_is_near_too():
    d = of_singular_values(96, 384, 3)
    x = (d / d.norm()).bfloat16()[None]
    exact = polynomial(x[0].double())
    assert float((orthogonalize(x, 5)[0] - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize("rows", [STRIP - 1, STRIP, STRIP + 1, 2 * STRIP, 2 * STRIP + 1])
def test_strips_of_symmetric_products_equal_whole_products(rows):
    x = torch.randn(2, rows, 50, dtype=torch.float64)
    gram = x @ x.mT
    for arguments in ((x, x.mT), (gram, gram @ gram)):
        torch.testing.assert_close(product_by_strips(*arguments), product(*arguments))
    options = {"add": gram, "alpha": 2.0, "beta": -3.0, "diagonal": 0.5}
    expected = 2 * gram @ gram - 3 * gram + 0.5 * torch.eye(rows, dtype=torch.float64)
    for symmetric in (product, product_by_strips):
        torch.testing.assert_close(symmetric(gram, gram, **options), expected)


@pytest.mark.parametrize(
    "d",
    [
        pytest.param(torch.randn(256, 1024), id="noise, Gram"),
        pytest.param(torch.randn(300, 300), id="noise, standard"),
        pytest.param(of_singular_values(128, 768, 3).float(), id="three decades, Gram"),
        pytest.param(of_singular_values(128, 200, 3).float(), id="three decades, standard"),
        pytest.param(of_singular_values(96, 384, 6).float(), id="six decades, Gram"),
    ],
)
def test_float32_keeps_its_digits(d):
    for scale in (1.0, 1e-12, 1e12):
        result, exact = newton_schulz(scale * d).double(), newton_schulz((scale * d).double())
        assert float((result - exact).norm() / exact.norm()) < 4e-5


@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (40, 160), (1, 1)])
def test_zero_stays_zero_and_the_input_is_untouched(shape):
    d = torch.zeros(shape)
    assert torch.equal(newton_schulz(d), d)
    d = torch.randn(shape)
    before = d.clone()
    newton_schulz(d)
    assert torch.equal(d, before)


@pytest.mark.parametrize("shape", [(40, 50), (40, 160)])
def test_rank_one(shape):
    d = torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))
    result = newton_schulz(d)
    torch.testing.assert_close(result.double(), newton_schulz(d.double()), rtol=0, atol=1e-5)
    assert 0.6 < float(torch.linalg.matrix_norm(result, 2)) < 1.3


def test_agrees_with_muon():
    from torch.optim import Muon

    parameter = torch.nn.Parameter(torch.zeros(24, 24))
    muon = Muon([parameter], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False)
    parameter.grad = torch.randn(24, 24)
    muon.step()
    ours = newton_schulz(parameter.grad)
    # torch.optim.Muon iterates in bfloat16
    assert torch.linalg.vector_norm(-parameter.detach() - ours) < 0.03 * torch.linalg.vector_norm(ours)


class Counted:
    """Multiply-adds of products: symmetric ones by tiles of 128 up to the diagonal, as the kernel takes them."""

    def __init__(self, symmetric_from: int = 512) -> None:
        self.symmetric_from, self.count = symmetric_from, 0

    def __call__(self, x: Tensor, y: Tensor, *, add=None, alpha=1.0, beta=1.0, diagonal=0.0, low=None) -> Tensor:
        batch, m, inner = x.shape
        tiles = -(-m // 128)
        computed = tiles * (tiles + 1) // 2 * 128**2 if m >= self.symmetric_from else m * m
        self.count += batch * computed * inner
        return x.new_empty(batch, m, m)

    def of(self, form, m: int, n: int) -> int:
        """Multiply-adds of five iterations on one matrix, other products as they are launched."""
        self.count = 0
        with FlopCounterMode(display=False) as others:
            form(torch.empty(1, min(m, n), max(m, n), dtype=torch.float16, device="meta"), 5, self)
        return self.count + others.get_total_flops() // 2


# matrices of a block of GPT-3 XL: query, key, value and output heads, and the MLP's two
XL = [(128, 2048)] * 64 + [(2048, 8192)] * 2


def test_multiply_adds_of_an_xl_step_are_at_most_0_62_of_those_of_the_standard_form():
    standard = sum(Counted().of(_standard_form, m, n) for m, n in XL)
    ours = 0
    for m, n in XL:
        if takes_one_program(m, 5):
            # all products are whole there: 14 of m x m, and five over the columns
            ours += 14 * m**3 + 5 * m * m * n
        else:
            ours += Counted().of(in_best_form, m, n)
    print(f"{ours / standard:.3f} of {standard:.3g} multiply-adds a block")
    assert ours <= 0.62 * standard
    flops = sum(newton_schulz_flops(m, n, 5) for m, n in XL)
    # the model counts halves, the kernel whole tiles on the diagonal
    assert flops == pytest.approx(2 * ours, rel=0.03)


@pytest.mark.parametrize(("m", "n"), [(2048, 8192), (512, 1024), (768, 768), (600, 700)])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7])
def test_the_model_counts_what_is_computed(m, n, steps):
    counted = Counted(symmetric_from=0)
    with FlopCounterMode(display=False) as others:
        in_best_form(torch.empty(1, m, n, dtype=torch.float16, device="meta"), steps, counted)
    tiles = -(-m // 128)
    # as many as there would be without the tiles above the diagonal and half of those on it
    exact = counted.count * m * m // (tiles * (tiles + 1) * 128**2)
    assert newton_schulz_flops(n, m, steps) == pytest.approx(2 * exact + others.get_total_flops(), rel=1e-3)
