"""timm's layer decay and channels_last, and PEFT's adapters, on one process: trained, saved and resumed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from common import batch, equal, llama, parameters, report, routes, routing_faults, run_snippet
from torch import nn

from celo2 import FusedCelo2

STEPS, SAVED = 6, 3


def vision(name: str) -> nn.Module:
    import timm

    torch.manual_seed(0)
    options: dict[str, Any] = {"num_classes": 5}
    if name == "vit":
        options |= {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
        return timm.models.VisionTransformer(**options)
    return timm.models.ConvNeXt(**options, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))


def image_loss(model: nn.Module, step: int, layout: torch.memory_format) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    size = 16 if isinstance(getattr(model, "pos_embed", None), nn.Parameter) else 32
    labels = torch.arange(10) % 5
    images = torch.randn(10, 3, size, size, generator=generator) + labels[:, None, None, None]
    return nn.functional.cross_entropy(model(images.contiguous(memory_format=layout)), labels)


def run(make: Callable[[], tuple[nn.Module, FusedCelo2]], loss_of: Callable[[nn.Module, int], Any]) -> dict[str, Any]:
    """Train, save in the middle, and go on in another model from what was saved."""
    model, optimizer = make()
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    losses: list[float] = []

    def train(model: nn.Module, optimizer: FusedCelo2, steps: range) -> list[float]:
        found = []
        for step in steps:
            loss = loss_of(model, step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
        return found

    losses += train(model, optimizer, range(SAVED))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    losses += train(model, optimizer, range(SAVED, STEPS))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, restored = make()
    again.load_state_dict(saved["model"])
    restored.load_state_dict(saved["optimizer"])
    train(again, restored, range(SAVED, STEPS))
    with_state = {p for p, state in optimizer.state.items() if state}
    return {
        "losses": losses,
        "resumed equal": equal(parameters(model), parameters(again)),
        "frozen equal": equal(frozen, [p.detach() for p in model.parameters() if not p.requires_grad]),
        "frozen": len(frozen),
        "state": sorted({p.requires_grad for p in with_state}),
        "faults": routing_faults(optimizer, routes(FusedCelo2(copy.deepcopy(model)))),
        "rates": sorted({round(group["lr"] / group["lr_mult"], 9) for group in optimizer.param_groups}),
    }


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for name in ("vit", "convnext"):
        for layout in (torch.contiguous_format, torch.channels_last):

            def make(name: str = name, layout: torch.memory_format = layout) -> tuple[nn.Module, FusedCelo2]:
                model = vision(name).to(memory_format=layout)
                return model, run_snippet("timm", model=model, lr=1e-3)["optimizer"]

            found[f"{name} {layout}"] = run(make, lambda model, step, layout=layout: image_loss(model, step, layout))

    def adapted() -> tuple[nn.Module, FusedCelo2]:
        torch.manual_seed(0)
        names = run_snippet("PEFT", model=llama(), lr=1e-2)
        return names["model"], names["optimizer"]

    found["lora"] = run(adapted, lambda model, step: model(input_ids=batch(step), labels=batch(step)).loss)
    report(**found)


if __name__ == "__main__":
    main()
