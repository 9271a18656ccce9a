"""What makes a plan of the kernels invalid is seen by the cheap look as by the full signature; no kernel runs here."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from celo2 import FusedCelo2
from celo2.kernel_plans import Signature, Watch


def transposed_gradient(optimizer, p):
    p.grad = torch.ones(p.shape[::-1]).T


def gradient_in_place_of_another(optimizer, p):
    # the same memory in another order
    p.grad = torch.as_strided(p.grad.detach(), p.shape, (1, p.shape[0]))


def gradient_of_another_dtype(optimizer, p):
    p.grad = None
    p.grad_dtype = torch.bfloat16
    p.grad = torch.ones(p.shape, dtype=torch.bfloat16)


def gradient_of_another_alignment(optimizer, p):
    storage = torch.ones(p.numel() + 1)
    p.grad = storage[1:].view(p.shape)


def no_gradient(optimizer, p):
    p.grad = None


def sparse_gradient(optimizer, p):
    p.grad = torch.ones_like(p).to_sparse()


def moved_parameter(optimizer, p):
    p.data = p.data.clone()


def replaced_state(optimizer, p):
    optimizer.state[p]["momentum_slow"] = optimizer.state[p]["momentum_slow"].clone()


def moved_state(optimizer, p):
    for value in optimizer.state[p].values():
        value.data = value.data.clone()


def cleared_state(optimizer, p):
    optimizer.state.clear()
    optimizer.planner.follow_groups()


def other_options(optimizer, p):
    optimizer.param_groups[0]["ns_steps"] = 3


@pytest.mark.parametrize(
    "change",
    [
        transposed_gradient,
        gradient_in_place_of_another,
        gradient_of_another_dtype,
        gradient_of_another_alignment,
        no_gradient,
        sparse_gradient,
        moved_parameter,
        replaced_state,
        moved_state,
        cleared_state,
        other_options,
    ],
)
def test_what_changes_is_seen(change):
    if change is gradient_of_another_dtype and not hasattr(nn.Parameter, "grad_dtype"):
        pytest.skip("gradients have the dtype of their parameters")
    params = [nn.Parameter(torch.ones(6, 4)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = FusedCelo2([{"params": params, "rule": "celo2"}], weights="momentum")
    optimizer.planner.follow_groups()
    watch = Watch(optimizer.param_groups, optimizer.state)
    before = Signature.of(optimizer.param_groups, optimizer.state, zero1=False)
    assert watch.unchanged() and watch.unchanged()
    change(optimizer, params[1])
    assert not watch.unchanged()
    assert Signature.of(optimizer.param_groups, optimizer.state, zero1=False) != before


def test_a_slot_has_the_limit_of_now():
    p = nn.Parameter(torch.ones(6, 4))
    optimizer = FusedCelo2([{"params": [p], "rule": "celo2"}], weights="momentum")
    slot = optimizer.planner.parameters.slot(p, None)
    assert slot.clips
    optimizer.param_groups[0]["max_grad_norm"] = 0.5
    assert slot.max_grad_norm == 0.5 and not slot.clips


def test_values_do_not_matter():
    p = nn.Parameter(torch.ones(6, 4))
    p.grad = torch.ones_like(p)
    optimizer = FusedCelo2([{"params": [p], "rule": "celo2"}], weights="momentum")
    optimizer.planner.follow_groups()
    watch = Watch(optimizer.param_groups, optimizer.state)
    with torch.no_grad():
        for tensor in (p, p.grad, *optimizer.state[p].values()):
            tensor.add_(1)
    optimizer.param_groups[0]["lr"] = 0.5
    # another tensor in the same memory, and one elsewhere: the kernels' tables follow gradients
    p.grad = p.grad.detach()
    assert watch.unchanged()
    kept, p.grad = p.grad, torch.ones_like(p)
    assert p.grad.data_ptr() != kept.data_ptr() and watch.unchanged()
