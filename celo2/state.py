"""The optimizer state of a parameter: its accumulators under either rule, and the checks on saved ones.

Learned rule: `momentum_fast`, `momentum_medium`, `momentum_slow` and `second_moment` like the parameter, and
`row_factor` [rows, 3] and `column_factor` [columns, 3] (with a leading axis for several matrices), or `factor` [n, 3]
for fewer than two axes. AdamW: `exp_avg` and `exp_avg_sq`. Both: `step`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from celo2.matrices import MatrixView

MOMENTUM_KEYS = ("momentum_fast", "momentum_medium", "momentum_slow")


STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """float32, or float64 for a float64 parameter: what the rule computes in."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def create_state(parameter: Tensor, rule: str, view: MatrixView, dtype: str = "float32") -> dict[str, Tensor]:
    """Return all accumulators, zero, on the parameter's device and with its strides.

    `dtype` is that of the learned rule's momenta and second moment; factors and AdamW's moments are always wide.
    They are made at once, also where no gradient ever comes, so that every rank has the same keys. On a GPU `step` is
    there too, where the kernels read and advance it.
    """
    wide, device = compute_dtype(parameter), parameter.device

    def like(dtype: torch.dtype = wide) -> Tensor:
        return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=wide, device=device)

    state = {"step": torch.zeros((), dtype=torch.float32, device=device if device.type == "cuda" else "cpu")}
    if rule == "adamw":
        return state | {"exp_avg": like(), "exp_avg_sq": like()}
    state |= {key: like(_accumulator_dtype(parameter, rule, dtype)) for key in (*MOMENTUM_KEYS, "second_moment")}
    if parameter.ndim < 2:
        return state | {"factor": zeros(parameter.numel(), 3)}
    batch, rows, columns = view.matrices(parameter.detach()).shape
    lead = () if batch == 1 else (batch,)
    return state | {"row_factor": zeros(*lead, rows, 3), "column_factor": zeros(*lead, columns, 3)}


def _accumulator_dtype(parameter: Tensor, rule: str, dtype: str) -> torch.dtype:
    wide = compute_dtype(parameter)
    return wide if rule == "adamw" or wide == torch.float64 else STATE_DTYPES[dtype]


def follow_parameter(
    state: dict[str, Tensor], parameter: Tensor, rule: str, view: MatrixView, dtype: str = "float32"
) -> None:
    """Move the state to where the parameter is, when `module.to(...)` changed its dtype, device or strides."""
    like = state["exp_avg" if rule == "adamw" else "second_moment"]
    expected = _accumulator_dtype(parameter, rule, dtype)
    if like.device == parameter.device and like.dtype == expected and _like(like, parameter):
        return
    moved = create_state(parameter, rule, view, dtype)
    for key, value in moved.items():
        value.copy_(state[key])
    state.update(moved)


def _like(accumulator: Tensor, parameter: Tensor) -> bool:
    return accumulator.stride() == parameter.stride() or not is_dense(parameter)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps or overlaps, in any order of its axes."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def check_saved_state(name: str, parameter: Tensor, saved: dict[str, Any] | None, state: dict[str, Tensor]) -> None:
    """Raise ValueError when saved state does not fit; None is accepted for a parameter that takes no gradients."""
    if saved is None:
        if parameter.requires_grad:
            raise ValueError(f"state dict has no state for parameter {name}: it is incomplete")
        return
    for entry, value in state.items():
        if entry not in saved:
            raise ValueError(
                f"state dict of another optimizer: {name} has {', '.join(sorted(saved))} and no {entry}; construct "
                "FusedCelo2 with the rules and views that it was saved with"
            )
        shape = tuple(torch.as_tensor(saved[entry]).shape)
        if shape != tuple(value.shape):
            raise ValueError(
                f"state dict of another model: {entry} of {name} has shape {shape}, expected {tuple(value.shape)}"
            )


def copy_saved_state(saved: dict[str, Any] | None, state: dict[str, Tensor]) -> None:
    """Copy checked saved values into the state, which keeps its dtypes, devices and strides."""
    for entry, value in state.items() if saved is not None else ():
        assert saved is not None
        value.copy_(torch.as_tensor(saved[entry]))
