"""Which rule steps a parameter, and why: by module type, place in the tree, shape and name, in that order.

Source: Celo2, deployment rule. The authors route `ndim <= 1 or "embed" in path` to AdamW, which fits their own model;
other people's names differ, so a name decides only what nothing before it did.

| kind | rule | what |
|---|---|---|
| `matrix` | celo2 | hidden matrices, convolutions, experts, routers of experts, LoRA matrices |
| `embedding` | adamw | lookup tables of tokens, and projections of the inputs: patch embeddings |
| `head` | adamw | the last projection, to classes or a vocabulary |
| `table` | adamw | learned positions, biases of attention, latent queries, class tokens: rows that nothing multiplies |
| `vector` | adamw | fewer than two axes longer than 1; gains and biases with more |
| `depthwise` | adamw | convolutions of each channel alone: many tiny filters, no matrix |
| `state` | adamw | decays and mixings of state-space and RWKV layers |
| `override` | either | what a pattern of the user says |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from celo2.matrices import MatrixView
from celo2.module_tree import (
    ADAPTED,
    CONVOLUTIONS,
    EMBEDDING_CLASS,
    EMBEDDINGS,
    HEAD,
    NORM_CLASS,
    NORMS,
    PARAMETRISED,
    REPARAMETRISED,
    ModuleTree,
    Place,
    is_projection,
    is_transposed,
    strip_wrappers,
)

# children of a head that hold its matrix, where only a name is known
_HEAD_CHILD = re.compile(r"^(\d+|fc|linear|proj|out_proj|decoder|default)$")

# modules that embed their inputs: token_embedding, embed_tokens, x_embedder; embeddings of a time are hidden layers
_EMBEDDING = re.compile(r"^(?!time)(\w+_)?embed(s|der|ding|dings)?(_tokens|_in)?$|^wte$|^wpe$")
# parameters that are rows of a table: pos_emb, cls_token, relative_position_bias_table, latents
_TABLE = re.compile(
    r"(^|_)(pos|position|positions|positional|rel|relative|emb|embd|embed|embeds|embedding|embeddings|tokens?|latents?"
    r"|queries|probes?|prompts?|prefix|registers?|codebooks?|tables?|biases|slots|prototypes|wte|wpe)(_|$)"
)
_NO_TABLE = re.compile(r"proj|weight|kernel|^lora_[AB]$")
_GAIN = re.compile(r"(^|_)(bias|gains?|gamma|beta|scales?|temperature|layer_?scale)(_|$)")
_STATE = re.compile(
    r"^(A_logs?|log_A\w*|(log_)?dt(_\w+)?_?bias|log_dt|time_(decay|first|faaaa|mix\w*)|initial_states?)$"
)

_QKV = re.compile(r"^(\w*qkv\w*|c_attn|query_key_value|in_proj_weight)$", re.IGNORECASE)
_KEY_VALUE = re.compile(r"^(kv|kv_proj|key_value)$")
_GATE_UP = re.compile(r"^(gate_up(_proj)?|w12|w13)$")
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")

_RULES = ("celo2", "adamw")


class Route(NamedTuple):
    """Where a parameter of a module goes.

    `name` is its first in `module.named_parameters()`; `kind` is one of the module's table; `rule` is `"celo2"` or
    `"adamw"`, under a theta of the variant `"celo2"`; `reason` says why, for `FusedCelo2.table()`. `flatten` is the
    `MatrixView.flatten` that the module type asks for (True for convolution kernels of three axes, else None). `hint`
    is a matrix view that would split a fused projection, or None.
    """

    name: str
    parameter: Tensor
    kind: str
    rule: str
    reason: str
    flatten: bool | None
    hint: str | None


class _Decision(NamedTuple):
    kind: str
    reason: str

    @property
    def rule(self) -> str:
        return "celo2" if self.kind == "matrix" else "adamw"


def route_module(module: nn.Module, *, overrides: Mapping[str, str] | None = None) -> list[Route]:
    """Return the route of every parameter of `module`, in the order of `named_parameters()`, frozen ones too.

    A tied weight comes once, under its first name, and goes to AdamW when any of its uses does. `overrides` maps
    patterns (`fnmatch`, over names with and without the prefixes of wrappers, of any use) to `"celo2"` or `"adamw"`;
    the last that matches wins. The router of experts, `[experts, width]`, is a matrix unless one says otherwise.

    Raises ValueError for an unknown rule and for a pattern that matches no parameter.
    """
    tree = ModuleTree(module)
    places: dict[Tensor, list[tuple[str, Place]]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        places.setdefault(parameter, []).append((name, tree.place(name)))
    chosen = _match_overrides(overrides or {}, places)
    return [_route(tree, parameter, uses, chosen.get(parameter)) for parameter, uses in places.items()]


def route_name(name: str, shape: torch.Size) -> tuple[str, str, str]:
    """Return (kind, rule, reason) of a parameter known by its name (`""` for none) and shape alone, without a module.

    Heads are told by their names, so a hidden layer of a module that is named as a head goes to AdamW too.
    """
    name = ADAPTED.sub("", strip_wrappers(name))
    parametrised = PARAMETRISED.search(name)
    if parametrised is not None:
        name = ".".join(filter(None, (name[: parametrised.start()], parametrised[1])))
    path, _, leaf = name.rpartition(".")
    components = path.split(".") if path else []
    weight = leaf == "weight" or REPARAMETRISED.sub("", leaf) == "weight"
    decision = _few_axes(shape) if len(shape) < 2 else None
    if decision is None and weight and _named_head(components):
        decision = _Decision("head", "name of an output head")
    if decision is None:
        # of a tensor without a name nothing but its axes is known
        decision = _by_shape(shape, bare=bool(name) and not weight, name=name)
    if decision is None and len(shape) > 2 and shape[1] == 1 and weight:
        decision = _Decision("depthwise", "shape of a depthwise convolution")
    if decision is None and weight and components:
        if _EMBEDDING.search(components[-1]):
            decision = _Decision("embedding", "name of an embedding")
        elif len(shape) > 3 and shape[1] <= 4 and any("embed" in component for component in components):
            decision = _Decision("embedding", f"patch embedding: from the {shape[1]} channels of the input")
    if decision is None and not weight:
        decision = _by_name([leaf, *components[-1:]] if leaf.isdecimal() else [leaf])
    if decision is None:
        decision = _Decision("matrix", "matrix by its shape and name")
    return decision.kind, decision.rule, decision.reason


def _match_overrides(
    overrides: Mapping[str, str], places: Mapping[Tensor, list[tuple[str, Place]]]
) -> dict[Tensor, tuple[str, str]]:
    """Return (pattern, rule) of the parameters that patterns match."""
    chosen: dict[Tensor, tuple[str, str]] = {}
    for pattern, rule in overrides.items():
        if rule not in _RULES:
            raise ValueError(f"overrides={{{pattern!r}: {rule!r}}}: unknown rule, allowed: {', '.join(_RULES)}")
        matched = [
            parameter
            for parameter, uses in places.items()
            if any(fnmatchcase(name, pattern) or fnmatchcase(strip_wrappers(name), pattern) for name, _ in uses)
        ]
        if not matched:
            raise ValueError(
                f"overrides={{{pattern!r}: {rule!r}}} matches no parameter; patterns are of the names in "
                'module.named_parameters(), as "*.router.*"'
            )
        chosen.update((parameter, (pattern, rule)) for parameter in matched)
    return chosen


def _route(
    tree: ModuleTree, parameter: Tensor, uses: list[tuple[str, Place]], override: tuple[str, str] | None
) -> Route:
    name, place = uses[0]
    flatten = True if isinstance(place.owner, CONVOLUTIONS) and parameter.ndim == 3 else None
    if override is not None:
        pattern, rule = override
        return Route(name, parameter, "override", rule, f'override "{pattern}"', flatten, None)
    decisions = [_decide(tree, use, parameter.shape) for _, use in uses]
    index = next((index for index, decision in enumerate(decisions) if decision.rule == "adamw"), 0)
    kind, reason = decisions[index]
    others = [other for number, (other, _) in enumerate(uses) if number != index]
    if others:
        reason += f", tied to {', '.join(others)}"
    hint = _hint(tree, name, place, parameter) if kind == "matrix" else None
    return Route(name, parameter, kind, decisions[index].rule, reason, flatten, hint)


def _decide(tree: ModuleTree, place: Place, shape: torch.Size) -> _Decision:
    """Return where one use of a parameter wants it."""
    owner, leaf = place.owner, place.leaf
    kind_of_owner = type(owner).__name__.removeprefix("Parametrized").removeprefix("FSDP")
    projection = is_projection(owner)
    # a projection's own matrix, as opposed to a parameter that a module holds beside its children
    weight = leaf == "weight" and projection

    # module type
    if len(shape) < 2:
        return _few_axes(shape)
    if isinstance(owner, EMBEDDINGS):
        named = kind_of_owner in ("Embedding", "EmbeddingBag")
        return _Decision("embedding", f"nn.{kind_of_owner}" if named else f"{kind_of_owner}, an nn.Embedding")
    typed = isinstance(owner, (nn.Linear, *CONVOLUTIONS))
    if isinstance(owner, NORMS) or (not typed and NORM_CLASS.search(kind_of_owner)):
        return _Decision("vector", f"gain or bias of {kind_of_owner}")
    if not typed and EMBEDDING_CLASS.search(kind_of_owner) and not _few_long_axes(shape):
        return _Decision("embedding" if leaf == "weight" else "table", f"table of {kind_of_owner}")

    # place
    if owner in tree.heads and not (_GAIN.search(leaf) or _few_long_axes(shape)):
        return _Decision("head", tree.heads[owner])

    # shape
    decision = _by_shape(shape, bare=not weight, name=f"{place.path}.{leaf}")
    if decision is not None:
        return decision
    if isinstance(owner, CONVOLUTIONS) and owner.groups > 1 and shape[1] == 1:
        return _Decision("depthwise", "depthwise convolution")

    # name
    if weight:
        return _input_projection(tree, place, shape) or _Decision("matrix", f"matrix of {kind_of_owner}")
    collection = isinstance(owner, (nn.ParameterList, nn.ParameterDict))
    decision = _by_name([leaf, *place.components[-1:]] if collection else [leaf])
    return decision or _Decision("matrix", f"matrix of {kind_of_owner}")


def _few_axes(shape: torch.Size) -> _Decision:
    return _Decision("vector", f"{len(shape)} axes" if len(shape) != 1 else "1 axis")


def _few_long_axes(shape: torch.Size) -> bool:
    return sum(length > 1 for length in shape) < 2


def _by_shape(shape: torch.Size, *, bare: bool, name: str) -> _Decision | None:
    """Return what a shape of two or more axes says; `bare` parameters are no projection's weight."""
    if _few_long_axes(shape):
        return _Decision("vector", f"{sum(length > 1 for length in shape)} of {len(shape)} axes longer than 1")
    if not bare or "lora" in name or "expert" in name:
        return None
    if len(shape) > 2 and shape[0] == 1:
        return _Decision("table", f"a table that all samples share: a leading axis of 1 in {tuple(shape)}")
    if len(shape) == 3 and shape[1] == 1:
        return _Decision("depthwise", f"its matrices are 1 x {shape[2]}")
    if _by_name([name.rpartition(".")[2]]) is None and min(shape[-2:]) < 4 and len(shape) < 4:
        return _Decision("vector", f"an axis of {min(shape[-2:])} in {tuple(shape)}, and no projection's weight")
    numbered = any(component.isdecimal() for component in name.split("."))
    if len(shape) == 2 and not numbered and max(shape) >= 30_000 and max(shape) >= 20 * min(shape):
        return _Decision("table", f"{max(shape)} rows, and no projection's weight")
    return None


def _by_name(names: list[str]) -> _Decision | None:
    """Return what the name of a parameter that is no projection's weight says."""
    for name in names:
        if _TABLE.search(name) and not _NO_TABLE.search(name):
            return _Decision("table", f'name of a table: "{name}"')
        if _GAIN.search(name):
            return _Decision("vector", f'name of a gain or bias: "{name}"')
        if _STATE.search(name):
            return _Decision("state", f'name of a state-space parameter: "{name}"')
    return None


def _input_projection(tree: ModuleTree, place: Place, shape: torch.Size) -> _Decision | None:
    """Return that a projection embeds the inputs, or None: convolutions of few channels, or the first of all."""
    components, owner = place.components, place.owner
    if not any("embed" in component for component in components):
        return _Decision("embedding", "name of an embedding") if _EMBEDDING.search((components or [""])[-1]) else None
    if isinstance(owner, CONVOLUTIONS):
        patches = all(s == k > 1 for s, k in zip(owner.stride, owner.kernel_size, strict=True))
        if owner.in_channels <= 4 or (patches and owner is tree.first_convolution):
            return _Decision("embedding", f"patch embedding: from the {owner.in_channels} channels of the input")
        return None
    if _EMBEDDING.search(components[-1]):
        return _Decision("embedding", "name of an embedding")
    if owner is tree.first and len(components) > 1 and _EMBEDDING.search(components[-2]):
        return _Decision("embedding", f"patch embedding: from the {shape[-1]} values of a patch")
    return None


def _named_head(components: list[str]) -> bool:
    """Whether the name of a projection is that of a head, as far as a name can tell."""
    owner, parent = ([""] * 2 + components)[-1], ([""] * 2 + components)[-2]
    if any(component.isdecimal() for component in components[:-1]):
        return False
    return bool(HEAD.search(owner) or owner in ("output", "fc") or (HEAD.search(parent) and _HEAD_CHILD.search(owner)))


def _hint(tree: ModuleTree, name: str, place: Place, parameter: Tensor) -> str | None:
    """Return the matrix view that splits a fused projection, where shapes and configurations tell it."""
    called = place.leaf if place.leaf != "weight" else (place.components or [""])[-1]
    axis = 1 if is_transposed(place.owner) else 0
    if parameter.ndim != 2 and not (parameter.ndim == 3 and _GATE_UP.search(called)):
        return None
    length, width = parameter.shape[-2 + axis], parameter.shape[-1 - axis]
    if isinstance(place.owner, nn.RNNBase):
        gates = {"LSTM": 4, "GRU": 3}.get(place.owner.mode)
        return _view_hint("fused gates", name, parameter, MatrixView(split=gates)) if gates else None
    if _GATE_UP.search(called):
        # experts [E, in, gate and up] interleave them: only rows are told apart
        if parameter.ndim == 3 and width not in dict.fromkeys(size for _, size in tree.config("hidden_size")):
            return None
        return _view_hint("fused gate and up", name, parameter, MatrixView(split=2, axis=axis))
    queries = tree.near(place, _HEADS)
    if _QKV.search(called):
        keys = tree.near(place, _KEY_VALUE_HEADS) or queries
        if queries is None or keys is None or queries == keys:
            split = MatrixView(split=3, heads=queries or 1, axis=axis) if length % 3 == 0 else None
        else:
            # grouped queries: every head has as many rows
            split = MatrixView(heads=queries + 2 * keys, axis=axis)
        return None if split is None else _view_hint("fused q, k, v", name, parameter, split)
    if _KEY_VALUE.search(called) and length == 2 * width:
        return _view_hint("fused k, v", name, parameter, MatrixView(split=2, heads=queries or 1, axis=axis))
    return None


def _view_hint(what: str, name: str, parameter: Tensor, view: MatrixView) -> str | None:
    try:
        view.check(parameter.shape, name)
    except ValueError:
        return None
    options = {"split": view.split, "heads": view.heads, "axis": view.axis}
    default = {"split": 1, "heads": 1, "axis": 0}
    text = ", ".join(f"{key}={value}" for key, value in options.items() if value != default[key])
    return f'{what}: views={{"{name}": MatrixView({text})}}'
