"""Parameter groups of `FusedCelo2`: what their options mean, and the checks that refuse bad ones by name."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from celo2.matrices import MatrixView
from celo2.routes import Route, route_name
from celo2.routing import (
    RULES,
    VECTORS,
    describe,
    kind_of_route,
    rule_of_route,
    view_of_route,
    view_options,
)
from celo2.skips import warn_caller
from celo2.state import STATE_DTYPES

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def named_parameters(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Return (name, parameter) pairs; a group without names counts its parameters."""
    names = group.get("param_names") or [f"parameter {index}" for index in range(len(group["params"]))]
    return list(zip(names, group["params"], strict=True))


def group_view(group: dict[str, Any]) -> MatrixView:
    """Return the matrix view of a group's parameters; raises ValueError for options out of range."""
    return MatrixView(group["split"], group["heads"], group["axis"], group["flatten"])


class _Part(NamedTuple):
    """What the parameters of one group have in common."""

    rule: str
    kind: str
    view: MatrixView


def split_group(
    group: dict[str, Any], defaults: dict[str, Any], variant: str, routes: Mapping[Tensor, Route] | None = None
) -> list[dict[str, Any]]:
    """Return a group as those of one rule and kind, with the learning rate and weight decay that they step with.

    In a group with `rule="auto"` these two are the learned rule's, and of AdamW's parts they become
    `adam_lr_mult * lr` and `adam_weight_decay`; a group with a rule that gives them is taken at its word. Vectors have
    `vector_weight_decay`. `routes` are those of a module, for all parameters that it has; others go by name and shape.
    """
    options = {**defaults, **group}
    given = {key: value for key, value in group.items() if key not in ("params", "param_names", *DERIVING, "reasons")}
    entries = [entry if isinstance(entry, tuple) else ("", entry) for entry in group["params"]]
    rules_decide = options["rule"] == "auto"
    parts: dict[_Part, dict[str, Any]] = {}
    for entry, (name, parameter) in zip(group["params"], entries, strict=True):
        if routes is not None and name == "" and parameter not in routes:
            raise ValueError(
                f"a group has a tensor of shape {tuple(parameter.shape)} that is not a parameter of the module given "
                "as module=: pass the module that the trainer took them from"
            )
        part, reason = _part_of(name, parameter, options, variant, None if routes is None else routes.get(parameter))
        if not rules_decide and ("weight_decay" in group or "kind" in group):
            part = _Part(part.rule, group.get("kind", ""), part.view)
        added = parts.setdefault(
            part, {**given, "rule": part.rule, "kind": part.kind, "view": part.view, "params": [], "reasons": {}}
        )
        if routes is not None and name == "":
            name = routes[parameter].name
            entry = (name, parameter)
        added["params"].append(entry)
        added["reasons"][name] = group.get("reasons", {}).get(name, reason)
    for part, added in parts.items():
        added.update(view_options(added.pop("view")))
        derived = part.rule == "adamw" and (rules_decide or "lr" not in group)
        lr = options["lr"]
        added["lr"] = lr * options["adam_lr_mult"] if derived else lr
        if not isinstance(lr, Tensor):
            added["lr"] = float(added["lr"])
        added.setdefault("lr_mult", float(options["adam_lr_mult"]) if derived else 1.0)
        if rules_decide or "weight_decay" not in group:
            decay = options["weight_decay"]
            if part.rule == "adamw" and options["adam_weight_decay"] is not None:
                decay = options["adam_weight_decay"]
            if part.kind in VECTORS and options["vector_weight_decay"] is not None:
                decay = options["vector_weight_decay"]
            added["weight_decay"] = decay
    # what others log is the first group's rate
    return sorted(parts.values(), key=lambda added: (added["rule"] != "celo2", added["kind"] in VECTORS))


def _part_of(
    name: str, parameter: Tensor, options: dict[str, Any], variant: str, route: Route | None
) -> tuple[_Part, str]:
    """Return where a parameter of a group goes, and why."""
    if route is None:
        kind, rule, reason = route_name(name, parameter.shape)
        route = Route(name, parameter, kind, rule, reason, None, None)
    elif options["flatten"] is None:
        options = {**options, "flatten": view_of_route(route).flatten}
    rule = rule_of_route(route, variant) if options["rule"] == "auto" else options["rule"]
    if options["rule"] != "auto":
        # a rule was given: shape alone says what is a vector
        kind = "vector" if parameter.ndim < 2 else "matrix"
        reason = f"rule={rule!r}"
    else:
        kind, reason = kind_of_route(route, rule), describe(route, variant)
    view = (
        group_view(options) if rule == "celo2" and (parameter.ndim > 1 or options["rule"] != "auto") else MatrixView()
    )
    return _Part(rule, kind, view), reason


# options that decide the rate and the decay of a group when it is added, and are not its own afterwards
DERIVING = ("adam_lr_mult", "adam_weight_decay", "vector_weight_decay")


def check_number(name: str, value: Any, *, none: bool = False, positive: bool = False) -> None:
    if value is None and none:
        return
    if isinstance(value, Tensor):
        if value.ndim or value.is_complex():
            raise ValueError(f"{name} as a tensor must be a real 0-d tensor, got shape {tuple(value.shape)}")
        if value.is_meta:
            return
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r}: must be a number{' or None' if none else ''}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name}={value!r}: must be finite and {'greater than' if positive else 'at least'} 0")


def check_options(group: dict[str, Any]) -> None:
    """Raise for an option out of range, naming it."""
    for name in ("lr", "weight_decay", "adam_lr_mult", "adam_eps"):
        check_number(name, group[name])
    for name in ("adam_weight_decay", "vector_weight_decay"):
        check_number(name, group[name], none=True)
    check_number("max_grad_norm", group["max_grad_norm"], none=True, positive=True)
    betas = group["adam_betas"]
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
        raise ValueError(f"adam_betas={betas!r}: must be two numbers")
    for index, beta in enumerate(betas):
        check_number(f"adam_betas[{index}]", beta)
        if not beta < 1:
            raise ValueError(f"adam_betas[{index}]={beta!r}: must be less than 1")
    steps = group["ns_steps"]
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"ns_steps={steps!r}: must be a whole number of at least 1")
    if group["orthogonalize"] not in (None, True, False):
        raise ValueError(f"orthogonalize={group['orthogonalize']!r}: must be True, False or None")
    if group["rule"] not in RULES:
        raise ValueError(f"rule={group['rule']!r}, allowed: {', '.join(RULES)}")
    if group["state_dtype"] not in STATE_DTYPES:
        raise ValueError(f"state_dtype={group['state_dtype']!r}, allowed: {', '.join(STATE_DTYPES)}")
    group_view(group)


def use_plain_numbers(options: dict[str, Any]) -> None:
    """Turn NumPy's scalars among the options into Python's, which `torch.load` reads by default."""
    for name, value in options.items():
        if isinstance(value, np.generic):
            options[name] = value.item()
        elif isinstance(value, (tuple, list)) and any(isinstance(entry, np.generic) for entry in value):
            plain = (entry.item() if isinstance(entry, np.generic) else entry for entry in value)
            options[name] = type(value)(plain)


# options of other optimizers: what to write instead
_FOREIGN = {
    "betas": "adam_betas=, of the AdamW side (the learned rule has decays of its own)",
    "eps": "adam_eps=, of the AdamW side",
    "momentum": "nothing: the learned rule has momenta of its own",
    "nesterov": "nothing: the learned rule has momenta of its own",
    "maximize": "a negated loss",
    "amsgrad": "nothing: there is no such form",
}
# that say how to compute, and not what
WITHOUT_EFFECT = frozenset({"fused", "foreach", "capturable", "differentiable"})


def check_foreign_options(options: dict[str, Any]) -> None:
    """Raise TypeError for an option of another optimizer, with what is meant here; some are harmless when false."""
    for name, value in options.items():
        if name in WITHOUT_EFFECT or (name in ("maximize", "amsgrad", "nesterov") and not value):
            continue
        if name not in _FOREIGN:
            raise TypeError(f"FusedCelo2 has no option {name!r}")
        raise TypeError(f"{name}={value!r}: FusedCelo2 takes {_FOREIGN[name]}")


def renamed(options: dict[str, Any], old: str, new: str, value: Any) -> Any:
    """Take an option under a name that it had before, with a warning; `value` is that under its new one."""
    if old not in options:
        return value
    warn_caller(f"{old}= is {new}= now, and the old name will go")
    return options.pop(old)


def list_parameters(group: dict[str, Any]) -> list[Any]:
    """Return a group's parameters as a list; raises TypeError for what has no order or holds none."""
    parameters: Any = group.get("params")
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, (set, frozenset)):
        raise TypeError("parameters come in a set, whose order changes between runs; pass a list")
    if isinstance(parameters, nn.Module) or not hasattr(parameters, "__iter__"):
        raise TypeError(
            f"a parameter group needs params=, tensors or (name, tensor) pairs, got {type(parameters).__name__}; pass "
            "module.named_parameters(), or FusedCelo2(module)"
        )
    listed, names = list(parameters), group.get("param_names")
    if names is not None and not any(isinstance(entry, tuple) for entry in listed):
        # a group of another optimizer
        return list(zip(names, listed, strict=True))
    return listed


def check_parameters(parameters: list[Any]) -> None:
    """Raise for a parameter that the optimizer cannot update, naming it."""
    seen: set[int] = set()
    for index, entry in enumerate(parameters):
        name, parameter = entry if isinstance(entry, tuple) and len(entry) == 2 else (f"parameter {index}", entry)
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name} is a {type(parameter).__name__}, expected a tensor or a (name, tensor) pair")
        label = f"{name} of shape {tuple(parameter.shape)}"
        if id(parameter) in seen:
            raise ValueError(f"{label} is twice in one group: pass every parameter once (named_parameters() does)")
        seen.add(id(parameter))
        if getattr(parameter, "_is_flat_param", False):
            raise ValueError(
                f"{label} is an FSDP1 flat parameter, which has lost its matrices; use fully_shard (FSDP2)"
            )
        if getattr(parameter, "_fsdp_flattened", False):
            raise ValueError(
                f"{label} is a rank's part of an FSDP1 flat parameter (use_orig_params=True), which has lost its "
                "matrices; use fully_shard (FSDP2)"
            )
        # a tensor can only be sharded by a module that is loaded; importing it costs half of `import celo2`
        sharded = sys.modules.get("torch.distributed.tensor")
        if sharded is not None and isinstance(parameter, sharded.DTensor):
            from celo2.sharding import shard_spec_of

            shard_spec_of(parameter, name)
        if parameter.layout != torch.strided:
            raise ValueError(f"{label} has layout {parameter.layout}: only dense (strided) parameters are supported")
        if parameter.dtype not in DTYPES:
            raise ValueError(
                f"{label} has dtype {parameter.dtype}; allowed: {', '.join(str(dtype) for dtype in DTYPES)}"
            )


def check_gradient(name: str, parameter: Tensor, gradient: Tensor) -> None:
    """Raise for a gradient that the optimizer cannot use, naming the parameter."""
    label = f"gradient of {name}, shape {tuple(parameter.shape)}"
    if gradient.layout != torch.strided:
        raise ValueError(
            f"{label}, is sparse ({gradient.layout}): build the module with sparse=False or call .to_dense()"
        )
    if gradient.is_meta:
        raise ValueError(f"{label}, is a meta tensor: materialise the model before stepping")
    if gradient.dtype not in DTYPES:
        raise ValueError(f"{label}, has dtype {gradient.dtype}; allowed: {', '.join(str(dtype) for dtype in DTYPES)}")
