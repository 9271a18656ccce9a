"""Which parameter gets which rule: embeddings, heads, norms and biases to AdamW, hidden matrices to the learned rule.

Source: Celo2, deployment rule (the authors route `ndim <= 1 or "embed" in path` to AdamW, input and output embeddings
both). `param_groups` does it for a module by type and name; `FusedCelo2.table()` prints the result.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from celo2.matrices import MatrixView
from celo2.theta import VARIANTS

RULES = ("auto", "celo2", "adamw")

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,
)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
# a path component that names an embedding: token_embedding, embed_tokens, pos_embed, wte, wpe, cls_token
_EMBEDDING_NAME = re.compile(r"embed|^wte$|^wpe$|_token$")
# the module that owns an output head; only outside repeated blocks (no numbered component), since blocks may have an
# `output` projection of their own
_HEAD_NAMES = frozenset(
    {"lm_head", "head", "heads", "output", "embed_out", "unembed", "unembedding", "classifier", "logits", "score", "fc"}
)


def name_is_adamw(path: str) -> bool:
    """Whether a parameter's name, as in `module.named_parameters()`, is that of an embedding or an output head."""
    components = path.split(".")
    if any(_EMBEDDING_NAME.search(component) for component in components):
        return True
    numbered = any(component.isdecimal() for component in components)
    owner = components[-2] if len(components) > 1 else ""
    return not numbered and owner in _HEAD_NAMES


def param_groups(
    module: nn.Module, *, variant: str = "celo2", views: Mapping[str, MatrixView] | None = None
) -> list[dict[str, Any]]:
    """Return parameter groups for `FusedCelo2`, one per rule and matrix view, with every parameter of `module` once.

    `variant="celo2"` sends embeddings, the output head, norms and parameters of fewer than two axes to AdamW and the
    rest to the learned rule; `"celo2-base"` sends everything to the learned rule. A tied weight counts once, under its
    first name, and goes to AdamW when any of its uses does. Frozen parameters are kept, for when they are unfrozen:
    they have no state until then. `views` maps parameter names to their `MatrixView`; convolution kernels are flattened
    to `[out, in * kh * kw]` without one.
    Raises ValueError for an unknown variant, an unknown name in `views`, or a view that does not fit.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"param_groups takes a torch.nn.Module, got {type(module).__name__}")
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r}, allowed: {', '.join(VARIANTS)}")
    views = dict(views or {})
    owners = dict(module.named_modules(remove_duplicate=False))
    first_name: dict[int, str] = {}
    adamw: set[int] = set()
    convolution: set[int] = set()
    parameters = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owner = owners[name.rpartition(".")[0]]
        first_name.setdefault(id(parameter), name)
        parameters[id(parameter)] = parameter
        if parameter.ndim < 2 or isinstance(owner, (*_EMBEDDINGS, *_NORMS)) or name_is_adamw(name):
            adamw.add(id(parameter))
        if isinstance(owner, _CONVOLUTIONS) and parameter.ndim > 2:
            convolution.add(id(parameter))
    unknown = sorted(set(views) - set(first_name.values()))
    if unknown:
        raise ValueError(f"views for unknown parameters {unknown}; names are those of module.named_parameters()")

    groups: dict[tuple[str, MatrixView], dict[str, Any]] = {}
    for key, name in first_name.items():
        parameter = parameters[key]
        rule = "adamw" if variant == "celo2" and key in adamw else "celo2"
        if rule == "adamw" and name in views:
            warnings.warn(f"the matrix view of {name} is not used: AdamW steps it whole", stacklevel=2)
        view = (
            views.get(name, MatrixView(flatten=True if key in convolution else None))
            if rule == "celo2"
            else MatrixView()
        )
        view.check(parameter.shape, name)
        group = groups.setdefault((rule, view), {"params": [], "rule": rule, **view_options(view)})
        group["params"].append((name, parameter))
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient")
    return list(groups.values())


def route_groups(params: Iterable[Any], module: nn.Module, *, variant: str = "celo2") -> list[dict[str, Any]]:
    """Return the groups of a trainer that knows nothing of rules, each split by the rules of `module` for its members.

    `params` are tensors, (name, tensor) pairs or groups; a group keeps its options, and one with a `rule` its rule.
    Names and matrix views are the module's. Raises ValueError for a tensor that is not a parameter of the module.
    """
    routed = {
        parameter: (name, group)
        for group in param_groups(module, variant=variant)
        for name, parameter in group["params"]
    }
    groups = list(params)
    if not groups or not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    result: list[dict[str, Any]] = []
    for index, group in enumerate(groups):
        given = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        if given.get("rule") == "auto":
            del given["rule"]
        members = group["params"]
        split: dict[int, dict[str, Any]] = {}
        for entry in [members] if isinstance(members, Tensor) else members:
            parameter = entry[1] if isinstance(entry, tuple) else entry
            if parameter not in routed:
                raise ValueError(
                    f"group {index} has a tensor of shape {tuple(parameter.shape)} that is not a parameter of the "
                    f"{type(module).__name__} given as module=: pass the module that the trainer took them from"
                )
            name, place = routed[parameter]
            options = {key: value for key, value in place.items() if key != "params"}
            part = split.setdefault(0 if "rule" in given else id(place), {"params": [], **options, **given})
            part["params"].append((name, parameter))
        result += split.values()
    return result


def view_options(view: MatrixView) -> dict[str, Any]:
    """Return a view as the plain values of a parameter group."""
    return {"split": view.split, "heads": view.heads, "axis": view.axis, "flatten": view.flatten}


def format_table(header: tuple[str, ...], rows: list[tuple[str, ...]], *, collapse: bool = False) -> str:
    """Align rows of text in columns.

    With `collapse`, rows that differ only in a number within the name, the first cell, become one: `blocks.*.qkv x12`.
    """
    if collapse:
        counts: dict[tuple[str, ...], int] = {}
        for name, *cells in rows:
            key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name), *cells)
            counts[key] = counts.get(key, 0) + 1
        rows = [(f"{name} x{count}" if "*" in name else name, *cells) for (name, *cells), count in counts.items()]
    rows = [header, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
