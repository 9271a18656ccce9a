"""`backend="compiled"`: the elementwise phases through torch.compile, against the float64 oracle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from celo2 import FusedCelo2, MatrixView
from celo2.backends import compiled
from celo2.reference import MatrixState, matrix_update

# shape and view of a parameter: one matrix, several, and slices of a wider one, which lie apart
PARAMETERS = [
    ((24, 40), MatrixView()),
    ((40, 24), MatrixView()),
    ((17, 33), MatrixView()),
    ((96, 20), MatrixView(split=3, heads=2)),
    ((20, 48), MatrixView(heads=4, axis=1)),
    ((3, 9, 6), MatrixView()),
]


@pytest.mark.parametrize("orthogonalize", [False, True])
def test_steps_equal_the_oracle(random_theta, orthogonalize):
    assert compiled.can_compile()
    theta, gradient = random_theta(), torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(0.1 * torch.randn(shape)) for shape, _ in PARAMETERS]
    groups = [
        {"params": [p], "split": view.split, "heads": view.heads, "axis": view.axis, "rule": "celo2"}
        for p, (_, view) in zip(params, PARAMETERS, strict=True)
    ]
    optimizer = FusedCelo2(groups, lr=1.0, weights=theta, orthogonalize=orthogonalize, backend="compiled")
    tensors = theta.tensors(torch.float64, torch.device("cpu"))
    states: list[MatrixState | None] = [None] * len(params)
    # the second gradient has elements that the rule clips
    for magnitude in (1e-3, 3e3, 1e-2):
        before = [p.detach().double() for p in params]
        for p in params:
            p.grad = magnitude * torch.randn(p.shape, generator=gradient)
        optimizer.step()
        for index, (p, (_, view)) in enumerate(zip(params, PARAMETERS, strict=True)):
            matrices, g = view.matrices(before[index]), view.matrices(p.grad.double())
            state = states[index] or MatrixState.zeros_like(matrices)
            expected, states[index] = matrix_update(tensors, matrices, g, state, orthogonalize=orthogonalize)
            moved = view.matrices(before[index] - p.detach().double())
            tolerance = 2e-3 if orthogonalize else 3e-5
            torch.testing.assert_close(moved, expected, rtol=0, atol=tolerance, msg=lambda text: f"{view}: {text}")  # noqa: B023


def test_it_is_what_steps_and_what_it_cannot_take_goes_through_pytorch(random_theta, monkeypatch):
    steps, original = [], compiled.learned_update
    monkeypatch.setattr(compiled, "learned_update", lambda step: steps.append(step.shape) or original(step))
    params = [torch.nn.Parameter(torch.randn(24, 40)), torch.nn.Parameter(torch.randn(24, 40).bfloat16())]
    params += [torch.nn.Parameter(torch.randn(24, 40).double()), torch.nn.Parameter(torch.randn(7))]
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    theta = random_theta()
    for backend, some in (("compiled", params), ("torch", others)):
        torch.manual_seed(1)
        for p in some:
            p.grad = 1e-3 * torch.randn(p.shape).to(p.dtype)
        # the norm is above: gradients are scaled
        group = {"params": some, "rule": "celo2", "max_grad_norm": 1e-3}
        FusedCelo2([group], lr=1e-2, weights=theta, backend=backend).step()
    assert steps == [(24, 40)]
    for p, other in zip(params, others, strict=True):
        torch.testing.assert_close(p, other, rtol=0, atol=1e-6 if p.dtype == torch.float32 else 0)


def test_without_a_compiler_it_says_so_and_steps_through_pytorch(tmp_path: Path):
    program = """
import logging, torch
logging.basicConfig(level=logging.WARNING)
from celo2 import FusedCelo2
p = torch.nn.Parameter(torch.ones(8, 8))
p.grad = torch.ones(8, 8)
FusedCelo2([p], lr=1e-2, weights="momentum", backend="compiled").step()
print(float((1 - p).mean()))
"""
    environment = os.environ | {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "steps through plain PyTorch: torch.compile fails here" in result.stderr
    assert float(result.stdout) > 0


def test_bfloat16_iterations_are_refused():
    with pytest.raises(ValueError, match="backend='compiled'"):
        FusedCelo2([torch.nn.Parameter(torch.ones(2, 2))], backend="compiled", ns_dtype="bfloat16")
