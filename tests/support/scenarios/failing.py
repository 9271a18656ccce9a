"""Scenarios that fail on one rank: for `test_scenarios.py`."""

from __future__ import annotations

import torch
import torch.distributed as dist


def number_of_ranks(mesh, factor: int = 1) -> tuple[int, int]:
    total = torch.ones(1)
    dist.all_reduce(total)
    return dist.get_rank(), factor * int(total)


def raises_on_the_last(mesh) -> None:
    if dist.get_rank() == mesh.size() - 1:
        raise ValueError("only here")
    dist.barrier()


def ends_on_the_last(mesh) -> None:
    if dist.get_rank() == mesh.size() - 1:
        raise SystemExit
    dist.barrier()
