"""Plans of the kernels: one for each set of gradients, a bounded number of them, in memory that they share."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from torch import nn

import celo2
from celo2 import FusedCelo2, kernel_plans
from celo2.planner import Planner

SHAPES = [(8, 12), (12, 8), (2, 6, 10), (5,)]
# which of them have gradients
A, B = (0, 3), (1, 2)


@pytest.fixture
def built(monkeypatch):
    """An entry for every plan that was begun."""
    plans, original = [], Planner.plan_kernels

    def counted(planner, ranks):
        plans.append(ranks)
        return original(planner, ranks)

    monkeypatch.setattr(Planner, "plan_kernels", counted)
    return plans


def make(device, theta, shapes=SHAPES, **options):
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter((0.05 * torch.randn(shape, generator=generator)).to(device)) for shape in shapes]
    options = {"lr": 1e-2, "weights": theta, "backend": "triton", **options}
    return params, FusedCelo2([{"params": params, "rule": "celo2"}], **options)


def take_step(params, optimizer, step, active, scale=1e-2):
    generator = torch.Generator().manual_seed(100 + step)
    for index, p in enumerate(params):
        gradient = (scale * torch.randn(p.shape, generator=generator)).to(p.device)
        p.grad = gradient if index in active else None
    optimizer.step()


def everything(params, optimizer):
    return [*params, *(value for p in params for value in optimizer.state[p].values())]


@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
def test_alternating_sets_are_planned_once_each(state_dtype, built, device, random_theta, monkeypatch):
    runs = []
    for kept in (1, kernel_plans.KEPT):
        monkeypatch.setattr(kernel_plans, "KEPT", kept)
        built.clear()
        params, optimizer = make(device, random_theta(), state_dtype=state_dtype)
        for step in range(6):
            take_step(params, optimizer, step, B if step % 2 else A)
        assert len(built) == (6 if kept == 1 else 2)
        runs.append(everything(params, optimizer))
    # what a plan does depends on nothing that another has left
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_result_is_that_of_pytorch(built, device, random_theta):
    runs = []
    for backend in ("torch", "triton"):
        params, optimizer = make(device, random_theta(), backend=backend, ns_dtype="auto", max_grad_norm=0.1)
        for step in range(5):
            take_step(params, optimizer, step, (A, B, (0, 1, 2, 3))[step % 3])
        runs.append(params)
    assert len(built) == 3
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 if device.type == "cpu" else 1e-3)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_one_set_is_planned_once(state_dtype, built, device, random_theta):
    params, optimizer = make(device, random_theta(), state_dtype=state_dtype)
    for step in range(4):
        take_step(params, optimizer, step, range(4))
        assert optimizer.state_dict()
    assert len(built) == 1


def test_groups_on_several_devices_are_planned_once(built, random_theta, monkeypatch):
    # meta tensors stand in for another device; nothing of them is read
    monkeypatch.setattr(celo2.planner, "check_gradient", lambda *_: None)
    params = [nn.Parameter(torch.zeros(4, 6, device=device)) for device in ("cpu", "meta")]
    groups = [{"params": [p], "rule": "celo2"} for p in params]
    optimizer = FusedCelo2(groups, weights=random_theta(), backend="auto", state_dtype="int8")
    for step in range(4):
        for p in params:
            p.grad = torch.ones_like(p)
        if step % 2:
            params[1].grad = None
        assert optimizer.planner.take_kernels(None).backend is None
    assert len(built) == 2


def test_the_plan_that_was_not_taken_for_longest_goes(built, device, random_theta, monkeypatch):
    monkeypatch.setattr(kernel_plans, "KEPT", 3)
    params, optimizer = make(device, random_theta())
    for step, active in enumerate([(0,), (1,), (2,), (0,), (3,)]):
        take_step(params, optimizer, step, active)
    assert len(built) == 4 and len(optimizer.planner.kernel_plans.kept) == 3
    for step, active in enumerate([(0,), (2,), (3,)]):
        take_step(params, optimizer, step, active)
    assert len(built) == 4
    take_step(params, optimizer, 0, (1,))
    assert len(built) == 5 and len(optimizer.planner.kernel_plans.kept) == 3


def test_plans_share_their_scratch_memory(built, device, random_theta):
    shapes = [(64, 96), (96, 64), (64, 64)]
    params, optimizer = make(device, random_theta(), shapes)
    # one after the other, the least first: room is made for all at once
    for step, active in enumerate([(2,), (0,), (0, 1), (0, 1, 2)]):
        take_step(params, optimizer, step, active)
    plans = optimizer.planner.kernel_plans.kept
    assert len(plans) == 4
    storages = {
        batch.directions.untyped_storage().data_ptr(): batch.directions.untyped_storage().nbytes()
        for plan in plans
        for batch in plan.backend.batches
    }
    directions = plans[0].backend.batches[0].directions
    assert sum(storages.values()) == sum(p.numel() for p in params) * directions.element_size()


def test_skipped_steps_are_counted_across_plans(built, device, random_theta):
    params, optimizer = make(device, random_theta())
    take_step(params, optimizer, 0, A)
    before = copy.deepcopy(everything(params, optimizer))
    for step, active in enumerate([A, B, A, (0, 1), B]):
        take_step(params, optimizer, step, active, scale=math.nan)
        if step == 2:
            assert optimizer.skipped_steps == 3
    assert optimizer.state_dict()["param_groups"][0]["skipped_steps"] == 5
    assert all(torch.equal(a, b) for a, b in zip(before, everything(params, optimizer), strict=True))
    take_step(params, optimizer, 5, B)
    assert optimizer.skipped_steps == 5 and len(built) == 3
    # a gradient that is refused ends no count
    params[0].grad = torch.zeros_like(params[0]).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    take_step(params, optimizer, 6, A, scale=math.nan)
    assert optimizer.skipped_steps == 6 and len(built) == 4
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    take_step(params, optimizer, 7, B, scale=math.nan)
    assert optimizer.skipped_steps == 7


def test_plans_for_state_that_is_gone_are_not_kept(built, device, random_theta):
    params, optimizer = make(device, random_theta())
    for step in range(2):
        take_step(params, optimizer, step, B if step else A)
    old = optimizer.state[params[0]]
    # as a wrapper does that clears state
    optimizer.state.clear()
    take_step(params, optimizer, 2, (0, 1, 2, 3))
    assert len(optimizer.planner.kernel_plans.kept) == 1
    assert optimizer.state[params[0]] is not old and float(optimizer.state[params[0]]["step"]) == 1
    take_step(params, optimizer, 3, A)
    assert len(optimizer.planner.kernel_plans.kept) == 2
    # other memory of one parameter: the plans that have it go, the others stay
    params[1].data = params[1].data.clone()
    take_step(params, optimizer, 4, (1,))
    assert [bool(plan.signature.memory[1]) for plan in optimizer.planner.kernel_plans.kept] == [True, False]


def test_a_gradient_of_another_layout_is_copied_into_shared_memory(built, device, random_theta):
    params, optimizer = make(device, random_theta(), [(8, 12), (8, 12)], orthogonalize=False)
    expected, plain = make(device, random_theta(), [(8, 12), (8, 12)], orthogonalize=False, backend="torch")
    for step in range(4):
        for chosen, stepper in ((params, optimizer), (expected, plain)):
            active = (0, 1) if step % 2 else (1,)
            generator = torch.Generator().manual_seed(step)
            for index, p in enumerate(chosen):
                gradient = 1e-2 * torch.randn(12, 8, generator=generator).T
                p.grad = gradient.to(device) if index in active else None
            stepper.step()
    assert len(built) == 2
    for a, b in zip(params, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_no_gradient_is_kept_alive(device, random_theta):
    shapes = [(8, 12), (5,), (12, 8), (6, 4)]
    params = [nn.Parameter(torch.ones(shape, device=device)) for shape in shapes]
    # the kernels leave it to PyTorch
    params.append(nn.Parameter(torch.ones(4, 4, dtype=torch.float64, device=device)))
    groups = [{"params": [*params[:2], *params[4:]], "rule": "celo2"}, {"params": params[2:4], "rule": "adamw"}]
    optimizer = FusedCelo2(groups, weights=random_theta(), backend="triton", max_grad_norm=1.0)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        gradients = [weakref.ref(p.grad) for p in params]
        optimizer.zero_grad()
        assert [gradient() for gradient in gradients] == [None] * len(params)
