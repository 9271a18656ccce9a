"""Which rule steps a parameter, and why: by the type of its module, its number of axes and its name.

Source: Celo2, deployment rule (the authors route `ndim <= 1 or "embed" in path` to AdamW, input and output embeddings
both).

| kind | rule | what |
|---|---|---|
| `matrix` | celo2 | hidden matrices and convolutions |
| `embedding` | adamw | lookup tables of tokens and positions, by type or name |
| `head` | adamw | output projections, by name, outside of numbered blocks |
| `vector` | adamw | fewer than two axes, and parameters of norms |
| `override` | either | what a pattern of the user says |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.modules.batchnorm._NormBase)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
# a path component that names an embedding: token_embedding, embed_tokens, pos_embed, wte, wpe, cls_token
_EMBEDDING_NAME = re.compile(r"embed|^wte$|^wpe$|_token$")
# the module that owns an output head; only outside repeated blocks (no numbered component), since blocks may have an
# `output` projection of their own
_HEAD_NAMES = frozenset(
    {"lm_head", "head", "heads", "output", "embed_out", "unembed", "unembedding", "classifier", "logits", "score", "fc"}
)


class Route(NamedTuple):
    """Where a parameter goes. `flatten` is the `MatrixView.flatten` that its module asks for, None for the default."""

    name: str
    parameter: Tensor
    kind: str
    rule: str
    reason: str
    flatten: bool | None


def route_name(name: str, shape: torch.Size) -> tuple[str, str, str]:
    """Return kind, rule and reason of a tensor of which name (`""` for none) and shape are all that is known."""
    if len(shape) < 2:
        return "vector", "adamw", "fewer than two axes"
    components = name.split(".")
    for component in components:
        if _EMBEDDING_NAME.search(component):
            return "embedding", "adamw", f"name of an embedding: {component}"
    numbered = any(component.isdecimal() for component in components)
    owner = components[-2] if len(components) > 1 else ""
    if not numbered and owner in _HEAD_NAMES:
        return "head", "adamw", f"name of an output head: {owner}"
    return "matrix", "celo2", "hidden matrix"


def route_module(module: nn.Module, *, overrides: Mapping[str, str] | None = None) -> list[Route]:
    """Return the route of every parameter once, under its first name, in order; by AdamW when any of its uses says so.

    `overrides` maps patterns of names (`fnmatch`) to `"celo2"` or `"adamw"`; the last that matches wins. Raises
    ValueError for a pattern that matches no parameter, and for an unknown rule.
    """
    overrides = overrides or {}
    for pattern, rule in overrides.items():
        if rule not in ("celo2", "adamw"):
            raise ValueError(f"overrides: {pattern!r} is given rule {rule!r}, allowed: celo2, adamw")
    unused, owners = set(overrides), dict(module.named_modules(remove_duplicate=False))
    routes: dict[int, Route] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owner = owners[name.rpartition(".")[0]]
        kind, rule, reason = route_name(name, parameter.shape)
        if parameter.ndim > 1 and isinstance(owner, _EMBEDDINGS):
            kind, rule, reason = "embedding", "adamw", f"nn.{type(owner).__name__}"
        elif isinstance(owner, _NORMS):
            kind, rule, reason = "vector", "adamw", f"gain or bias of {type(owner).__name__}"
        for pattern, given in overrides.items():
            if fnmatchcase(name, pattern):
                kind, rule, reason = "override", given, f'override "{pattern}"'
                unused.discard(pattern)
        flatten = True if isinstance(owner, _CONVOLUTIONS) and parameter.ndim > 2 else None
        first = routes.setdefault(id(parameter), Route(name, parameter, kind, rule, reason, flatten))
        if kind == "override" or (first.kind != "override" and first.rule == "celo2" and rule == "adamw"):
            routes[id(parameter)] = first._replace(kind=kind, rule=rule, reason=reason)
    if unused:
        raise ValueError(f"overrides: {', '.join(map(repr, sorted(unused)))} matches no parameter of the module")
    return list(routes.values())
