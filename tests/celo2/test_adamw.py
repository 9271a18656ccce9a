"""The AdamW side against `torch.optim.AdamW`, in every memory layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from celo2 import FusedCelo2, adamw


def _transposed(t: torch.Tensor) -> torch.Tensor:
    return t.T.contiguous().T


def _strided(t: torch.Tensor) -> torch.Tensor:
    return torch.full((t.shape[0], 2 * t.shape[1]), 7.0)[:, ::2].copy_(t)


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "transposed": _transposed,
    "strided": _strided,
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("gradient_layout", LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_every_layout_equals_torch(layout, gradient_layout, max_grad_norm):
    start = torch.randn(4, 6)
    p, q = nn.Parameter(LAYOUTS[layout](start.clone())), nn.Parameter(start.clone())
    group = {"params": [p], "rule": "adamw"}
    ours = FusedCelo2([group], lr=1e-3, weights="momentum", adam_weight_decay=0.1, max_grad_norm=max_grad_norm)
    theirs = torch.optim.AdamW([q], lr=2e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    for _ in range(3):
        p.grad = LAYOUTS[gradient_layout](torch.randn(4, 6))
        before = p.grad.clone()
        q.grad = p.grad.clone(memory_format=torch.contiguous_format)
        if max_grad_norm:
            nn.utils.clip_grad_norm_([q], max_grad_norm)
        ours.step()
        theirs.step()
        assert torch.equal(p.grad, before)
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=2e-6)
    torch.testing.assert_close(ours.state[p]["exp_avg_sq"], theirs.state[q]["exp_avg_sq"])
    if layout == "strided":
        # what lies between the parameter's elements is not ours
        assert torch.equal(p.detach().as_strided((4, 6), (12, 2), 1), torch.full((4, 6), 7.0))


def test_channels_last_after_loading_a_contiguous_state():
    def model() -> nn.Module:
        torch.manual_seed(3)
        return nn.ModuleDict({"patch_embed": nn.Conv2d(3, 5, 2), "head": nn.Linear(5, 2)})

    def step(model: nn.Module, optimizer: FusedCelo2) -> None:
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        model["head"](model["patch_embed"](x).mean((2, 3))).square().sum().backward()
        optimizer.step()

    first, second = model(), model()
    one = FusedCelo2(first, weights="momentum")
    assert one.rule_of(first["patch_embed"].weight) == "adamw"
    step(first, one)
    second.load_state_dict(first.state_dict())
    second.to(memory_format=torch.channels_last)
    two = FusedCelo2(second, weights="momentum")
    two.load_state_dict(one.state_dict())
    for _ in range(2):
        step(first, one)
        step(second, two)
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6, msg=name)


def test_options_reach_the_kernel():
    p, q = (nn.Parameter(torch.linspace(-1, 1, 9)) for _ in range(2))
    options = {
        "adam_eps": 0.3,
        "adam_betas": (0.5, 0.7),
        "weight_decay": 9.0,
        "adam_weight_decay": 0.2,
        "vector_weight_decay": None,
        "adam_lr_mult": 3.0,
    }
    ours = FusedCelo2([p], lr=1e-2, weights="momentum", **options)
    theirs = torch.optim.AdamW([q], lr=3e-2, betas=(0.5, 0.7), eps=0.3, weight_decay=0.2)
    for _ in range(3):
        p.grad = torch.randn(9)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_in_chunks_equals_float32_then_rounded(dtype, monkeypatch):
    monkeypatch.setattr(adamw, "COPY_LIMIT", 50)
    torch.manual_seed(1)
    low = [nn.Parameter(torch.randn(n).to(dtype)) for n in (30, 30, 100, 7)]
    wide = [nn.Parameter(p.detach().float()) for p in low]
    ours = FusedCelo2(low, lr=1e-3, weights="momentum")
    exact = FusedCelo2(wide, lr=1e-3, weights="momentum")
    for p, q in zip(low, wide, strict=True):
        p.grad = torch.randn(p.shape).to(dtype)
        q.grad = p.grad.float()
    ours.step()
    exact.step()
    for p, q in zip(low, wide, strict=True):
        assert (p.detach().float() - q.detach()).abs().max() <= q.detach().abs().max() * torch.finfo(dtype).eps
        assert torch.equal(ours.state[p]["exp_avg"], exact.state[q]["exp_avg"])


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_large_tensors_are_copied_in_pieces(weight_decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping scales a copy of the gradient: of at most COPY_LIMIT elements at once."""

    def trained(limit: int) -> tuple[list[torch.Tensor], int]:
        monkeypatch.setattr(adamw, "COPY_LIMIT", limit)
        sizes: list[list[int]] = []
        step = adamw._step

        def counted(jobs, parameters, gradients, group, found_inf):
            sizes.append([gradient.numel() for gradient in gradients])
            step(jobs, parameters, gradients, group, found_inf)

        monkeypatch.setattr(adamw, "_step", counted)
        torch.manual_seed(3)
        shapes = [(40, 5), (1, 130), (7,), (200,), (4, 3, 6, 2)]
        parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        # memory in another order than the axes
        parameters += [nn.Parameter(torch.randn(30, 9).T), nn.Parameter(torch.randn(2, 5, 4, 4).permute(0, 3, 1, 2))]
        groups = [{"params": parameters, "rule": "adamw"}]
        optimizer = FusedCelo2(
            groups, lr=1e-2, weights="momentum", max_grad_norm=0.5, weight_decay=weight_decay, vector_weight_decay=None
        )
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        states = [optimizer.state[p][key] for p in parameters for key in ("exp_avg", "exp_avg_sq", "step")]
        monkeypatch.setattr(adamw, "_step", step)
        return [p.detach().clone() for p in parameters] + states, max(sum(chunk) for chunk in sizes)

    whole, most = trained(1 << 22)
    pieces, least = trained(50)
    assert most > 900 and least <= 50
    for one, other in zip(whole, pieces, strict=True):
        # the fused kernel rounds the ends of a tensor otherwise than its middle
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
