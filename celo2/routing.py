"""Parameter groups of a module: embeddings, heads, norms and biases for AdamW, hidden matrices for the learned rule.

Source: Celo2, deployment rule (the authors route `ndim <= 1 or "embed" in path` to AdamW, input and output embeddings
both). `celo2.routes` decides for each parameter, `FusedCelo2.table()` prints the result.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from celo2.matrices import MatrixView
from celo2.routes import Route, route_module
from celo2.theta import VARIANTS

RULES = ("auto", "celo2", "adamw")
# kinds of parameters without weight decay, unless told otherwise
VECTORS = frozenset({"vector", "state"})


def check_variant(variant: str) -> None:
    """Raise ValueError for an unknown variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r}, allowed: {', '.join(VARIANTS)}")


def param_groups(
    module: nn.Module,
    *,
    variant: str = "celo2",
    views: Mapping[str, MatrixView] | None = None,
    overrides: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Return parameter groups for `FusedCelo2`, with every parameter of `module` once.

    One group for each rule, kind (hidden matrices, embeddings, heads, vectors) and matrix view, the learned rule's
    first. `variant="celo2"` routes by `celo2.routes.route_module`; `"celo2-base"` sends everything to the learned rule.
    A tied weight counts once, under its first name, and goes to AdamW when any of its uses does. Frozen parameters are
    kept, for when they are unfrozen: they have no state until then. `views` maps parameter names, or
    patterns of them, to their `MatrixView`, `{"h.*.c_attn.weight": MatrixView(split=3)}`; the last that matches wins;
    convolution kernels are flattened to `[out, in * kh * kw]` without one. `overrides` maps patterns of names to a
    rule, `{"*.router.*": "adamw"}`; the last that matches wins. A group's `reasons` say by name why a parameter is
    there.

    Raises ValueError for an unknown variant or rule, for a name or pattern without a match, and for a view
    that does not fit.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"param_groups takes a torch.nn.Module, got {type(module).__name__}")
    check_variant(variant)
    routes = route_module(module, overrides=overrides)
    views = _match_views(views or {}, routes)
    if not any(route.parameter.requires_grad for route in routes):
        raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient")

    groups: dict[tuple[str, str, MatrixView], dict[str, Any]] = {}
    for route in routes:
        rule = rule_of_route(route, variant)
        if rule == "adamw" and route.name in views:
            warnings.warn(f"the matrix view of {route.name} is not used: AdamW steps it whole", stacklevel=2)
        view = views.get(route.name, view_of_route(route)) if rule == "celo2" else MatrixView()
        view.check(route.parameter.shape, route.name)
        kind = kind_of_route(route, rule)
        group = groups.setdefault(
            (rule, kind, view), {"params": [], "rule": rule, "kind": kind, **view_options(view), "reasons": {}}
        )
        group["params"].append((route.name, route.parameter))
        group["reasons"][route.name] = describe(route, variant, viewed=route.name in views)
    # what others log is the first group's rate
    return sorted(groups.values(), key=lambda group: (group["rule"] != "celo2", group["kind"] in VECTORS))


def _match_views(views: Mapping[str, MatrixView], routes: Sequence[Route]) -> dict[str, MatrixView]:
    """Return the views by name that names and patterns of them ask for."""
    found: dict[str, MatrixView] = {}
    unknown = []
    for pattern, view in views.items():
        names = [route.name for route in routes if fnmatchcase(route.name, pattern)]
        found.update(dict.fromkeys(names, view))
        if not names:
            unknown.append(pattern)
    if unknown:
        raise ValueError(f"views for unknown parameters {unknown}; names are those of module.named_parameters()")
    return found


def rule_of_route(route: Route, variant: str) -> str:
    """Return the rule of a parameter under a theta's variant: everything is learned by one of `"celo2-base"`."""
    return "celo2" if variant == "celo2-base" and route.kind != "override" else route.rule


def kind_of_route(route: Route, rule: str) -> str:
    """Return the kind that a group is of: vectors are those of either rule."""
    if route.parameter.ndim < 2 or route.kind in VECTORS:
        return "vector"
    return "matrix" if rule == "celo2" else route.kind


def view_of_route(route: Route) -> MatrixView:
    """Return the matrix view that the type of a parameter's module asks for."""
    return MatrixView(flatten=route.flatten)


def describe(route: Route, variant: str, *, viewed: bool = False) -> str:
    """Return why a parameter goes where it goes, and the view that would split it."""
    everything = variant == "celo2-base" and route.kind != "override"
    reason = "celo2-base: everything is learned" if everything else route.reason
    return reason if viewed or route.hint is None else f"{reason}; {route.hint}"


def view_options(view: MatrixView) -> dict[str, Any]:
    """Return a view as the plain values of a parameter group."""
    return {"split": view.split, "heads": view.heads, "axis": view.axis, "flatten": view.flatten}
