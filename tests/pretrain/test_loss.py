"""The loss in chunks: against cross-entropy of all logits in float64, and what it never has in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

from celo2.pretrain import loss as loss_module
from celo2.pretrain.loss import (
    CAPPED_ELEMENT_BYTES,
    CHUNK_BYTES,
    ELEMENT_BYTES,
    IGNORED,
    automatic_chunks,
    cap_logits,
    linear_cross_entropy,
)

TOKENS, WIDTH, ROWS, VOCAB = 23, 8, 40, 37


def inputs(dtype: torch.dtype = torch.float64, bias: bool = True, tokens: int = TOKENS) -> tuple[list[Tensor], Tensor]:
    """Head's input, its weight and bias, and targets of which some are ignored."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, WIDTH), (ROWS, WIDTH), (ROWS,)][: 3 if bias else 2]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    targets_N = torch.randint(VOCAB, (tokens,), generator=generator)
    targets_N[[1, 5, 20]] = IGNORED
    return [tensor.requires_grad_() for tensor in tensors], targets_N


def whole(tensors: list[Tensor], targets_N: Tensor, cap: float | None, reduction: str) -> Tensor:
    logits_NP = F.linear(*tensors)
    logits_NP = logits_NP if cap is None else cap * torch.tanh(torch.asinh(logits_NP / cap))
    return F.cross_entropy(logits_NP[:, :VOCAB], targets_N, reduction=reduction)


def in_chunks(tensors: list[Tensor], targets_N: Tensor, **options: Any) -> Tensor:
    x_ND, weight_PD, bias_P = (*tensors, None)[:3]
    return linear_cross_entropy(x_ND, weight_PD, bias_P, targets_N, vocab_size=VOCAB, **options)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("chunks", "bias", "cap"), [(1, False, None), (4, False, None), (5, True, 3.0), (23, True, None)]
)
def test_it_is_cross_entropy_with_its_gradients(
    chunks: int, bias: bool, cap: float | None, reduction: str, compiled: bool, monkeypatch
) -> None:
    # what a compiler sees, without waiting for one
    monkeypatch.setattr(loss_module, "_compiled", lambda: torch.compile(loss_module.loss_and_gradient, backend="eager"))
    tensors, targets_N = inputs(bias=bias)
    expected = whole(tensors, targets_N, cap, reduction)
    gradients = torch.autograd.grad(expected / 7, tensors)
    found = in_chunks(tensors, targets_N, chunks=chunks, cap=cap, reduction=reduction, compiled=compiled)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    # a mean over micro-batches follows
    for one, other in zip(torch.autograd.grad(found / 7, tensors), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)
    assert not torch.autograd.grad(in_chunks(tensors, targets_N, chunks=chunks, cap=cap), tensors)[1][VOCAB:].any()
    with torch.no_grad():
        found = in_chunks(tensors, targets_N, chunks=chunks, cap=cap, reduction=reduction)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_caps_are_those_of_the_model() -> None:
    z = torch.linspace(-50, 50, 11, dtype=torch.float64)
    torch.testing.assert_close(cap_logits(z, 3.0), 3.0 * torch.tanh(torch.asinh(z / 3.0)))
    assert cap_logits(z.bfloat16(), 3.0).dtype == torch.float32


def test_bfloat16_adds_up_the_gradient_of_the_head_in_float32() -> None:
    """Autocast, as on one GPU, and a head in bfloat16, as fully_shard has it, in as many chunks as tokens."""
    tensors, targets_N = inputs(torch.float32, bias=False, tokens=512)
    exact = [tensor.detach().bfloat16().double().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(whole(exact, targets_N, None, "mean"), exact)
    with torch.autocast("cpu", torch.bfloat16):
        loss = in_chunks(tensors, targets_N, chunks=512)
    assert loss.dtype == torch.float32
    gradients = torch.autograd.grad(loss, tensors)
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 2
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in tensors]
    sharded = torch.autograd.grad(in_chunks(low, targets_N, chunks=512), low)
    assert [gradient.dtype for gradient in sharded] == [torch.bfloat16] * 2
    for found in (gradients, sharded):
        for one, other in zip(found, expected, strict=True):
            # of a sum of 512 terms in bfloat16 it is 3e-2
            assert (one.double() - other).norm() / other.norm() < 5e-3


class Sizes(TorchDispatchMode):
    """Elements of the largest result of an operation, and multiplications of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.multiplications = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() in ("aten::mm", "aten::addmm", "aten::addmm_"):
            self.multiplications += result.numel() * args[-2].shape[1]
        found = [result] if isinstance(result, Tensor) else result if isinstance(result, (tuple, list)) else []
        self.largest = max([self.largest, *(item.numel() for item in found if isinstance(item, Tensor))])
        return result


def test_logits_never_exist_all_at_once_and_nothing_is_computed_again() -> None:
    tensors, targets_N = inputs(bias=False, tokens=512)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with Sizes() as sizes:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = in_chunks(tensors, targets_N, chunks=16)
        loss.backward()
    assert sizes.largest == max(512 * WIDTH, 512 // 16 * ROWS)
    # gradients of the input and of the weight
    assert sorted(kept) == [ROWS * WIDTH, 512 * WIDTH]
    assert sizes.multiplications == 3 * 512 * WIDTH * ROWS
    with Sizes() as sizes:
        whole(tensors, targets_N, None, "mean").backward()
    assert sizes.largest == 512 * ROWS


@pytest.mark.parametrize(("cap", "element"), [(None, ELEMENT_BYTES), (3.0, CAPPED_ELEMENT_BYTES)])
def test_the_memory_that_plans_count(cap: float | None, element: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND, weight_PD = (torch.randn(rows, 16, generator=generator).requires_grad_() for rows in (512, 1000))
    targets_N = torch.randint(990, (512,), generator=generator)
    tracker = MemTracker()
    tracker.track_external(x_ND, weight_PD, targets_N)
    with tracker:
        loss = linear_cross_entropy(x_ND, weight_PD, None, targets_N, chunks=4, vocab_size=990, cap=cap)
    kept = sum(2 * tensor.nbytes for tensor in (x_ND, weight_PD)) + targets_N.nbytes + loss.nbytes
    (peak,) = (kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())
    assert peak - kept == pytest.approx(128 * 1000 * element, rel=0.02)


def test_its_gradient_is_there_once() -> None:
    tensors, targets_N = inputs()
    loss = in_chunks(tensors, targets_N, chunks=2)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_chunks_keep_logits_small_and_no_smaller() -> None:
    assert automatic_chunks(256, 257) == 1
    for tokens, rows in ((16_384, 50_304), (65_536, 50_304), (CHUNK_BYTES // 4, 1), (CHUNK_BYTES // 4 + 1, 1)):
        chunks = automatic_chunks(tokens, rows)
        assert 4 * tokens * rows <= chunks * CHUNK_BYTES < 4 * tokens * rows + CHUNK_BYTES
