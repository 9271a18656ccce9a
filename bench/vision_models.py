"""The models of `vision.py`: timm's and a small one, how the learned rule sees them, and the norms of their weights."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm
from vision_data import Images

from celo2 import MatrixView, param_groups

NANO = "vit_nano_patch2_8"


def register_nano() -> None:
    """Make the model of the embedded images one of timm's: `vit_nano_patch2_8`, 4 layers, width 64, 4 heads."""
    from timm.models import is_model, register_model
    from timm.models.vision_transformer import VisionTransformer

    def vit_nano_patch2_8(pretrained: bool = False, **given: Any) -> nn.Module:
        for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            given.pop(key, None)
        shape = {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4}
        return VisionTransformer(**{**shape, **given})

    if not is_model(NANO):
        register_model(vit_nano_patch2_8)


def check_model(name: str) -> None:
    """Raise ValueError for a model that timm does not have, with names that are like it."""
    import timm

    if not timm.is_model(name):
        known = timm.list_models()
        near = difflib.get_close_matches(name, known, 4) or [one for one in known if name in one][:4]
        raise ValueError(
            f"unknown model {name!r}: "
            + (f"did you mean {', '.join(near)}?" if near else "timm.list_models() has their names")
        )


def input_side(name: str) -> int:
    """Side in pixels of the images that a model of timm is made for."""
    import timm

    found = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return int(found.input_size[-1]) if found is not None else 8


def build_model(name: str, images: Images, drop_path: float) -> nn.Module:
    """A model of timm with the images' channels, side and classes, its weights drawn from PyTorch's generator."""
    import timm

    given: dict[str, Any] = {"in_chans": images.channels, "num_classes": images.classes}
    if drop_path:
        given["drop_path_rate"] = drop_path
    try:
        try:
            # a transformer's positions have a number, a convolution's do not
            model = timm.create_model(name, img_size=images.side, **given)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            model = timm.create_model(name, **given)
        # some find out in their first forward pass
        with torch.no_grad():
            model.eval()(torch.zeros(1, images.channels, images.side, images.side))
        return model.train()
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--model {name} is not made for {images.side} x {images.side} pixels, {images.channels} channels and "
            f"drop path {drop_path:g} ({reason}): give another, or --image-size"
        ) from error


def attention_views(model: nn.Module) -> dict[str, MatrixView]:
    """Views that cut the projections of timm's attention into heads, as the authors of Celo2 store them.

    Of every module with `num_heads`, one fused `qkv` whose rows are q, k and v, each its heads, and `proj` after them.
    """
    views: dict[str, MatrixView] = {}
    for name, module in model.named_modules():
        heads, qkv, proj = (getattr(module, key, None) for key in ("num_heads", "qkv", "proj"))
        # MaxViT's have a head's q, k and v together: they stay whole
        if not isinstance(heads, int) or getattr(module, "head_first", False):
            continue
        if isinstance(qkv, nn.Linear) and qkv.out_features % (3 * heads) == 0:
            views[f"{name}.qkv.weight"] = MatrixView(split=3, heads=heads)
            if isinstance(proj, nn.Linear) and proj.in_features % heads == 0:
                views[f"{name}.proj.weight"] = MatrixView(heads=heads, axis=1)
    return views


def parameters_by_kind(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters in three kinds, whatever steps them: hidden matrices, embeddings and head, vectors."""
    kinds: dict[str, list[nn.Parameter]] = {"matrices": [], "embeddings_head": [], "vectors": []}
    for group in param_groups(model):
        kind = {"matrix": "matrices", "vector": "vectors"}.get(group["kind"], "embeddings_head")
        kinds[kind] += [parameter for _, parameter in group["params"]]
    return kinds


@torch.no_grad()
def weight_norms(kinds: dict[str, list[nn.Parameter]]) -> dict[str, float]:
    """L2 norms of all parameters, as one vector, and of each kind's."""
    norms = torch.stack([get_total_norm(found) if found else torch.zeros(()) for found in kinds.values()])
    return {"all": float(norms.norm()), **dict(zip(kinds, norms.tolist(), strict=True))}
