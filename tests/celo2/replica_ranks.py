"""The program of one rank for `test_zero1.py`: replicas that nobody keeps equal; rank 0 prints JSON."""

from __future__ import annotations

import json
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from celo2 import FusedCelo2


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def backward(module: nn.Module, seed: int) -> None:
    module.zero_grad()
    module(torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))).square().mean().backward()


def refusal(module: nn.Module, optimizer: FusedCelo2) -> str:
    """What the step says, which must leave the parameters as they were."""
    before = [parameter.detach().clone() for parameter in module.parameters()]
    try:
        optimizer.step()
    except RuntimeError as error:
        assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
        return str(error)
    return ""


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    report = {}
    for case, seed, data in (("weights", rank, 0), ("gradients", 0, rank), ("equal", 0, 0)):
        module = model(seed)
        if case == "weights":
            # all but one bias, which AdamW steps, are equal
            module.load_state_dict({**model(0).state_dict(), "1.bias": torch.full((8,), float(rank))})
        optimizer = FusedCelo2(module, zero1_mesh=mesh, comm_dtype="float32")
        backward(module, data)
        report[case] = refusal(module, optimizer)
        if case == "gradients":
            for parameter in module.parameters():
                dist.all_reduce(parameter.grad)
            report["reduced"] = refusal(module, optimizer)
    module = DistributedDataParallel(model(rank))
    optimizer = FusedCelo2(module.module, zero1_mesh=mesh, comm_dtype="float32")
    backward(module, rank)
    report["ddp"] = refusal(module, optimizer)
    if rank == 0:
        print(json.dumps(report), flush=True)
    dist.barrier()
    # gloo's threads may abort a process that tears its groups down while another still talks to it
    os._exit(0)


if __name__ == "__main__":
    main()
