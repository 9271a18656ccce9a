from __future__ import annotations

import pytest
import torch

from celo2.newton_schulz import COEFFICIENTS, newton_schulz


@pytest.mark.parametrize("shape", [(8, 8), (5, 17), (17, 5), (3, 6, 4), (2, 2, 4, 7)])
def test_equals_the_polynomial_of_the_singular_values(shape):
    d = torch.randn(shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(d, full_matrices=False)
    a, b, c = COEFFICIENTS
    s = s / (torch.linalg.vector_norm(d, dim=(-2, -1))[..., None] + 1e-8)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(newton_schulz(d), (u * s[..., None, :]) @ vh, rtol=0, atol=1e-10)
    assert s.min() > 0.3 and s.max() < 1.3


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
