"""What never had a gradient does not move; what had one and has none goes on, as far as the documentation says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from celo2 import FusedCelo2, load_weights
from celo2.matrices import MatrixView
from celo2.reference import MatrixState, VectorState, matrix_update, vector_update

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.kernels)]
VARIANTS = ["celo2", "celo2-base"]
# of several matrices, of which the first has gradients: leading axes, heads and splits by rows and by columns,
# transposed, wide, tall; one row or column of one matrix
CASES = {
    "experts": ((4, 32, 32), {}),
    "wide experts": ((3, 5, 70), {}),
    "tall experts": ((3, 70, 5), {}),
    "heads": ((48, 20), {"heads": 4}),
    "split": ((48, 20), {"split": 3, "heads": 2}),
    "columns": ((20, 48), {"heads": 4, "axis": 1}),
}


@pytest.fixture
def device_of():
    def device(backend):
        if backend == "triton":
            pytest.importorskip("triton")
        return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")

    return device


def build(values, weights, backend, view=None, **options):
    params = [nn.Parameter(value) for value in values]
    groups = [{"params": params, "rule": "celo2", **(view or {})}]
    return params, FusedCelo2(groups, lr=1e-2, weights=weights, backend=backend, ns_dtype="auto", **options)


def set_gradients(params, view, step, scale=1e-2):
    """Noise in the first matrix of each, or the first element of a vector; exact zeros in all others."""
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.zeros_like(p)
        first = view.matrices(p.grad)[0] if p.ndim > 1 else p.grad.view(-1)[:1]
        first.copy_(scale * torch.randn(first.shape, generator=generator))


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_idle_experts_do_not_move(backend, variant, state_dtype, device_of):
    p = (0.05 * torch.randn(4, 32, 32)).to(device_of(backend))
    before = p.clone()
    [p], optimizer = build([p], variant, backend, state_dtype=state_dtype)
    for step in range(200 if backend == "torch" and state_dtype == "float32" else 4):
        optimizer.zero_grad(set_to_none=False)
        set_gradients([p], MatrixView(), step)
        optimizer.step()
    assert torch.equal(p[1:], before[1:])
    assert float((p.detach()[0] - before[0]).abs().min()) > 0
    for name in ("row_factor", "column_factor"):
        assert not optimizer.state[p][name][1:].any()
        assert optimizer.state[p][name][0].min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_matrix_of_a_view_is_decided_by_itself(backend, case, variant, dtype, device_of):
    shape, options = CASES[case]
    if (backend, dtype) == ("triton", torch.float64):
        pytest.skip("the kernels refuse it")
    view = MatrixView(**options)
    for transposed in (False, True):
        value = (0.05 * torch.randn(shape)).to(device_of(backend), dtype)
        value = value.mT.contiguous().mT if transposed else value
        before = view.matrices(value.clone())
        [p], optimizer = build([value], variant, backend, options)
        for step in range(2):
            set_gradients([p], view, step)
            optimizer.step()
        after = view.matrices(p.detach())
        assert torch.equal(after[1:], before[1:]), transposed
        assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("shape", [(9,), (1,), (), (300,)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vector_moves_as_a_whole_once_it_had_a_gradient(backend, shape, device_of):
    p = torch.randn(shape).to(device_of(backend))
    before = p.clone()
    [p], optimizer = build([p], "celo2-base", backend)
    p.grad = torch.zeros_like(p)
    for _ in range(3):
        optimizer.step()
    assert torch.equal(p, before) and not optimizer.state[p]["factor"].any()
    set_gradients([p], MatrixView(), 0)
    optimizer.step()
    # one element's gradient is enough: the rule takes its means over all of them
    assert float((p.detach() - before).abs().min()) > 0
    assert optimizer.state[p]["factor"].min() > 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_decay_acts_as_adamw_s_does(backend, variant, device_of):
    shapes = [(4, 6), (7,)]
    values = [torch.randn(shape).to(device_of(backend)) for shape in shapes]
    theirs = [nn.Parameter(value.clone()) for value in values]
    params, optimizer = build(values, variant, backend, weight_decay=0.5)
    adamw = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.5)
    for p in (*params, *theirs):
        p.grad = torch.zeros_like(p)
    for _ in range(3):
        optimizer.step()
        adamw.step()
    for p, other in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_gradient_after_idle_steps_is_a_first_gradient(backend, device_of, random_theta):
    value = 0.05 * torch.randn(4, 12, 16).to(device_of(backend))
    view = MatrixView()
    runs = []
    for idle in (0, 3):
        [p], optimizer = build([value.clone()], random_theta(), backend)
        for _ in range(idle):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        for step in range(2):
            set_gradients([p], view, step)
            optimizer.step()
        runs.append((p.detach(), *(optimizer.state[p][key] for key in optimizer.state[p] if key != "step")))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_gradient_counts_for_good(backend, device_of):
    """However long ago: the factors keep 1e-30 of every step when the gradient has decayed."""
    [p], optimizer = build([0.05 * torch.randn(2, 8, 8).to(device_of(backend))], "celo2-base", backend)
    set_gradients([p], MatrixView(), 0)
    optimizer.step()
    state = optimizer.state[p]
    for name in ("row_factor", "column_factor"):
        state[name].mul_(0).add_(torch.tensor([[[1e-30]], [[0.0]]], device=p.device))
    p.grad.zero_()
    before = p.detach().clone()
    optimizer.step()
    assert not torch.equal(p[0], before[0]) and torch.equal(p[1], before[1])
    assert state["row_factor"][0].min() > 0.9e-30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("orthogonalize", [True, False])
def test_the_oracle_gives_no_direction(orthogonalize, dtype, random_theta):
    theta = random_theta().tensors(dtype, torch.device("cpu"))
    p, g = torch.randn(3, 5, 8, dtype=dtype), torch.zeros(3, 5, 8, dtype=dtype)
    g[1] = torch.randn(5, 8, dtype=dtype)
    u, state = matrix_update(theta, p, g, MatrixState.zeros_like(p), orthogonalize=orthogonalize)
    assert not u[[0, 2]].any() and u[1].square().mean() == pytest.approx(1, abs=1e-3)
    assert not state.column_factor[[0, 2]].any() and state.column_factor[1].min() > 0
    # the second without a gradient goes on, by its momenta
    u, state = matrix_update(theta, p, torch.zeros_like(g), state, orthogonalize=orthogonalize)
    assert not u[[0, 2]].any() and u[1].any()
    vector, nothing = torch.randn(7, dtype=dtype), torch.zeros(7, dtype=dtype)
    u, idle = vector_update(theta, vector, nothing, VectorState.zeros_like(vector))
    assert not u.any() and not idle.factor.any()
    nothing[3] = 1e-3
    u, idle = vector_update(theta, vector, nothing, idle)
    assert u.all() and idle.factor.min() > 0


def distance_without_gradients(variant: str, first: int, steps: int = 200) -> tuple[float, float, float]:
    """Norms of a [32, 32] before its gradients end, of how far it then goes in some steps, and at the full rate."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(0.05 * torch.randn(32, 32, generator=generator))
    lr = 1e-3
    optimizer = FusedCelo2([{"params": [p], "rule": "celo2"}], lr=lr, weights=load_weights(variant))
    for _ in range(first):
        p.grad = 1e-2 * torch.randn(32, 32, generator=generator)
        optimizer.step()
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    for _ in range(steps):
        optimizer.step()
    return float(before.norm()), float((p.detach() - before).norm()), lr * steps * 32


@pytest.mark.parametrize(
    ("variant", "first", "expected"),
    [("celo2", 1, 6.0), ("celo2", 100, 5.1), ("celo2-base", 1, 5.9), ("celo2-base", 100, 6.0)],
)
def test_a_matrix_goes_on_when_its_gradients_end(variant, first, expected):
    """The numbers that the docstring of `FusedCelo2` gives."""
    norm, distance, most = distance_without_gradients(variant, first)
    print(f"{variant}, {first} steps with gradients: norm {norm:.1f}, then {distance:.1f} of {most:.1f}")
    assert distance == pytest.approx(expected, rel=0.05)
