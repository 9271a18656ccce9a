"""The authors' numbers: the rule, both variants, and the deployed optimizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from celo2 import FusedCelo2, Theta
from celo2.reference import MatrixState, VectorState, matrix_update, vector_update

FILES = ("normal_gradients", "tiny_gradients", "huge_gradients_clipped", "zero_gradients_every_third_step")
TOLERANCE = {"celo2_base": 1e-5, "celo2": 3e-5}


def _theta(data: dict[str, np.ndarray]) -> Theta:
    return Theta.from_arrays(
        {key.removeprefix("theta/"): value for key, value in data.items() if key.startswith("theta/")}
    )


def device_of(backend: str) -> torch.device:
    """The kernels are tested where they run: on a GPU where there is one."""
    if backend == "triton":
        pytest.importorskip("triton")
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


def _names(data: dict[str, np.ndarray], variant: str) -> list[str]:
    prefix = f"{variant}/update/"
    return [key.removeprefix(prefix) for key in data if key.startswith(prefix)]


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.kernels)])
@pytest.mark.parametrize("variant", TOLERANCE)
@pytest.mark.parametrize("file", FILES)
def test_optimizer_reproduces_golden_updates_and_state(file, variant, backend, golden):
    data = golden(file)
    names = _names(data, variant)
    assert len(names) >= 3
    device = device_of(backend)
    params = [(name, torch.nn.Parameter(torch.tensor(data[f"param/{name}"], device=device))) for name in names]
    # at lr 1 the step writes p - u, so the update can be read off without loss of digits
    optimizer = FusedCelo2(
        [{"params": params, "rule": "celo2"}],
        lr=1.0,
        weights=_theta(data),
        orthogonalize=variant == "celo2",
        backend=backend,
        ns_dtype="float32",
    )
    worst = 0.0
    for step in range(len(data[f"grad/{names[0]}"])):
        for name, parameter in params:
            parameter.grad = torch.tensor(data[f"grad/{name}"][step], device=device)
        before = {name: parameter.detach().clone() for name, parameter in params}
        optimizer.step()
        for name, parameter in params:
            update = (before[name] - parameter.detach()).cpu()
            worst = max(worst, float((update - torch.tensor(data[f"{variant}/update/{name}"][step])).abs().max()))
            parameter.data.copy_(torch.tensor(data[f"{variant}/param/{name}"][step]))
    print(f"largest difference of an update: {worst:.1e}")
    assert worst <= TOLERANCE[variant]
    for name, parameter in params:
        state = {key: value.cpu() for key, value in optimizer.state[parameter].items()}
        prefix = f"{variant}/state"
        momentum = np.stack([state[f"momentum_{k}"].numpy() for k in ("fast", "medium", "slow")], axis=-1)
        pairs = [(momentum, "momentum"), (state["second_moment"].numpy()[..., None], "rms")]
        if parameter.ndim == 1:
            pairs.append((state["factor"].numpy(), "v_diag"))
        else:
            rows, columns = ("v_col", "v_row") if name == "tall" else ("v_row", "v_col")
            pairs += [(state["row_factor"].numpy(), rows), (state["column_factor"].numpy(), columns)]
        for value, key in pairs:
            expected = data[f"{prefix}/{key}/{name}"]
            # the authors' 1 - 0.999 is a float32 subtraction, off by 4.7e-5 of itself
            np.testing.assert_allclose(value, expected, rtol=6e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("variant", TOLERANCE)
@pytest.mark.parametrize("file", FILES)
def test_float64_oracle_agrees_with_golden(file, variant, golden):
    data = golden(file)
    theta = _theta(data).tensors(torch.float64, torch.device("cpu"))
    worst = 0.0
    for name in _names(data, variant):
        p = torch.tensor(data[f"param/{name}"], dtype=torch.float64)
        state = VectorState.zeros_like(p) if p.ndim == 1 else MatrixState.zeros_like(p)
        for step, gradient in enumerate(data[f"grad/{name}"]):
            g = torch.tensor(gradient, dtype=torch.float64)
            if p.ndim == 1:
                update, state = vector_update(theta, p, g, state)
            else:
                update, state = matrix_update(theta, p, g, state, orthogonalize=variant == "celo2")
            worst = max(worst, float((update - torch.tensor(data[f"{variant}/update/{name}"][step])).abs().max()))
            p = torch.tensor(data[f"{variant}/param/{name}"][step], dtype=torch.float64)
    assert worst <= TOLERANCE[variant]


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.kernels)])
def test_deployed_optimizer_reproduces_golden_parameters(backend, golden):
    data = golden("deployed_with_adamw_and_schedule")
    names = [key.removeprefix("param/") for key in data if key.startswith("param/")]
    device = device_of(backend)
    params = [(name, torch.nn.Parameter(torch.tensor(data[f"param/{name}"], device=device))) for name in names]
    matrices = [(name, p) for name, p in params if p.ndim == 2 and "embed" not in name]
    rest = [(name, p) for name, p in params if p.ndim < 2 or "embed" in name]
    optimizer = FusedCelo2(
        [{"params": matrices, "rule": "celo2"}, {"params": rest, "rule": "adamw"}],
        lr=0.0,
        weights=_theta(data),
        weight_decay=float(data["weight_decay"]),
        adam_lr_mult=float(data["adam_lr_mult"]),
        # as the authors do
        vector_weight_decay=None,
        adam_betas=tuple(float(beta) for beta in data["adam_betas"]),
        backend=backend,
        ns_dtype="float32",
    )
    for step, lr in enumerate(data["lr"]):
        for group in optimizer.param_groups:
            group["lr"] = float(lr) * group["lr_mult"]
        for name, parameter in params:
            parameter.grad = torch.tensor(data[f"grad/{name}"][step], device=device)
        optimizer.step()
    differences = {
        name: float(np.abs(parameter.detach().cpu().numpy() - data[f"deployed/param/{name}"][-1]).max())
        for name, parameter in params
    }
    print(f"largest difference of a parameter at step {len(data['lr'])}: {max(differences.values()):.1e}")
    assert max(differences.values()) <= 1e-6, differences
