"""`backend="compiled"`, the default on a CPU: matrices in C++, against the float64 oracle and the PyTorch path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from celo2 import FusedCelo2, MatrixView, Theta
from celo2.backends import compiled
from celo2.reference import MatrixState, matrix_update

# shape and view of a parameter: one matrix, several, slices of a wider one, which lie apart, and several tiles
PARAMETERS = [
    ((24, 40), MatrixView()),
    ((40, 24), MatrixView()),
    ((17, 33), MatrixView()),
    ((32, 32), MatrixView()),
    ((1, 50), MatrixView()),
    ((50, 1), MatrixView()),
    ((96, 20), MatrixView(split=3, heads=2)),
    ((20, 48), MatrixView(heads=4, axis=1)),
    ((3, 9, 6), MatrixView()),
    ((40, 4999), MatrixView()),
    ((5003, 30), MatrixView()),
    ((160, 150), MatrixView()),
]


def groups_of(params: list[torch.nn.Parameter]) -> list[dict[str, object]]:
    return [
        {"params": [p], "split": view.split, "heads": view.heads, "axis": view.axis, "rule": "celo2"}
        for p, (_, view) in zip(params, PARAMETERS, strict=False)
    ]


@pytest.mark.parametrize("orthogonalize", [False, True])
def test_steps_equal_the_oracle(random_theta, orthogonalize):
    assert compiled.can_compile()
    theta, gradient = random_theta(), torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(0.1 * torch.randn(shape)) for shape, _ in PARAMETERS]
    optimizer = FusedCelo2(groups_of(params), lr=1.0, weights=theta, orthogonalize=orthogonalize, backend="compiled")
    tensors = theta.tensors(torch.float64, torch.device("cpu"))
    states: list[MatrixState | None] = [None] * len(params)
    # the second gradient has elements that the rule clips
    for magnitude in (1e-3, 3e3, 1e-2):
        before = [p.detach().double() for p in params]
        for p in params:
            p.grad = magnitude * torch.randn(p.shape, generator=gradient)
        optimizer.step()
        for index, (p, (shape, view)) in enumerate(zip(params, PARAMETERS, strict=True)):
            matrices, g = view.matrices(before[index]), view.matrices(p.grad.double())
            state = states[index] or MatrixState.zeros_like(matrices)
            expected, states[index] = matrix_update(tensors, matrices, g, state, orthogonalize=orthogonalize)
            moved = view.matrices(before[index] - p.detach().double())
            # Newton-Schulz amplifies what rounding did to small singular values, of square matrices most
            tolerance = 2e-3 if orthogonalize else 3e-5
            torch.testing.assert_close(
                moved,
                expected,
                rtol=0,
                atol=tolerance,
                msg=lambda text: f"{shape} {view}: {text}",  # noqa: B023
            )
            got = optimizer.state[p]
            for name in ("row_factor", "column_factor"):
                wanted = getattr(states[index], name).reshape(got[name].shape)
                torch.testing.assert_close(got[name].double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_numbers_do_not_depend_on_the_number_of_threads(random_theta, threads):
    theta, results = random_theta(), []
    for number in (1, threads):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(0.1 * torch.randn(shape)) for shape, _ in PARAMETERS[:-1]]
        optimizer = FusedCelo2(groups_of(params), lr=1e-2, weights=theta, orthogonalize=True)
        torch.set_num_threads(number)
        try:
            for _ in range(3):
                for p in params:
                    p.grad = 1e-3 * torch.randn(p.shape)
                optimizer.step()
        finally:
            torch.set_num_threads(1)
        results.append([*params, *(value for state in optimizer.state.values() for value in state.values())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_thetas_of_several_widths_step_in_one_optimizer(random_theta):
    ablations = Path(__file__).parents[2] / "bench/ablations"
    thetas = [random_theta(), *(Theta.load(ablations / f"hidden-{width}.safetensors") for width in (4, 16))]
    assert len({theta.arrays["b0"].shape for theta in thetas}) == 3
    results = []
    for backend in ("auto", "torch"):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(0.1 * torch.randn(24, 40)) for _ in thetas]
        groups = [{"params": [p], "weights": t, "rule": "celo2"} for p, t in zip(params, thetas, strict=True)]
        optimizer = FusedCelo2(groups, lr=1e-2, weight_decay=0.1, orthogonalize=False, backend=backend)
        for _ in range(2):
            for p in params:
                p.grad = 1e-3 * torch.randn(p.shape)
            optimizer.step()
        results.append(params)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_matrix_without_gradients_stays_and_one_that_is_not_finite_skips_the_step(random_theta):
    experts, other = torch.nn.Parameter(torch.randn(3, 8, 6)), torch.nn.Parameter(torch.randn(9, 7))
    group = {"params": [experts, other], "rule": "celo2"}
    optimizer = FusedCelo2([group], lr=1e-2, weights=random_theta(), orthogonalize=True)
    experts.grad, other.grad = torch.randn(3, 8, 6), torch.randn(9, 7)
    experts.grad[1] = 0
    before = experts.detach().clone()
    optimizer.step()
    assert torch.equal(experts[1], before[1])
    assert not torch.isclose(experts[0], before[0]).all()
    assert all(
        torch.equal(optimizer.state[experts][name][1], torch.zeros(8 if "row" in name else 6, 3))
        for name in ("row_factor", "column_factor")
    )
    kept = [experts.detach().clone(), *(x.clone() for state in optimizer.state.values() for x in state.values())]
    other.grad[3, 3] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    now = [experts, *(x for state in optimizer.state.values() for x in state.values())]
    assert all(torch.equal(one, two) for one, two in zip(kept, now, strict=True))


@pytest.mark.parametrize("limit", [None, 1e-3])
def test_it_is_the_default_and_what_it_cannot_take_goes_through_pytorch(random_theta, monkeypatch, limit):
    steps, original = [], compiled.CompiledSteps.step
    monkeypatch.setattr(
        compiled.CompiledSteps,
        "step",
        lambda self, *a: steps.extend(m.matrices.p.data_ptr() for m in self.members) or original(self, *a),
    )
    params = [torch.nn.Parameter(torch.randn(24, 40)), torch.nn.Parameter(torch.randn(24, 40).bfloat16())]
    params += [torch.nn.Parameter(torch.randn(24, 40).double()), torch.nn.Parameter(torch.randn(7))]
    # elements of a row that lie apart
    params.append(torch.nn.Parameter(torch.randn(24, 80)[:, ::2]))
    params.append(torch.nn.Parameter(torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)))
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    theta = random_theta()
    for backend, some in (("auto", params), ("torch", others)):
        torch.manual_seed(1)
        for p in some:
            p.grad = 1e-3 * torch.randn(p.shape).to(p.dtype)
        # the norm is above the limit: gradients are scaled
        group = {"params": some, "rule": "celo2", "max_grad_norm": limit}
        FusedCelo2([group], lr=1e-2, weights=theta, backend=backend).step()
    assert steps == [params[0].data_ptr(), params[5].data_ptr()]
    for p, other in zip(params, others, strict=True):
        # what PyTorch steps is the same to the bit, but for the norm, to which C++ adds; a bit of bfloat16 is 2e-2
        scaled = {torch.float64: 1e-9, torch.bfloat16: 2e-2} if limit else {torch.float64: 0, torch.bfloat16: 0}
        tolerance = scaled.get(p.dtype, 1e-6)
        torch.testing.assert_close(p, other, rtol=0, atol=tolerance)


PROGRAM = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO)
from celo2 import FusedCelo2
p = torch.nn.Parameter(torch.ones(8, 8))
p.grad = torch.ones(8, 8)
FusedCelo2([{"params": [p], "rule": "celo2"}], lr=1e-2, weights="momentum", backend=sys.argv[1]).step()
print(float((1 - p).mean()))
"""


def start(backend: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, backend],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert float(out) > 0
    return error


@pytest.mark.parametrize(("backend", "level"), [("compiled", "WARNING"), ("auto", "INFO")])
def test_without_a_compiler_it_says_so_and_steps_through_pytorch(tmp_path: Path, backend, level):
    error = finish(start(backend, CXX=str(tmp_path / "no-compiler"), XDG_CACHE_HOME=str(tmp_path)))
    lines = [line for line in error.splitlines() if "no C++ can be compiled here" in line]
    assert any(line.startswith(f"{level}:celo2.backends.compiled") and "no-compiler" in line for line in lines), error


def test_a_compiler_that_fails_is_quoted(tmp_path: Path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'fatal error: out of patience' >&2\nexit 3\n")
    compiler.chmod(0o755)
    error = finish(start("compiled", CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path)))
    assert "fatal error: out of patience" in error
    assert not list((tmp_path / "celo2").iterdir())


def test_processes_that_begin_together_compile_and_later_ones_load(tmp_path: Path):
    for error in [finish(p) for p in [start("auto", XDG_CACHE_HOME=str(tmp_path)) for _ in range(3)]]:
        assert "compiled the CPU's step in" in error
    assert sorted(path.suffix for path in (tmp_path / "celo2").iterdir()) == [".sha256", ".so"]
    assert "compiled the CPU's step" not in finish(start("auto", XDG_CACHE_HOME=str(tmp_path)))


@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_damaged_library_is_compiled_again(tmp_path: Path, damage):
    finish(start("auto", XDG_CACHE_HOME=str(tmp_path)))
    (library,) = (tmp_path / "celo2").glob("*.so")
    library.write_bytes(library.read_bytes()[:30000] if damage == "cut" else b"nothing")
    assert "compiled the CPU's step in" in finish(start("auto", XDG_CACHE_HOME=str(tmp_path)))
    assert "compiled the CPU's step in" not in finish(start("auto", XDG_CACHE_HOME=str(tmp_path)))


def test_a_disk_that_refuses_is_no_error(monkeypatch):
    def refuse():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiled, "_kept_folder", refuse)
    assert "No space left" in compiled._library.__wrapped__((8, 8))


def test_a_folder_that_others_can_write_is_not_trusted(tmp_path: Path):
    folder = tmp_path / "celo2"
    folder.mkdir()
    folder.chmod(0o777)
    error = finish(start("auto", XDG_CACHE_HOME=str(tmp_path), TMPDIR=str(tmp_path)))
    assert "is not a folder that only this user can write" in error
    assert [path.name for path in tmp_path.iterdir()] == ["celo2"] and not list(folder.iterdir())


def test_a_backward_pass_through_what_a_step_wrote_is_refused():
    p = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = FusedCelo2([{"params": [p], "rule": "celo2"}], lr=1e-2)
    p.grad = torch.randn(8, 8)
    loss = (p * p).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(("shape", "size"), [((24, 40), 3e18), ((24, 40), 1e19), ((5003, 30), 2e18)])
def test_sums_that_overflow_in_float32_leave_a_finite_state(random_theta, shape, size, backend):
    p = torch.nn.Parameter(torch.randn(shape))
    group = {"params": [p], "rule": "celo2", "max_grad_norm": 1.0}
    optimizer = FusedCelo2([group], lr=1e-2, weights=random_theta(), orthogonalize=False, backend=backend)
    for scale in (size, 1e-3):
        p.grad = torch.full(shape, scale)
        optimizer.step()
    assert optimizer.skipped_steps == 0
    assert all(x.isfinite().all() for x in (p, *optimizer.state[p].values()))


def test_a_weight_that_is_no_number_shows(random_theta):
    p = torch.nn.Parameter(torch.randn(24, 40))
    with torch.no_grad():
        p[3, 5] = float("nan")
    p.grad = torch.randn(24, 40)
    FusedCelo2([{"params": [p], "rule": "celo2"}], lr=1e-2, weights=random_theta(), orthogonalize=False).step()
    assert p.isnan().all()


def test_the_default_device_changes_nothing(random_theta):
    p = torch.nn.Parameter(torch.randn(24, 40))
    p.grad = torch.randn(24, 40)
    optimizer = FusedCelo2([{"params": [p], "rule": "celo2"}], lr=1e-2, weights=random_theta(), backend="compiled")
    before = p.detach().clone()
    with torch.device("meta"):
        optimizer.step()
    assert not torch.equal(p, before)


def test_bfloat16_iterations_are_refused():
    with pytest.raises(ValueError, match="backend='compiled'"):
        FusedCelo2([torch.nn.Parameter(torch.ones(2, 2))], backend="compiled", ns_dtype="bfloat16")
