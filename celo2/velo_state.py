"""The state of a parameter under VeLO, and of all of them together.

`momentum_fast`, `momentum_medium`, `momentum_slow` and `second_moment` like the parameter; `row_factor` [rest, m, 3],
`column_factor` [rest, n, 3] in the rule's order of axes (`velo_rule.axis_order`), or `factor` [n, 3] for fewer than two
axes; `hidden` and `cell`, the LSTM's. Every parameter also has what all share, the same tensors: `step`, 0-d, the steps
taken; `loss_buffer` [2, 10]; `skipped`, 0-d, the steps that were not taken. The state of a sharded parameter is sharded
as it is, what belongs to the LSTM is on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from celo2.groups import named_parameters
from celo2.loading import find_sources
from celo2.state import MOMENTUM_KEYS, compute_dtype, is_dtensor, placed
from celo2.velo_rule import FIRST_MINIMUM, LOSS_DECAYS

# of an optimizer and not of what it saves
OWN_KEYS = frozenset({"params", "param_names", "weights", "num_steps", "linear"})
SHARED_KEYS = ("step", "loss_buffer", "skipped")


def create_shared(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Return what all parameters share before the first step."""
    buffer = torch.zeros(2, LOSS_DECAYS, dtype=dtype, device=device)
    buffer[1] = FIRST_MINIMUM
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "loss_buffer": buffer,
        "skipped": torch.zeros((), dtype=torch.int64, device=device),
    }


def create_velo_state(parameter: Tensor, order: tuple[int, ...], lstm: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a parameter's own accumulators, zero, and the LSTM's first `hidden` and `cell` out of `lstm`, [1, L]."""
    wide, device, shape = compute_dtype(parameter), parameter.device, parameter.shape
    state = {
        key: torch.zeros_like(parameter, dtype=wide, memory_format=torch.preserve_format, requires_grad=False)
        for key in (*MOMENTUM_KEYS, "second_moment")
    }
    *rest, rows, columns = (None, None, *order) if parameter.ndim < 2 else order
    factors: dict[str, tuple[Any, ...]] = {"row_factor": (*rest, rows), "column_factor": (*rest, columns)}
    if parameter.ndim < 2:
        factors = {"factor": tuple(order)}
    for key, axes in factors.items():
        sizes = (*(shape[axis] for axis in axes), 3) if axes else (1, 3)
        if is_dtensor(parameter):
            from celo2.sharding import zeros_placed

            axis_of = {axis: axes.index(axis) if axis in axes else None for axis in range(max(1, parameter.ndim))}
            state[key] = zeros_placed(sizes, parameter, axis_of, wide)
        else:
            state[key] = torch.zeros(sizes, dtype=wide, device=device)
    state |= {name: lstm[name][0].to(device, copy=True) for name in ("hidden", "cell")}
    return state


def follow_velo_parameter(state: dict[str, Tensor], parameter: Tensor) -> None:
    """Move the state to where the parameter is, when `module.to(...)` changed its dtype or device.

    Raises ValueError when the parameter's shape is another.
    """
    like, wide = state["second_moment"], compute_dtype(parameter)
    if like.shape != parameter.shape:
        raise ValueError(
            f"its shape is {tuple(parameter.shape)} and that of its state {tuple(like.shape)}: a parameter whose data "
            "got another shape is another one; construct the optimizer again"
        )
    if is_dtensor(parameter) or (like.device == parameter.device and like.dtype == wide):
        return
    for key, value in state.items():
        if key not in SHARED_KEYS:
            state[key] = value.to(parameter.device, value.dtype if key in ("hidden", "cell") else wide)


def check_saved_velo_state(name: str, parameter: Tensor, saved: Any, state: dict[str, Tensor]) -> None:
    """Raise ValueError when saved state does not fit a parameter's."""
    if saved is None:
        if parameter.requires_grad:
            raise ValueError(f"state dict has no state for parameter {name}: it is incomplete")
        return
    for key, value in state.items():
        if key not in saved:
            raise ValueError(f"state dict of another optimizer: {name} has {', '.join(sorted(saved))} and no {key}")
        shape = tuple(torch.as_tensor(saved[key]).shape)
        if shape != tuple(value.shape):
            raise ValueError(
                f"state dict of another model: {key} of {name} has shape {shape}, expected {tuple(value.shape)}"
            )


def copy_saved_velo_state(saved: Mapping[str, Any], state: dict[str, Tensor]) -> None:
    """Copy checked saved values into the state, which keeps its dtypes and devices."""
    for key, value in state.items():
        value.copy_(placed(torch.as_tensor(saved[key]), value))


def is_on_host(flag: Tensor) -> bool:
    """Whether reading a flag does not wait for a device."""
    return flag.device.type == "cpu"


def names_of(module: nn.Module) -> dict[Tensor, tuple[str, bool]]:
    """Return the name of every parameter of a module, and whether it is a square weight of an `nn.Linear` alone."""
    linear: set[Tensor] = set()
    other: set[Tensor] = set()
    for member in module.modules():
        for name, parameter in member.named_parameters(recurse=False):
            is_weight = isinstance(member, nn.Linear) and name == "weight"
            (linear if is_weight and parameter.shape[:1] == parameter.shape[1:] else other).add(parameter)
    return {parameter: (name, parameter in linear - other) for name, parameter in module.named_parameters()}


def split_square_weights(
    group: dict[str, Any], named: Mapping[Tensor, tuple[str, bool]] | None
) -> list[dict[str, Any]]:
    """Return a group as those of tensors taken as they are, and of square weights of `nn.Linear`, with names."""
    if named is None:
        return [group]
    parts: dict[bool, list[Any]] = {}
    for entry in group["params"]:
        name, parameter = entry if isinstance(entry, tuple) else ("", entry)
        if parameter not in named:
            raise ValueError(
                f"a group has a tensor of shape {tuple(parameter.shape)} that is not a parameter of the module "
                "given as module=: pass the module that it was taken from"
            )
        own_name, linear = named[parameter]
        parts.setdefault(group.get("linear", linear), []).append((name or own_name, parameter))
    return [{**group, "params": members, "linear": linear} for linear, members in sorted(parts.items())]


def match_velo_state(
    state_dict: dict[str, Any], here: list[dict[str, Any]], state_of: Callable[[Tensor], dict[str, Tensor]]
) -> dict[str, Any]:
    """Return a saved state dict by the groups and positions of an optimizer; raises ValueError when it does not fit."""
    saved_groups, states = state_dict["param_groups"], state_dict["state"]
    groups, matched, position = [], {}, 0
    found = find_sources(saved_groups, states, here)
    for index, (group, sources) in enumerate(zip(here, found, strict=True)):
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for number in dict.fromkeys(source.group for source in sources):
            check_saved_options(index, group, saved_groups[number])
        if sources:
            saved = saved_groups[sources[0].group]
            options |= {key: value for key, value in saved.items() if key not in OWN_KEYS}
        options["params"] = []
        for source, (name, parameter) in zip(sources, named_parameters(group), strict=True):
            options["params"].append(position)
            if states:
                check_saved_velo_state(name, parameter, states.get(source.key), state_of(parameter))
            if source.key in states:
                matched[position] = states[source.key]
            position += 1
        groups.append(options)
    return {**state_dict, "state": matched, "param_groups": groups}


def check_saved_options(index: int, group: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise ValueError for a group saved by another optimizer, or by VeLO with other weights or another horizon."""
    for key in ("weights", "num_steps", "linear"):
        if key not in saved:
            raise ValueError(f"state dict of another optimizer: group {index} has no {key!r}")
        there, here = saved[key], group[key]
        if key == "weights":
            there, here = str(there).rpartition("@")[2], here.rpartition("@")[2]
        if there != here:
            raise ValueError(
                f"state dict of another optimizer: group {index} was saved with {key}={saved[key]!r}, this optimizer "
                f"has {group[key]!r}; construct VeLO with the saved value"
            )
