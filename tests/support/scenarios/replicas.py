"""Replicas that nobody keeps equal: for `test_zero1.py`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from celo2 import FusedCelo2


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def backward(module: nn.Module, seed: int) -> None:
    module.zero_grad()
    module(torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))).square().mean().backward()


def refused_step(module: nn.Module, optimizer: FusedCelo2) -> str:
    """What the step says, which must leave the parameters as they were."""
    before = [parameter.detach().clone() for parameter in module.parameters()]
    try:
        optimizer.step()
    except RuntimeError as error:
        assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
        return str(error)
    return ""


def steps(mesh) -> dict[str, str]:
    """What the step of each case is answered with: nothing where replicas are equal."""
    rank = dist.get_rank()
    report = {}
    for case, seed, data in (("weights", rank, 0), ("gradients", 0, rank), ("equal", 0, 0)):
        module = model(seed)
        if case == "weights":
            # all but one bias, which AdamW steps, are equal
            module.load_state_dict({**model(0).state_dict(), "1.bias": torch.full((8,), float(rank))})
        optimizer = FusedCelo2(module, zero1_mesh=mesh, comm_dtype="float32")
        backward(module, data)
        report[case] = refused_step(module, optimizer)
        if case == "gradients":
            for parameter in module.parameters():
                dist.all_reduce(parameter.grad)
            report["reduced"] = refused_step(module, optimizer)
    module = DistributedDataParallel(model(rank))
    optimizer = FusedCelo2(module.module, zero1_mesh=mesh, comm_dtype="float32")
    backward(module, rank)
    report["ddp"] = refused_step(module, optimizer)
    return report
