"""The folded, chunked phases against the unfolded oracle."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from celo2 import phases
from celo2.folded import FoldedTheta
from celo2.reference import MatrixState, matrix_update

CPU = torch.device("cpu")
SHAPES = [(1, 7, 7), (1, 16, 40), (1, 40, 16), (5, 6, 9), (3, 9, 6), (1, 1, 13), (1, 13, 1), (1, 1, 1), (2, 63, 65)]


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype) -> phases.Matrices:
    batch, m, n = shape

    def zeros(*size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype)

    return phases.Matrices(
        zeros(*shape), zeros(*shape), (zeros(*shape), zeros(*shape), zeros(*shape)), zeros(*shape), zeros(batch, m, 3),
        zeros(batch, n, 3),
    )  # fmt: skip


def _run(matrices, theta, block, *, scale=1.0, clip=False, dtype=torch.float64):
    # NaN-poisoned scratch: anything read before it is written shows
    workspace = phases.Workspace(dtype, CPU)
    for name in ("x", "direction", "hidden0", "hidden1", "output"):
        workspace.take(name, 100_000).fill_(torch.nan)
    folded = FoldedTheta.from_theta(theta, dtype, CPU)
    moments = phases.gradient_moments(matrices.g, workspace, scale=scale, clip=clip, block=block)
    step = phases.MatrixStep(
        matrices, moments, folded, workspace, scale=scale, clip=clip, block=block, statistics_block=block
    )
    direction = step.learned_update(step.feature_scales())
    step.commit_factors()
    direction, rms_scale = phases.normalise_direction(direction, step.moves, orthogonalize=False, ns_steps=5)
    return direction * rms_scale


@pytest.mark.parametrize("block", [1, 5, 64, 1000, 98304])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_folded_equals_unfolded_for_every_block_size(shape, block, random_theta):
    if block == 1 and shape == (2, 63, 65):
        block = 17  # one element a block is the same code on the small shapes, and slow here
    theta = random_theta()
    tensors = theta.tensors(torch.float64, CPU)
    matrices = _zeros(shape, torch.float64)
    state = MatrixState.zeros_like(matrices.p)
    for magnitude in (1e-6, 1.0, 1e-3):
        matrices.p.copy_(torch.randn(shape, dtype=torch.float64))
        matrices.g.copy_(magnitude * torch.randn(shape, dtype=torch.float64))
        expected, state = matrix_update(tensors, matrices.p, matrices.g, state, orthogonalize=False)
        update = _run(matrices, theta, block)
        torch.testing.assert_close(update, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(torch.stack(matrices.momenta, -1), state.momentum, rtol=1e-12, atol=0)
    torch.testing.assert_close(matrices.v, state.second_moment, rtol=1e-12, atol=0)
    torch.testing.assert_close(matrices.row_factor, state.row_factor, rtol=1e-12, atol=0)
    torch.testing.assert_close(matrices.column_factor, state.column_factor, rtol=1e-12, atol=0)


def test_other_hidden_sizes(random_theta):
    theta = random_theta(hidden=5, hidden2=3)
    matrices = _zeros((2, 9, 6), torch.float64)
    matrices.g.copy_(torch.randn(2, 9, 6))
    state = MatrixState.zeros_like(matrices.p)
    expected, _ = matrix_update(theta.tensors(torch.float64, CPU), matrices.p, matrices.g, state, orthogonalize=False)
    torch.testing.assert_close(_run(matrices, theta, 30), expected, rtol=0, atol=1e-11)


def test_scale_and_clip_equal_a_scaled_gradient(random_theta):
    theta = random_theta()
    matrices, scaled = _zeros((1, 8, 12), torch.float64), _zeros((1, 8, 12), torch.float64)
    matrices.g.copy_(5000 * torch.randn(1, 8, 12))
    scaled.g.copy_(matrices.g * 0.5)
    assert scaled.g.abs().max() > 1000
    state = MatrixState.zeros_like(scaled.p)
    expected, _ = matrix_update(theta.tensors(torch.float64, CPU), scaled.p, scaled.g, state, orthogonalize=False)
    update = _run(matrices, theta, 40, scale=0.5, clip=True)
    torch.testing.assert_close(update, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("magnitude", [1e-6, 1e-4, 1e-2])
def test_float32_statistics_keep_their_digits_over_many_elements(magnitude, random_theta):
    # a plain float32 sum over 300,000 elements was off by 1e-5 of itself, and the update by 6e-5
    theta, shape = random_theta(), (1, 512, 600)
    matrices, exact = _zeros(shape, torch.float32), _zeros(shape, torch.float64)
    for _ in range(3):
        matrices.p.copy_(0.02 * torch.randn(shape))
        matrices.g.copy_(magnitude * torch.randn(shape))
        exact.p.copy_(matrices.p)
        exact.g.copy_(matrices.g)
        update = _run(matrices, theta, phases.BLOCK, dtype=torch.float32)
        torch.testing.assert_close(update.double(), _run(exact, theta, phases.BLOCK), rtol=0, atol=1e-5)


@pytest.mark.parametrize("clip", [False, True])
def test_a_bfloat16_gradient_is_scaled_in_float32(clip, random_theta):
    narrow, wide = _zeros((1, 8, 12), torch.float32), _zeros((1, 8, 12), torch.float32)
    wide.g.copy_(torch.randn(1, 8, 12).bfloat16())
    narrow = dataclasses.replace(narrow, g=wide.g.bfloat16())
    theta = random_theta()
    updates = [_run(matrices, theta, 40, scale=0.3, clip=clip, dtype=torch.float32) for matrices in (narrow, wide)]
    assert torch.equal(*updates)
    assert torch.equal(narrow.v, wide.v)


def test_statistics_phases_write_nothing(random_theta):
    matrices = _zeros((2, 9, 6), torch.float32)
    for tensor in (matrices.p, matrices.g, *matrices.momenta, matrices.v, matrices.row_factor, matrices.column_factor):
        tensor.uniform_(0.1, 1)
    everything = [matrices.p, matrices.g, *matrices.momenta, matrices.v, matrices.row_factor, matrices.column_factor]
    before = [tensor.clone() for tensor in everything]
    workspace = phases.Workspace(torch.float32, CPU)
    folded = FoldedTheta.from_theta(random_theta(), torch.float32, CPU)
    moments = phases.gradient_moments(matrices.g, workspace)
    phases.MatrixStep(matrices, moments, folded, workspace).feature_scales()
    assert all(torch.equal(tensor, old) for tensor, old in zip(everything, before, strict=True))


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 10, 100), (2, 1, 1000), (7, 1, 1)])
@pytest.mark.parametrize("block", [1, 7, 50, 10_000])
def test_blocks_cover_every_element_once(shape, block):
    count = torch.zeros(shape, dtype=torch.int32)
    for where in phases.iterate_blocks(count.shape, block):
        count[where] += 1
        assert count[where].numel() <= max(block, 1)
    assert torch.equal(count, torch.ones_like(count))
