from __future__ import annotations

import pytest
import torch

from celo2.newton_schulz import COEFFICIENTS, STRIP, newton_schulz


@pytest.mark.parametrize("shape", [(8, 8), (5, 17), (17, 5), (3, 6, 4), (2, 2, 4, 7), (2, 290, 640)])
def test_equals_the_polynomial_of_the_singular_values(shape):
    d = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(d, full_matrices=False)
    a, b, c = COEFFICIENTS
    s = s / (torch.linalg.vector_norm(d, dim=(-2, -1))[..., None] + 1e-8)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(newton_schulz(d), (u * s[..., None, :]) @ vh, rtol=0, atol=1e-10)
    assert s.min() > 0.3 and s.max() < 1.3


@pytest.mark.parametrize("rows", [STRIP - 1, STRIP, STRIP + 1, 2 * STRIP, 2 * STRIP + 1])
def test_strips_of_symmetric_products_equal_whole_products(rows):
    x = torch.randn(2, rows, rows + 50, dtype=torch.float64)
    x /= torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    expected = x.clone()
    for _ in range(2):
        gram = expected @ expected.mT
        a, b, c = COEFFICIENTS
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    torch.testing.assert_close(newton_schulz(x, steps=2), expected, rtol=0, atol=1e-6)


def test_gradients_flow_through_the_strips():
    x = torch.randn(STRIP + 2, STRIP + 9, dtype=torch.float64, requires_grad=True)
    newton_schulz(x, steps=1).square().sum().backward()
    direction, step = torch.randn_like(x), 1e-4
    with torch.no_grad():
        plus, minus = (newton_schulz(x + sign * step * direction, steps=1).square().sum() for sign in (1, -1))
    torch.testing.assert_close((x.grad * direction).sum(), (plus - minus) / (2 * step), rtol=1e-5, atol=1e-6)


def test_float32_keeps_its_digits_over_many_elements():
    d = torch.randn(256, 1024)
    torch.testing.assert_close(newton_schulz(d).double(), newton_schulz(d.double()), rtol=0, atol=2e-6)


def test_zero_stays_zero_and_the_input_is_untouched():
    d = torch.zeros(4, 3)
    assert torch.equal(newton_schulz(d), d)
    d = torch.randn(4, 3)
    before = d.clone()
    newton_schulz(d)
    assert torch.equal(d, before)


def test_agrees_with_muon():
    from torch.optim import Muon

    parameter = torch.nn.Parameter(torch.zeros(24, 24))
    muon = Muon([parameter], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False)
    parameter.grad = torch.randn(24, 24)
    muon.step()
    ours = newton_schulz(parameter.grad)
    # torch.optim.Muon iterates in bfloat16
    assert torch.linalg.vector_norm(-parameter.detach() - ours) < 0.03 * torch.linalg.vector_norm(ours)
