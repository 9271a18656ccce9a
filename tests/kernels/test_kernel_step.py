"""`FusedCelo2(backend="triton")` against the float64 oracle and the plain path: shapes, dtypes, clipping, skipping."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from celo2 import FusedCelo2, Theta
from celo2.matrices import MatrixView
from celo2.planner import Planner
from celo2.reference import MatrixState, VectorState, matrix_update, vector_update
from celo2.state import read_momenta

# several matrices, several tiles each way, masked tails, tall, wide, square, single rows and columns
SHAPES = [(70, 128), (128, 70), (96, 96), (2, 64, 192), (130, 33), (1, 70), (70, 1), (1, 1), (3, 5, 7), (9,), (1,), ()]


def parameters(shapes, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(device, dtype)) for shape in shapes]


def set_gradients(params, step, scale=1e-3, dtype=None):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.device, dtype or p.dtype)


def build(params, theta, **options):
    # the precision of the plain path; a GPU would take bfloat16 for Newton-Schulz
    exact = {"orthogonalize": False, "backend": "triton", "ns_dtype": "float32"}
    options = {"lr": 1.0, "weights": theta, **exact, **options}
    return FusedCelo2([{"params": params, "rule": "celo2"}], **options)


class Oracle:
    """The unfolded rule in float64 for one parameter."""

    def __init__(self, p, theta, orthogonalize=False):
        self.orthogonalize = orthogonalize
        self.theta = theta.tensors(torch.float64, torch.device("cpu"))
        flat = self._view(p)
        self.state = VectorState.zeros_like(flat) if p.ndim < 2 else MatrixState.zeros_like(flat)

    def _view(self, tensor):
        wide = tensor.detach().cpu().double()
        return wide.reshape(-1) if tensor.ndim < 2 else wide

    def update(self, p, g):
        p_wide, g_wide = self._view(p), self._view(g)
        if p.ndim < 2:
            u, self.state = vector_update(self.theta, p_wide, g_wide, self.state)
        else:
            u, self.state = matrix_update(self.theta, p_wide, g_wide, self.state, orthogonalize=self.orthogonalize)
        return u.reshape(p.shape)


@pytest.mark.parametrize("columns", [64, 128])
def test_updates_and_state_equal_the_oracle(columns, device, gpu_blocks, random_theta):
    gpu_blocks(columns)
    theta, params = random_theta(), parameters(SHAPES, device)
    oracles = [Oracle(p, theta) for p in params]
    optimizer = build(params, theta)
    for step in range(2):
        set_gradients(params, step, scale=(1e-3, 1e-6)[step])
        before = [p.detach().cpu().double() for p in params]
        optimizer.step()
        for p, old, oracle in zip(params, before, oracles, strict=True):
            expected = oracle.update(old, p.grad)
            torch.testing.assert_close(old - p.detach().cpu(), expected, rtol=0, atol=2e-5, msg=str(p.shape))
    for p, oracle in zip(params, oracles, strict=True):
        state = optimizer.state[p]
        for index, name in enumerate(("fast", "medium", "slow")):
            momentum = oracle.state.momentum[..., index].reshape(p.shape)
            torch.testing.assert_close(state[f"momentum_{name}"].cpu().double(), momentum, rtol=1e-4, atol=1e-12)
        second = oracle.state.second_moment.reshape(p.shape)
        torch.testing.assert_close(state["second_moment"].cpu().double(), second, rtol=1e-4, atol=1e-15)
        if p.ndim > 1:
            for name in ("row_factor", "column_factor"):
                expected = getattr(oracle.state, name).reshape(state[name].shape)
                torch.testing.assert_close(state[name].cpu().double(), expected, rtol=1e-4, atol=1e-15)
        assert float(state["step"]) == 2


@pytest.mark.parametrize(("hidden", "hidden2"), [(1, 1), (5, 3), (16, 16)])
def test_any_hidden_size(hidden, hidden2, device, gpu_blocks, random_theta):
    gpu_blocks()
    theta, params = random_theta(hidden=hidden, hidden2=hidden2), parameters([(70, 64), (5,)], device)
    oracles = [Oracle(p, theta) for p in params]
    optimizer = build(params, theta)
    set_gradients(params, 0)
    before = [p.detach().cpu().double() for p in params]
    optimizer.step()
    for p, old, oracle in zip(params, before, oracles, strict=True):
        torch.testing.assert_close(old - p.detach().cpu(), oracle.update(old, p.grad), rtol=0, atol=2e-5)


@pytest.mark.parametrize("orthogonalize", [False, True])
@pytest.mark.parametrize("limit", [None, 0.3, 1e9])
def test_equals_the_plain_path_with_decay_clipping_and_groups(limit, orthogonalize, device, random_theta):
    theta, shapes = random_theta(), [(70, 128), (40, 9), (2, 33, 20), (11,)]
    results = []
    for backend in ("torch", "triton"):
        params = parameters([*shapes, (6, 8), (7,)], device)
        optimizer = FusedCelo2(
            [
                {"params": params[:2], "rule": "celo2"},
                {"params": params[2:4], "rule": "celo2", "lr": 3e-3, "weight_decay": 0.0, "max_grad_norm": None},
                {"params": params[4:], "rule": "adamw"},
            ],
            lr=1e-2,
            weights=theta,
            weight_decay=0.1,
            max_grad_norm=limit if limit != 1e9 else 999.0,
            orthogonalize=orthogonalize,
            backend=backend,
            ns_dtype="float32",
        )
        for step in range(2):
            set_gradients(params, step, scale=0.05)
            optimizer.step()
        results.append((params, optimizer.grad_norm))
    (plain, plain_norm), (kernels, norm) = results
    assert float(norm) == pytest.approx(float(plain_norm), rel=1e-6)
    for a, b in zip(plain, kernels, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-7, msg=str(a.shape))


@pytest.mark.parametrize(("ns_dtype", "limit"), [("float16", 6e-3), ("bfloat16", 3e-2)])
def test_directions_of_16_bits_are_near_the_oracle(ns_dtype, limit, device, random_theta):
    """Directions rounded to float16, a GPU's default, or bfloat16, which Newton-Schulz amplifies."""
    theta = random_theta()
    params = parameters([(96, 192), (192, 96), (2, 64, 128), (70, 130)], device)
    oracles = [Oracle(p, theta, orthogonalize=True) for p in params]
    optimizer = build(params, theta, orthogonalize=True, ns_dtype=ns_dtype)
    for step in range(2):
        set_gradients(params, step)
        before = [p.detach().cpu().double() for p in params]
        optimizer.step()
        for p, old, oracle in zip(params, before, oracles, strict=True):
            error = (old - p.detach().cpu() - oracle.update(old, p.grad)).square().mean().sqrt()
            print(tuple(p.shape), f"{float(error):.1e}")
            # of an update whose RMS is 1; float32 would be below 1e-5
            assert 1e-4 < float(error) < limit


@pytest.mark.parametrize("power", [-30, 30])
def test_a_thetas_scale_makes_no_difference_in_float16(power, device, random_theta):
    """Its directions would all be zero, or beyond the range."""
    theta = random_theta()
    last = {name: theta.arrays[name] * np.float32(2.0**power) for name in ("w2", "b2")}
    scaled = Theta.from_arrays({**theta.arrays, **last}, theta.card)
    found = []
    for weights in (theta, scaled):
        params = parameters([(96, 192), (2, 64, 128)], device)
        optimizer = build(params, weights, orthogonalize=True, ns_dtype="float16")
        set_gradients(params, 0)
        optimizer.step()
        found.append(params)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_options_of_newton_schulz_are_checked(random_theta):
    p = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="ns_dtype='float8', allowed: auto, float16, bfloat16, float32"):
        FusedCelo2([p], ns_dtype="float8")
    with pytest.raises(ValueError, match="ns_dtype='bfloat16' with backend='torch'"):
        FusedCelo2([p], ns_dtype="bfloat16", backend="torch")
    assert copy.deepcopy(FusedCelo2([p], ns_dtype="float32")).ns_dtype == "float32"


@pytest.mark.parametrize("limit", [None, 5.0])
def test_gradients_above_the_rules_clip(limit, device, random_theta):
    results = []
    for backend in ("torch", "triton"):
        params = parameters([(70, 64), (6,)], device)
        optimizer = build(params, random_theta(), lr=1e-2, max_grad_norm=limit, backend=backend)
        set_gradients(params, 0, scale=2e3)
        assert float(params[0].grad.abs().max()) > 1000
        optimizer.step()
        results.append([*params, *(optimizer.state[p]["second_moment"] for p in params)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


def snapshot(optimizer):
    return copy.deepcopy(
        [[p.detach(), optimizer.state[p]] for group in optimizer.param_groups for p in group["params"]]
    )


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", [0, 1, 2, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_with_a_gradient_that_is_not_finite_changes_no_byte(value, where, dtype, device, random_theta):
    params = parameters([(40, 64), (3, 4, 5), (7,), (6, 8)], device, dtype)
    optimizer = FusedCelo2(
        [{"params": params[:3], "rule": "celo2"}, {"params": params[3:], "rule": "adamw"}],
        weights=random_theta(),
        backend="triton",
        state_dtype="bfloat16",
    )
    set_gradients(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    set_gradients(params, 1)
    params[where].grad.view(-1)[-1] = value
    optimizer.step()
    assert equal(snapshot(optimizer), before)
    assert optimizer.skipped_steps == 1 and not math.isfinite(float(optimizer.grad_norm))
    assert {group["skipped_steps"] for group in optimizer.state_dict()["param_groups"]} == {1}
    set_gradients(params, 2)
    optimizer.step()
    assert optimizer.skipped_steps == 1 and not equal(snapshot(optimizer), before)


def test_grad_scale_and_found_inf(device, random_theta):
    results = []
    for scale in (1.0, 1024.0):
        params = parameters([(40, 64), (9,), (6, 8)], device)
        optimizer = FusedCelo2(
            [{"params": params[:2], "rule": "celo2"}, {"params": params[2:], "rule": "adamw"}],
            weights=random_theta(),
            backend="triton",
        )
        if scale != 1:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor([0.0])
        set_gradients(params, 0, scale=scale * 1e-3)
        optimizer.step()
        results.append(params)
        before = snapshot(optimizer)
        optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()
        assert equal(snapshot(optimizer), before) and optimizer.skipped_steps == 1
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("orthogonalize", [False, True])
def test_bitwise_equal_in_two_runs_and_in_any_order(orthogonalize, device, gpu_blocks, random_theta):
    gpu_blocks()
    shapes = [(70, 64), (64, 70), (70, 64), (33, 65), (5,), (128, 64)]
    results = []
    for order in (range(6), range(6), (4, 2, 5, 0, 3, 1)):
        params = parameters(shapes, device)
        optimizer = build(
            [params[i] for i in order],
            random_theta(),
            lr=1e-2,
            max_grad_norm=0.05,
            orthogonalize=orthogonalize,
            ns_dtype="auto",
        )
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
        results.append([(p.detach(), dict(optimizer.state[p])) for p in params])
    assert equal(results[0], results[1]) and equal(results[0], results[2])


@pytest.mark.parametrize("orthogonalize", [False, True])
def test_one_bad_layout_after_another(orthogonalize, device, random_theta):
    """Transposed, row-strided and expanded storage of parameters and gradients equal the contiguous ones."""
    theta = random_theta()
    generator = torch.Generator().manual_seed(3)
    value = 0.02 * torch.randn(40, 64, generator=generator)
    gradients = [1e-3 * torch.randn(40, 64, generator=generator) for _ in range(2)]
    layouts = {
        "contiguous": (lambda x: x.clone(), lambda x: x.clone()),
        "transposed": (lambda x: x.t().contiguous().t(), lambda x: x.t().contiguous().t()),
        "transposed parameter": (lambda x: x.t().contiguous().t(), lambda x: x.clone()),
        "transposed gradient": (lambda x: x.clone(), lambda x: x.t().contiguous().t()),
        "rows apart": (lambda x: torch.cat([x, x + 1], 1)[:, :64], lambda x: torch.cat([x, x], 1)[:, 64:]),
        "every second element": (lambda x: torch.stack([x, x], -1)[..., 0], lambda x: x.clone()),
        "odd address": (
            lambda x: torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(40, 64),
            lambda x: torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(40, 64),
        ),
    }
    results = {}
    for name, (store, store_gradient) in layouts.items():
        p = nn.Parameter(store(value.to(device)))
        optimizer = build([p], theta, lr=1e-2, orthogonalize=orthogonalize)
        for gradient in gradients:
            p.grad = store_gradient(gradient.to(device))
            optimizer.step()
        results[name] = p.detach().contiguous()
        if name == "every second element":
            assert "contiguous along no axis" in optimizer.planner.kernels.refused[p]
    for name, result in results.items():
        # Newton-Schulz in float32 is off by 3e-5 of its unit, and a step has a hundredth of that
        torch.testing.assert_close(result, results["contiguous"], rtol=0, atol=1e-6, msg=lambda text, n=name: n + text)


def test_views_split_a_parameter_into_its_matrices(device, random_theta):
    results = []
    for backend in ("torch", "triton"):
        params = parameters([(3 * 2 * 8, 40), (40, 128), (16, 3, 5, 5)], device)
        optimizer = FusedCelo2(
            [
                {"params": params[:1], "split": 3, "heads": 2},
                {"params": params[1:2], "heads": 2, "axis": 1},
                {"params": params[2:], "flatten": True},
            ],
            lr=1e-2,
            weights=random_theta(),
            backend=backend,
            ns_dtype="float32",
        )
        set_gradients(params, 0)
        optimizer.step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_equals_the_wide_rule_rounded(dtype, gradient, device, random_theta):
    shapes = [(40, 64), (9, 5), (7,)]
    params = parameters(shapes, device, dtype)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    set_gradients(params, 0)
    if gradient != dtype:
        # torch ties a gradient's dtype to its parameter's
        for p in params:
            value = p.grad.to(gradient)
            p.grad = None
            p.grad_dtype = None
            p.grad = value
    for p, w in zip(params, wide, strict=True):
        w.grad = p.grad.float()
    before = [p.detach().float().clone() for p in params]
    for chosen in (params, wide):
        build(chosen, random_theta(), lr=1e-2).step()
    for p, w, old in zip(params, wide, before, strict=True):
        spacing = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
        error = (p.detach().float() - w.detach()).abs()
        assert (error <= spacing * w.detach().abs() + 1e-7).all()
        assert not torch.equal(p.detach().float(), old)


def test_stochastic_rounding_is_unbiased_and_replayable(device, random_theta):
    theta, value, count = random_theta(), 0.5, 512
    runs = []
    for _ in range(2):
        p = nn.Parameter(torch.full((count, 64), value, dtype=torch.bfloat16, device=device))
        wide = nn.Parameter(torch.full((count, 64), value, device=device))
        optimizers = [build([p], theta, lr=2e-4, state_dtype="bfloat16"), build([wide], theta, lr=2e-4)]
        for step in range(2):
            set_gradients([p], step)
            wide.grad = p.grad.float()
            for optimizer in optimizers:
                optimizer.step()
        runs.append([p.detach(), optimizers[0].state[p]])
    assert equal(runs[0], runs[1])
    p, state = runs[0]
    # a step of 2e-4 is a tenth of the spacing of 0.5 in bfloat16: to nearest, nothing would move
    moved = (p.float() - value).double()
    expected = (wide.detach() - value).double()
    assert (p != value).any()
    spacing = 2.0**-8
    assert float((moved - expected).mean().abs()) < 4 * 0.5 * spacing / math.sqrt(moved.numel())
    for name in ("momentum_fast", "momentum_slow", "second_moment"):
        exact = optimizers[1].state[wide][name].double()
        error = state[name].double() - exact
        assert 0 < float(error.abs().max()) <= 2.0**-6 * float(exact.abs().max())
        assert float(error.mean().abs()) < 4 * float(error.std()) / math.sqrt(error.numel())


def test_bits_differ_between_parameters_matrices_steps_and_tensors(device, random_theta):
    theta = random_theta()
    params = [nn.Parameter(torch.full((2, 40, 64), 0.5, dtype=torch.bfloat16, device=device)) for _ in range(2)]
    optimizer = build(params, theta, lr=1e-3, state_dtype="bfloat16")
    gradient = (1e-3 * torch.randn(40, 64)).to(device, torch.bfloat16)
    for p in params:
        p.grad = gradient.expand(2, 40, 64).contiguous()
    optimizer.step()
    a, b = params
    assert not torch.equal(a, b) and not torch.equal(a[0], a[1])
    state = optimizer.state[a]
    # 0.1 g and 0.01 g after one step from 0: the same number but for the rounding
    assert not torch.equal(state["momentum_fast"][0], state["momentum_fast"][1])
    first = state["momentum_fast"].clone()
    for name in ("momentum_fast", "momentum_medium", "momentum_slow", "second_moment"):
        state[name].zero_()
    optimizer.step()
    assert not torch.equal(state["momentum_fast"], first)


def test_gradients_may_move_and_plans_follow_their_parameters(device, random_theta):
    results = []
    for backend in ("torch", "triton"):
        model = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 24)).to(device)
        with torch.no_grad():
            for index, p in enumerate(model.parameters()):
                p.copy_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(index)))
        optimizer = FusedCelo2(model, lr=1e-2, weights=random_theta(), backend=backend, ns_dtype="float32")
        kept = []
        for step in range(5):
            set_gradients(list(model.parameters()), step)
            kept.append([p.grad for p in model.parameters()])
            if step == 2:
                model[1].weight.grad = None  # a plan without it, and another with it in the next step
            if step == 3:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if step == 4:
                optimizer.param_groups[0]["lr"] = 5e-3
            optimizer.step()
        results.append(list(model.parameters()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_plan_is_made_once(device, random_theta, monkeypatch):
    params = parameters([(40, 64), (7,)], device)
    optimizer = build(params, random_theta())
    calls = []
    original = Planner.plan_kernels
    monkeypatch.setattr(Planner, "plan_kernels", lambda *args: (calls.append(1), original(*args))[1])
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    assert len(calls) == 1


def test_what_moves_makes_another_plan(device, random_theta):
    """A gradient of another alignment, a state tensor that was replaced: the tables' addresses must follow."""
    results = []
    for moves in (False, True):
        params = parameters([(40, 64), (7,)], device)
        optimizer = build(params, random_theta(), lr=1e-2)
        for step in range(4):
            set_gradients(params, step)
            if moves and step == 1:
                value = params[0].grad
                flat = torch.zeros(1 + value.numel(), device=device)
                params[0].grad = flat[1:].view(40, 64).copy_(value)
            if moves and step == 2:
                for p in params:
                    optimizer.state[p] = {key: value.clone() for key, value in optimizer.state[p].items()}
            before = [p._version for p in params]
            optimizer.step()
            assert all(p._version > version for p, version in zip(params, before, strict=True))
        results.append(snapshot(optimizer))
    for a, b in zip(*results, strict=True):
        # the aligned and the unaligned kernel may differ in the last bit
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_steps_in_and_out_of_inference_mode(device, random_theta):
    params = parameters([(40, 64), (7,)], device)
    optimizer = build(params, random_theta(), lr=1e-2, orthogonalize=True)
    for step in range(3):
        set_gradients(params, step)
        with torch.inference_mode(step == 0):
            optimizer.step()
    norms = []
    for step in range(2):
        set_gradients(params, step, scale=10.0**-step)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert float(norms[0]) > 5 * float(norms[1])


def test_as_many_launches_for_any_number_of_matrices(device, random_theta, monkeypatch):
    from celo2.backends import batches, triton
    from celo2.kernels.report import STEP

    names = []
    original = triton.launch
    for module in (batches, triton):
        monkeypatch.setattr(
            module,
            "launch",
            lambda kernel, *args, **kwargs: (names.append(kernel), original(kernel, *args, **kwargs))[1],
        )
    counts = []
    for matrices in (1, 12):
        params = parameters([(16, 64)] * matrices, device)
        optimizer = build(params, random_theta())
        set_gradients(params, 0)
        names.clear()
        optimizer.step()
        counts.append(len(names))
    assert counts == [len(STEP), len(STEP)] and len(STEP) <= 10


def test_narrow_matrices_have_batches_of_their_own(random_theta, monkeypatch):
    """Heads of 64 columns do not force narrow tiles on the rest; there is no GPU in this test."""
    from celo2 import blocks
    from celo2.backends.batches import batches_of, totals_of
    from celo2.backends.parts import Part

    monkeypatch.setattr(blocks, "_target", lambda device: "sm_90")
    monkeypatch.setattr(blocks, "MEASURED", {("sm_90", 64): {"warps": 8}})
    params = parameters([(128, 256), (256, 128), (64, 128), (30, 7)], torch.device("cpu"))
    optimizer = FusedCelo2([{"params": params[:3], "heads": 2, "axis": 1}, {"params": params[3:]}], orthogonalize=True)
    set_gradients(params, 0)
    optimizer.step()
    slots = optimizer.planner.collect().whole
    batches = batches_of([Part.of(slot) for slot in slots], torch.device("cuda"))
    found = {(b.columns, b.warps, aligned): [tuple(part.p.shape) for part in parts] for b, aligned, parts in batches}
    assert found == {
        (128, 4, True): [(2, 128, 128)],
        (64, 8, True): [(2, 64, 64), (2, 256, 64)],
        (128, 4, False): [(1, 30, 7)],
    }
    totals = totals_of(batches, torch.device("cpu"))
    assert [len(total) for total in totals] == [2, 4, 1, 12] and all(t.data_ptr() % 16 == 0 for t in totals)


def test_interpreters_that_do_not_run_are_named(random_theta, monkeypatch):
    from celo2.backends import parts

    monkeypatch.setattr(parts.triton, "__version__", "3.6.0")
    for version, runs in (("1.26.4", True), ("2.3.5", True), ("2.4.0", False), ("2.10.1", False)):
        monkeypatch.setattr(parts.np, "__version__", version)
        assert (parts.interpreter_fault() is None) == runs
    assert "Triton 3.6.0 does not run with NumPy 2.10.1" in parts.interpreter_fault()
    if not torch.cuda.is_available():
        p = nn.Parameter(torch.zeros(4, 4))
        p.grad = torch.ones(4, 4)
        with pytest.raises(ValueError, match="NumPy below 2.4 .* or use backend='auto'"):
            FusedCelo2([p], backend="triton").step()
    monkeypatch.setattr(parts.triton, "__version__", "3.7.1")
    assert parts.interpreter_fault() is None


def test_parameters_that_do_not_fit_go_through_pytorch(device, random_theta):
    results = []
    for backend in ("torch", "triton"):
        narrow, wide, huge = parameters([(40, 64), (9, 5), (12, 64)], device)
        double = nn.Parameter(wide.detach().double())
        optimizer = FusedCelo2(
            [
                {"params": [narrow, double], "rule": "celo2"},
                {"params": [huge], "rule": "celo2", "max_grad_norm": 1e4},
            ],
            lr=1e-2,
            weights=random_theta(),
            backend=backend,
            ns_dtype="float32",
        )
        for step in range(2):
            set_gradients([narrow, double, huge], step)
            optimizer.step()
        results.append([narrow, double, huge])
        if backend == "triton":
            assert set(optimizer.planner.kernels.refused) == {double, huge}
            assert "parameter 1: stepped by PyTorch, torch.float64" in optimizer.table()
            assert "parameter 0: stepped by PyTorch, max_grad_norm=10000.0, above" in optimizer.table()
            narrow.grad[0, 0] = math.nan
            before = snapshot(optimizer)
            optimizer.step()
            assert equal(snapshot(optimizer), before)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_backends_are_checked(random_theta, monkeypatch):
    p = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="backend='cuda', allowed: auto, triton, torch"):
        FusedCelo2([p], backend="cuda")
    assert FusedCelo2([p]).backend == "auto"
    if not torch.cuda.is_available():
        from celo2.backends import parts

        monkeypatch.setattr(parts, "interpreted", lambda: False)
        p.grad = torch.ones(4, 4)
        with pytest.raises(ValueError, match="the kernels run on GPUs; set TRITON_INTERPRET=1"):
            FusedCelo2([p], backend="triton").step()
    monkeypatch.setattr("celo2.optimizer.triton_is_installed", lambda: False)
    with pytest.raises(ValueError, match="pip install 'celo2\\[triton\\]'"):
        FusedCelo2([p], backend="triton")


def test_empty_parameters_and_no_gradients(device, random_theta):
    params = parameters([(0, 5), (40, 64)], device)
    optimizer = build(params, random_theta())
    optimizer.step()
    set_gradients(params, 0)
    optimizer.step()
    assert float(optimizer.state[params[1]]["step"]) == 1


def test_offsets_beyond_two_to_the_31(device, random_theta):
    rows, stride = 132, (1 << 24) - 16
    # untouched pages of an allocation cost nothing
    storage = torch.UntypedStorage(2 * rows * stride, device=device)
    p = nn.Parameter(torch.tensor([], dtype=torch.bfloat16, device=device).set_(storage, 0, (rows, 64), (stride, 1)))
    dense = nn.Parameter(0.02 * torch.randn(rows, 64, device=device).bfloat16())
    p.data.copy_(dense.detach())
    for chosen in (p, dense):
        optimizer = build([chosen], random_theta(), lr=1e-2)
        set_gradients([chosen], 0)
        optimizer.step()
        assert not optimizer.planner.kernels.refused
    # rounded by other bits, so equal up to one spacing
    torch.testing.assert_close(p.detach().contiguous(), dense.detach(), rtol=2.0**-7, atol=1e-7)


@pytest.mark.parametrize("stored", ["rows", "columns"])
def test_8_bit_momenta_equal_the_wide_rule_up_to_a_level(stored, device, gpu_blocks, random_theta):
    gpu_blocks(128)
    theta, results = random_theta(), []
    for shapes in ([(40, 192), (2, 33, 70), (9, 5), (6,)],):
        params = parameters(shapes, device)
        if stored == "columns":
            params = [nn.Parameter(p.detach().mT.contiguous().mT) if p.ndim > 1 else p for p in params]
        wide = [nn.Parameter(p.detach().clone()) for p in params]
        eight, exact = build(params, theta, lr=1e-2, state_dtype="int8"), build(wide, theta, lr=1e-2)
        for step in range(3):
            set_gradients(params, step)
            for p, w in zip(params, wide, strict=True):
                w.grad = p.grad.clone()
                # the wide rule goes on from what the 8 bits hold
                state = eight.state[p]
                for key, value in zip(
                    ("momentum_fast", "momentum_medium", "momentum_slow"),
                    read_momenta(state, MatrixView()),
                    strict=True,
                ):
                    exact.state[w][key].copy_(value)
                for key in ("second_moment", "row_factor", "column_factor", "factor"):
                    if key in state:
                        exact.state[w][key].copy_(state[key])
                w.data.copy_(p.detach())
            eight.step()
            exact.step()
            for p, w in zip(params, wide, strict=True):
                torch.testing.assert_close(p, w, rtol=0, atol=1e-6)
                if p.ndim < 2:
                    continue
                state = eight.state[p]
                levels = state["momentum_slow"]
                assert levels.dtype == torch.int8 and state["second_moment"].dtype == torch.bfloat16
                assert int(levels.max()) > 100 and int(levels.min()) < -100
                rows = p.shape[:-1] if stored == "rows" else (*p.shape[:-2], p.shape[-1])
                assert state["momentum_scale"].shape == (*rows, state["momentum_scale"].shape[-2], 3)
                for k, (key, value) in enumerate(
                    zip(
                        ("momentum_fast", "momentum_medium", "momentum_slow"),
                        read_momenta(state, MatrixView()),
                        strict=True,
                    )
                ):
                    level = state["momentum_scale"][..., k].max()
                    error = (value - exact.state[w][key]).abs().max()
                    assert 0 < float(error) <= 1.01 * float(level), (p.shape, key)
        results.append(params)


def test_8_bit_state_dict_and_replay(device, random_theta):
    runs = []
    for resumes in (False, True):
        params = parameters([(40, 64), (7,)], device)
        optimizer = build(params, random_theta(), lr=1e-2, state_dtype="int8")
        for step in range(4):
            if resumes and step == 2:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = build(params, random_theta(), lr=1e-2, state_dtype="int8")
                optimizer.load_state_dict(saved)
            set_gradients(params, step)
            optimizer.step()
        runs.append(snapshot(optimizer))
    assert equal(*runs)
    # and converted to another dtype
    wide = build(params, random_theta(), lr=1e-2)
    wide.load_state_dict(optimizer.state_dict())
    assert wide.state[params[0]]["momentum_slow"].dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_step_is_captured_in_a_cuda_graph(device, random_theta):
    results = []
    for captured in (False, True):
        params = parameters([(96, 128), (70, 128), (9,)], device)
        lr = torch.tensor(1e-2, device=device)
        optimizer = build(params, random_theta(), lr=lr, orthogonalize=True, ns_dtype="auto")
        for p in params:
            p.grad = torch.zeros_like(p)
        graph = torch.cuda.CUDAGraph()
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad.copy_(1e-3 * torch.randn(p.shape, generator=generator))
            optimizer.param_groups[0]["lr"].fill_(1e-2 / (1 + step))
            if step == 2 and captured:
                before = snapshot(optimizer)
                with torch.cuda.graph(graph):
                    optimizer.step()
                assert equal(snapshot(optimizer), before)
            if step >= 2 and captured:
                graph.replay()
            else:
                optimizer.step()
        results.append(snapshot(optimizer))
    assert equal(*results)
