"""Stub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.modules.batchnorm._NormBase)
_EMBEDDING_NAME = re.compile(r"embed|^wte$|^wpe$|_token$")
_HEAD_NAMES = frozenset(
    {"lm_head", "head", "heads", "output", "embed_out", "unembed", "unembedding", "classifier", "logits", "score", "fc"}
)


class Route(NamedTuple):
    name: str
    parameter: Tensor
    kind: str
    rule: str
    reason: str
    flatten: bool | None
    hint: str | None


def route_name(name: str, shape: torch.Size) -> tuple[str, str, str]:
    if len(shape) < 2:
        return "vector", "adamw", "fewer than two axes"
    components = name.split(".")
    if any(_EMBEDDING_NAME.search(component) for component in components):
        return "embedding", "adamw", "name of an embedding"
    numbered = any(component.isdecimal() for component in components)
    owner = components[-2] if len(components) > 1 else ""
    if not numbered and owner in _HEAD_NAMES:
        return "head", "adamw", "name of an output head"
    return "matrix", "celo2", "matrix"


def route_module(module: nn.Module, *, overrides: Mapping[str, str] | None = None) -> list[Route]:
    owners = dict(module.named_modules(remove_duplicate=False))
    routes: dict[int, Route] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owner = owners[name.rpartition(".")[0]]
        kind, rule, reason = route_name(name, parameter.shape)
        if isinstance(owner, _EMBEDDINGS) and parameter.ndim > 1:
            kind, rule, reason = "embedding", "adamw", "nn.Embedding"
        elif isinstance(owner, _NORMS):
            kind, rule, reason = "vector", "adamw", "norm"
        flatten = True if isinstance(owner, nn.modules.conv._ConvNd) and parameter.ndim > 2 else None
        first = routes.get(id(parameter))
        if first is None:
            routes[id(parameter)] = Route(name, parameter, kind, rule, reason, flatten, None)
        elif first.rule == "celo2" and rule == "adamw":
            routes[id(parameter)] = first._replace(kind=kind, rule=rule, reason=reason)
    return list(routes.values())
