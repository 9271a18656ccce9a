"""The optimizer state of a parameter: its accumulators under either rule, and the checks on saved ones.

Learned rule: `momentum_fast`, `momentum_medium`, `momentum_slow` and `second_moment` like the parameter; `row_factor`
[..., rows, 3] and `column_factor` [..., columns, 3] (`MatrixView.factor_shapes`), or `factor` [n, 3] for fewer than two
axes; with momenta of 8 bits `momentum_scale` [..., rows, quanta, 3], as `row_factor` (as `column_factor` with columns
for rows, where those lie in memory as rows). AdamW: `exp_avg` and `exp_avg_sq`. Both:
`step`. The state of a sharded parameter is sharded as it is; that of one whose step is split over replicas, by rows.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from celo2.matrices import MatrixView
from celo2.quantisation import dequantise, quanta, quantise_
from celo2.stochastic_rounding import mix64

if TYPE_CHECKING:
    from celo2.shard_layout import ShardLayout
    from celo2.sharding import ShardSpec

MOMENTUM_KEYS = ("momentum_fast", "momentum_medium", "momentum_slow")


# of momenta and of the second moment
STATE_DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "int8": (torch.int8, torch.bfloat16),
}


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """float32, or float64 for a float64 parameter: what the rule computes in."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def create_state(parameter: Tensor, rule: str, view: MatrixView, dtype: str = "float32") -> dict[str, Tensor]:
    """Return all accumulators, zero, on the parameter's device and with its strides.

    `dtype` is that of the learned rule's momenta and second moment; factors and AdamW's moments are always wide. On a
    GPU `step` is there too, where the kernels read and advance it. Raises as `check_state`.
    """
    wide, device = compute_dtype(parameter), parameter.device

    def like(dtype: torch.dtype = wide) -> Tensor:
        return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=wide, device=device)

    state = {"step": torch.zeros((), dtype=torch.float32, device=device if device.type == "cuda" else "cpu")}
    if rule == "adamw":
        return state | {"exp_avg": like(), "exp_avg_sq": like()}
    momentum, second = _accumulator_dtypes(parameter, dtype)
    state |= {key: like(momentum) for key in MOMENTUM_KEYS} | {"second_moment": like(second)}
    if is_dtensor(parameter):
        return state | _sharded_factors(parameter, view, dtype)
    if parameter.ndim < 2:
        return state | {"factor": zeros(parameter.numel(), 3)}
    if momentum == torch.int8:
        matrices = view.matrices(state[MOMENTUM_KEYS[0]])
        which, length = (1, matrices.shape[1]) if is_transposed(matrices) else (0, matrices.shape[2])
        state["momentum_scale"] = zeros(*view.factor_shapes(parameter.shape)[which][:-1], quanta(length), 3)
    check_state(parameter, rule, view, dtype)
    row, column = view.factor_shapes(parameter.shape)
    order = view.order(parameter)
    if order is None:
        return state | {"row_factor": zeros(*row), "column_factor": zeros(*column)}
    # the axes of the columns, in the order of the parameter's memory
    factor = zeros(*(parameter.shape[axis] for axis in order[1:]), 3)
    inverse = [order[1:].index(axis) for axis in range(1, parameter.ndim)]
    return state | {"row_factor": zeros(*row), "column_factor": factor.permute(*inverse, -1)}


def check_state(parameter: Tensor, rule: str, view: MatrixView, dtype: str) -> None:
    """Raise ValueError for a parameter whose state could not be made: for its layout, or 8 bits of cut columns."""
    if rule == "adamw" or parameter.ndim < 2:
        return
    if not is_dtensor(parameter):
        view.matrices(parameter.detach())
        return
    layout = layout_of(parameter, view)
    if dtype == "int8" and parameter.dtype != torch.float64:
        # 64 neighbours in a row share a scale
        if layout is not None and layout.cuts_columns:
            raise ValueError(
                "state_dtype='int8' is not there for parameters whose columns are sharded: shard rows or a leading "
                "axis, or use 'bfloat16' or 'float32'"
            )
        if not local(parameter).is_contiguous():
            raise ValueError(
                f"state_dtype='int8' needs contiguous shards, and this one has strides {local(parameter).stride()}; "
                "use 'bfloat16' or 'float32'"
            )


def layout_of(parameter: Tensor, view: MatrixView) -> ShardLayout | None:
    """Return how the matrices of a DTensor are sharded, None where every rank has them whole.

    Raises ValueError for a layout that is not supported, and for a shard that is another part of the parameter than
    its placements say.
    """
    from celo2.shard_layout import ShardLayout, box
    from celo2.sharding import shard_spec_of

    spec = shard_spec_of(parameter)
    if spec is None:
        return None
    cuts, rank = spec.own_cuts()
    expected = tuple(stop - start for start, stop in box(parameter.shape, cuts, rank))
    if tuple(local(parameter).shape) != expected:
        raise ValueError(
            f"a rank has {tuple(local(parameter).shape)} of shape {tuple(parameter.shape)}, and its placements "
            f"{spec.cuts} (axis of the tensor, of the mesh) cut it to {expected}: uneven shards of two axes of a mesh "
            "must be cut one after the other, as fully_shard does"
        )
    return ShardLayout.of(parameter.shape, view, cuts)


class LazyStates(defaultdict[Tensor, dict[str, Tensor]]):
    """The state of every parameter of an optimizer, made when it is first asked for.

    A parameter that belongs to no group has none: what is asked for is an empty dict of nobody.
    """

    def __init__(self, make: Callable[[Tensor], dict[str, Tensor] | None], states: Mapping[Tensor, Any]) -> None:
        super().__init__(None, states)
        self._make = make

    def __missing__(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self._make(parameter)
        if state is None:
            return {}
        self[parameter] = state
        return state

    def __reduce__(self) -> Any:
        # a plain dict: the optimizer that takes it makes what is missing
        return dict, (dict(self),)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; only then is the module of them loaded, which costs half of `import celo2`."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, on the same storage; a plain tensor is its own part."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def shard_spec_of(parameter: Tensor) -> ShardSpec | None:
    """As `celo2.sharding.shard_spec_of`, imported here for tensors that have loaded `torch.distributed` already."""
    from celo2 import sharding

    return sharding.shard_spec_of(parameter)


def _sharded_factors(parameter: Tensor, view: MatrixView, dtype: str) -> dict[str, Tensor]:
    """Return zero factors on the parameter's mesh, sharded along the axis that they share with it."""
    from celo2.sharding import zeros_placed

    wide = compute_dtype(parameter)
    if parameter.ndim < 2:
        return {"factor": zeros_placed((parameter.numel(), 3), parameter, {0: 0}, wide)}
    check_state(parameter, "celo2", view, dtype)
    layout, shapes = layout_of(parameter, view), view.factor_shapes(parameter.shape)
    axes = range(parameter.ndim)
    factor_axes = [(None, None) if layout is None else layout.factor_axes(axis) for axis in axes]
    by_row, by_column = ({axis: factor_axes[axis][which] for axis in axes} for which in range(2))
    state: dict[str, Tensor] = {}
    if dtype == "int8" and wide == torch.float32:
        scales = *shapes[0][:-1], quanta(view.shape(parameter.shape)[2]), 3
        state["momentum_scale"] = zeros_placed(scales, parameter, by_row, wide)
    return state | {
        "row_factor": zeros_placed(shapes[0], parameter, by_row, wide),
        "column_factor": zeros_placed(shapes[1], parameter, by_column, wide),
    }


def _accumulator_dtypes(parameter: Tensor, dtype: str) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of the momenta and of the second moment; a vector is too short for 8 bits to matter."""
    wide = compute_dtype(parameter)
    if wide == torch.float64:
        return wide, wide
    return (wide, wide) if parameter.ndim < 2 and dtype == "int8" else STATE_DTYPES[dtype]


def is_transposed(matrices: Tensor) -> bool:
    """Whether [B, m, n] is stored by columns."""
    _, m, n = matrices.shape
    return matrices.stride(-2) == 1 and m > 1 and (matrices.stride(-1) != 1 or n == 1)


def quantised_matrices(view: MatrixView, tensor: Tensor, momentum: Tensor) -> Tensor:
    """View `tensor` as matrices whose rows are those that lie in the memory of `momentum` as rows.

    The columns that share a scale are neighbours there.
    """
    matrices = view.matrices(tensor)
    return matrices.mT if is_transposed(view.matrices(momentum)) else matrices


def scales_of(state: dict[str, Tensor], matrices: int) -> Tensor:
    """View the scales of 8-bit momenta by matrix, [matrices, rows, quanta, 3]."""
    scale = state["momentum_scale"]
    return scale.view(matrices, -1, *scale.shape[-2:])


def read_momenta(state: dict[str, Tensor], view: MatrixView) -> list[Tensor]:
    """Return the three momenta as they are, or the values of 8-bit ones in float32 tensors of their own."""
    momenta = [state[key] for key in MOMENTUM_KEYS]
    if "momentum_scale" not in state:
        return momenta
    values = []
    for k, momentum in enumerate(momenta):
        value = torch.empty_like(momentum, dtype=torch.float32)
        levels = quantised_matrices(view, momentum, momentum)
        scale = scales_of(state, levels.shape[0])[..., k]
        quantised_matrices(view, value, momentum).copy_(dequantise(levels, scale))
        values.append(value)
    return values


def write_momenta(state: dict[str, Tensor], view: MatrixView, values: list[Tensor], seed: int) -> None:
    """Store the values of 8-bit momenta, rounded by random bits of `seed` (below 2**64)."""
    for k, (key, value) in enumerate(zip(MOMENTUM_KEYS, values, strict=True)):
        momentum = state[key]
        levels = quantised_matrices(view, momentum, momentum)
        scale = scales_of(state, levels.shape[0])[..., k]
        quantise_(levels, scale, quantised_matrices(view, value, momentum), mix64(seed + k) >> 32)


def follow_parameter(
    state: dict[str, Tensor], parameter: Tensor, rule: str, view: MatrixView, dtype: str = "float32"
) -> None:
    """Move the state to where the parameter is, when `module.to(...)` changed its dtype, device or strides.

    Raises ValueError when the parameter's shape is another.
    """
    like = state["exp_avg" if rule == "adamw" else MOMENTUM_KEYS[0]]
    expected = compute_dtype(parameter) if rule == "adamw" else _accumulator_dtypes(parameter, dtype)[0]
    if like.shape != parameter.shape:
        raise ValueError(
            f"its shape is {tuple(parameter.shape)} and that of its state {tuple(like.shape)}: a parameter whose data "
            "got another shape is another one; put it into a new group, or construct the optimizer again"
        )
    if is_dtensor(parameter):
        return
    # the kernels read the counter on the device
    counted = parameter.device.type != "cuda" or state["step"].device == parameter.device
    if like.device == parameter.device and like.dtype == expected and _like(like, parameter) and counted:
        return
    moved = create_state(parameter, rule, view, dtype)
    quantised = "momentum_scale" in moved
    values = {} if rule == "adamw" else dict(zip(MOMENTUM_KEYS, read_momenta(state, view), strict=True))
    for key, value in moved.items():
        if key != "momentum_scale" and not (quantised and key in values):
            value.copy_(values.get(key, state[key]).reshape(value.shape))
    if quantised:
        wide = [torch.empty_like(moved[key], dtype=torch.float32).copy_(value) for key, value in values.items()]
        write_momenta(moved, view, wide, seed=0)
    state.clear()
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
        if entry == "momentum_scale":
            # momenta of 8 bits are converted, and to them
            continue
        if entry not in saved:
            raise ValueError(
                f"state dict of another optimizer: {name} has {', '.join(sorted(saved))} and no {entry}; construct "
                "FusedCelo2 with the rules (overrides=) and views that it was saved with"
            )
        shape = tuple(_tensor(saved[entry]).shape)
        if entry == "column_factor" and len(shape) != value.ndim and math.prod(shape) == value.numel():
            # of a parameter in another memory format
            continue
        if shape != tuple(value.shape):
            raise ValueError(
                f"state dict of another model: {entry} of {name} has shape {shape}, expected {tuple(value.shape)}"
            )


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value)


def copy_saved_state(saved: dict[str, Any], state: dict[str, Tensor], view: MatrixView) -> None:
    """Copy checked saved values into the state, which keeps its dtypes, devices and strides.

    Momenta saved in another `state_dtype` are converted, 8-bit ones by their scales.
    """
    values = {entry: _tensor(saved[entry]) for entry in state if entry in saved and entry != "momentum_scale"}
    if _same_levels(saved, state):
        # of an earlier version it is [matrices, rows, quanta, 3]
        scale = _tensor(saved["momentum_scale"])
        whole = scale.shape == state["momentum_scale"].shape
        values["momentum_scale"] = scale if whole else scale.reshape(state["momentum_scale"].shape)
    elif ("momentum_scale" in saved) != ("momentum_scale" in state) and any(map(is_dtensor, state.values())):
        raise ValueError("momenta of sharded parameters are not converted from or to 8 bits: load whole ones")
    elif "momentum_scale" in saved:
        values.update(zip(MOMENTUM_KEYS, read_momenta({**saved, **values}, view), strict=True))
    if "momentum_scale" in state and "momentum_scale" not in values:
        momenta = [torch.empty_like(state[key], dtype=torch.float32).copy_(values.pop(key)) for key in MOMENTUM_KEYS]
        write_momenta(state, view, momenta, seed=0)
    for entry, value in values.items():
        if entry == "column_factor" and value.ndim != state[entry].ndim:
            value = value.reshape(state[entry].shape)
        state[entry].copy_(placed(value, state[entry]))


def _same_levels(saved: dict[str, Any], state: dict[str, Tensor]) -> bool:
    """Whether both are 8-bit momenta in the same order in memory, which the scales go by."""
    if "momentum_scale" not in saved or "momentum_scale" not in state:
        return False
    return all(saved[key].stride() == state[key].stride() for key in MOMENTUM_KEYS)


def placed(saved: Tensor, like: Tensor) -> Tensor:
    """Return a saved tensor placed on the ranks as `like` is; collective when it is sharded otherwise."""
    if not (is_dtensor(saved) or is_dtensor(like)):
        return saved
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(saved, DTensor):
        if isinstance(like, DTensor) and saved.device_mesh == like.device_mesh:
            return saved
        saved = saved.full_tensor()
    if isinstance(like, DTensor):
        # every rank has all of it: without a message
        return distribute_tensor(saved.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return saved
