"""The tree of a module as routes see it: names without wrappers, projections, and output heads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.modules.batchnorm._NormBase)
CONVOLUTIONS = (nn.modules.conv._ConvNd,)
# names of classes: GemmaRMSNorm, LayerNorm2d, BatchNormAct2d; Gemma3TextScaledWordEmbedding, ViTEmbeddings
NORM_CLASS = re.compile(r"Norm(Act)?(\dd?)?$")
EMBEDDING_CLASS = re.compile(r"(Embedding|Embeddings|PositionEncoding|PositionalEncoding)$")
# what wrappers add to names
_LEADING = ("module", "base_model.model")
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# PEFT: the trained copy of a module, the frozen one, and the one under an adapter
ADAPTED = re.compile(r"\.(modules_to_save\.[^.]+|original_module|base_layer)(?=\.|$)")
# reparametrised tensors: PyTorch's parametrizations, and the older weight_norm and spectral_norm
PARAMETRISED = re.compile(r"\.?parametrizations\.([^.]+)\.original\d*$")
REPARAMETRISED = re.compile(r"_(g|v|orig)$")
# modules that are a head, or whose last child is one, wherever they are outside numbered blocks
HEAD = re.compile(
    r"^(?!(conv|multi|attn|attention|per)_?heads?$)(\w+_)?heads?(_dist|_aux|_\d+)?$"
    r"|^(\w+_)?classifiers?$|^(?!pre_)(\w+_)?logits$|^unembed(ding)?$|^embed_out$|^scores?$|^qa_outputs$",
    re.IGNORECASE,
)
# and modules that are one when they are the last projection of all, next to the body
_LAST = re.compile(r"^(fc\d*|outputs?|output_(projection|proj|layer)|decoder|proj_out|(last|final)(_\w+)?)$")
# sizes of the output, as configurations and models call them
_SIZES = ("vocab_size", "num_labels", "num_classes", "n_classes", "num_embeddings")


class Place(NamedTuple):
    """A parameter in the tree: its module, the module's path without wrappers, and the name it was registered by."""

    owner: nn.Module
    path: str
    leaf: str

    @property
    def components(self) -> list[str]:
        return self.path.split(".") if self.path else []


def strip_wrappers(name: str) -> str:
    """Return a parameter's or module's name without what compilation, DDP, FSDP, checkpointing and PEFT add to it."""
    name = ".".join(component for component in name.split(".") if component not in _WRAPPERS)
    stripped = True
    while stripped:
        stripped = False
        for prefix in _LEADING:
            if name.startswith(f"{prefix}."):
                name, stripped = name.removeprefix(f"{prefix}."), True
    return name


def is_projection(module: nn.Module) -> bool:
    """Whether a module multiplies its input by a weight of its own."""
    if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return True
    weight = module._parameters.get("weight")
    return (
        isinstance(weight, Tensor)
        and weight.ndim == 2
        and not isinstance(module, (*EMBEDDINGS, *NORMS))
        and not NORM_CLASS.search(type(module).__name__)
        and not EMBEDDING_CLASS.search(type(module).__name__)
    )


def is_transposed(module: nn.Module) -> bool:
    """Whether a projection's weight is [in, out]: the Conv1D of GPT-2."""
    return type(module).__name__.endswith("Conv1D")


def _sides(module: nn.Module) -> tuple[int, int]:
    """Return the numbers of outputs and inputs of a projection."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, CONVOLUTIONS):
        return module.out_channels, module.in_channels
    rows, columns = module._parameters["weight"].shape  # type: ignore[union-attr]
    return (columns, rows) if is_transposed(module) else (rows, columns)


def _numbered(components: list[str]) -> bool:
    """Whether a module is inside a numbered block; a number at the end is its own place in a Sequential."""
    return any(component.isdecimal() for component in components[:-1])


class ModuleTree:
    """A module's tree: where its parameters are, its heads with the reason for each, and its first projections."""

    def __init__(self, module: nn.Module) -> None:
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.paths = {name: ADAPTED.sub("", f".{strip_wrappers(f'{name}.')}")[1:].rstrip(".") for name in self.modules}
        projections: dict[nn.Module, list[str]] = {}
        for name, child in self.modules.items():
            if is_projection(child):
                projections.setdefault(child, self.paths[name].split(".") if self.paths[name] else [])
        self.first = next(iter(projections), None)
        self.first_convolution = next((child for child in projections if isinstance(child, CONVOLUTIONS)), None)
        self.heads: dict[nn.Module, str] = {}
        self._told_heads()
        self._named_heads()
        if projections:
            self._last_head(*list(projections.items())[-1])

    def place(self, name: str) -> Place:
        """Return the place of a parameter: a parametrised one is its module's weight."""
        parametrised = PARAMETRISED.search(name)
        if parametrised is not None:
            owner, leaf = name[: parametrised.start()], parametrised[1]
        else:
            owner, _, leaf = name.rpartition(".")
            if REPARAMETRISED.sub("", leaf) == "weight":
                leaf = "weight"
        return Place(self.modules[owner], self.paths[owner], leaf)

    def config(self, *names: str) -> Iterator[tuple[str, int]]:
        """Yield (name, value) of the whole numbers of those names that modules and their configurations hold."""
        for child in self.modules.values():
            configuration = vars(child).get("config")
            texts = getattr(configuration, "text_config", None)
            for source in (configuration, texts, child):
                for name in names:
                    value = getattr(source, name, None)
                    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                        yield name, value

    def near(self, place: Place, names: tuple[str, ...]) -> int | None:
        """Return the first whole number of those names above a parameter, in its modules or a configuration."""
        path = place.path
        by_path = {self.paths[name]: child for name, child in self.modules.items()}
        while True:
            child = by_path.get(path)
            value = next((getattr(child, name) for name in names if isinstance(getattr(child, name, None), int)), None)
            if value is not None or not path:
                return value or next((value for _, value in self.config(*names)), None)
            path = path.rpartition(".")[0]

    def _told_heads(self) -> None:
        """Note the heads that models name themselves: those of transformers and of timm."""
        for child in self.modules.values():
            for method, reason in (
                ("get_output_embeddings", "last projection: to the vocabulary"),
                ("get_classifier", "last projection: to the classes"),
            ):
                told = _call(getattr(child, method, None))
                for head in told if isinstance(told, (tuple, list)) else [told]:
                    if isinstance(head, nn.Module):
                        self._note(head, reason)

    def _named_heads(self) -> None:
        """Note the last projections of modules outside numbered blocks that are named as heads."""
        for name, child in self.modules.items():
            components = self.paths[name].split(".")
            if any(component.isdecimal() for component in components) or not HEAD.search(components[-1]):
                continue
            reason = f'last projection of "{components[-1]}"'
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                for part in child.children():
                    self._note(part, reason)
            else:
                self._note(child, reason)

    def _note(self, head: nn.Module, reason: str) -> None:
        """Note the projection that a head is, or the last of its children; adapters and copies of it too."""
        if any(hasattr(head, name) for name in ("base_layer", "modules_to_save", "original_module")):
            inside = [child for child in head.modules() if is_projection(child)]
        elif is_projection(head):
            inside = [head]
        else:
            last = next((child for child in reversed(list(head.modules())) if is_projection(child)), None)
            inside = [child for child in head.children() if child is last]
        for child in inside:
            self.heads.setdefault(child, reason)

    def _last_head(self, last: nn.Module, components: list[str]) -> None:
        """Note the last projection of all when its name is one of a head, or its size that of the output."""
        outputs, inputs = _sides(last)
        if _numbered(components) or last in self.heads:
            return
        sizes = {size: name for name, size in self.config(*_SIZES)}
        if outputs in sizes and outputs != inputs:
            self.heads[last] = f"last projection: {outputs} is {sizes[outputs]}"
        elif components and _LAST.search(components[-1]) and last in self._body().children():
            self.heads[last] = f'last projection, and called "{components[-1]}"'

    def _body(self) -> nn.Module:
        """Return the module that holds the network's parts: the root, or what it wraps."""
        body = self.modules[""]
        while True:
            holders = [child for child in body.children() if any(True for _ in child.parameters())]
            if len(holders) != 1 or is_projection(holders[0]):
                return body
            body = holders[0]


def _call(method: Callable[[], Any] | None) -> Any:
    """Return what a model says of itself, or None where it has nothing to say."""
    if not callable(method):
        return None
    try:
        return method()
    except (AttributeError, NotImplementedError, TypeError):
        return None
