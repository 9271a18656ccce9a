"""Matrices that several ranks iterate together, and messages over two levels: for `test_shared_matrices.py`."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from celo2 import FusedCelo2, owners
from scenarios import meshes, sharded

# large ones, wide, tall and almost square, beside what stays whole; no part of them divides evenly
SPECS = [
    ((150, 901), {}),
    ((300, 131), {}),
    ((135, 170), {}),
    ((24, 18), {}),
    ((36, 10), {"split": 3, "heads": 2}),
    ((9,), {}),
]
FEW = [((130, 270), {}), ((24, 18), {}), ((5,), {})]


def shared(scenario):
    """Run a scenario as if sums of Gram matrices cost nothing, and a peer much: matrices are small here."""

    @functools.wraps(scenario)
    def run(*arguments, **options):
        costs = owners.GRAM_SUM, owners.PEER
        owners.GRAM_SUM, owners.PEER = 0, 10**9
        try:
            return scenario(*arguments, **options)
        finally:
            owners.GRAM_SUM, owners.PEER = costs

    return run


def plan_of(optimizer):
    plan = optimizer.planner.ranks.plan
    return plan.sharers, plan.two_levels


@shared
def differences(mesh, axis, steps=10, **options):
    """Largest difference from one process, how many ranks share, and whether messages take two levels."""
    params, optimizer = sharded.build("celo2", [Shard(axis)], mesh, **options)
    sharded.set_gradients(params, 0)
    optimizer.step()
    return sharded.difference(mesh, "celo2", [Shard(axis)], steps=steps, **options), *plan_of(optimizer)


@shared
def replicas(ranks, layouts, **options):
    """The same on a mesh of two axes, of the parameters, the factors and the norm."""
    mesh = meshes.data_and_tensor(ranks)
    params, optimizer, placed = meshes.build("celo2", mesh, layouts, **options)
    meshes.set_gradients(params, placed, 0, 0.05)
    optimizer.step()
    return meshes.differences(ranks, "celo2", layouts, steps=3, **options), *plan_of(optimizer)


@shared
def counted(mesh, **options):
    """Bytes that a step gives to each kind of collective, as `torch.distributed` is called and as planned."""
    params, optimizer = sharded.build("celo2", [Shard(0)], mesh, specs=SPECS, **options)
    sharded.set_gradients(params, 0)
    optimizer.step()
    sharded.set_gradients(params, 1)
    found = {"all-reduce": 0, "all-to-all": 0, "all-reduce of shared matrices": 0}
    reduce, exchange = dist.all_reduce, dist.all_to_all_single
    everyone = optimizer.planner.ranks.group

    def all_reduce(tensor, group=None, **others):
        kind = (
            "all-reduce" if tensor.numel() in optimizer.planner.ranks.plan.lengths else "all-reduce of shared matrices"
        )
        found[kind] += tensor.nbytes
        return reduce(tensor, group=group, **others)

    def all_to_all(out, given, out_sizes, sizes, group=None, **others):
        found["all-to-all"] += given.nbytes - sizes[dist.get_group_rank(group or everyone, dist.get_rank())]
        return exchange(out, given, out_sizes, sizes, group=group, **others)

    dist.all_reduce, dist.all_to_all_single = all_reduce, all_to_all
    try:
        optimizer.step()
    finally:
        dist.all_reduce, dist.all_to_all_single = reduce, exchange
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (found, optimizer.planner.ranks.plan.bytes_sent()))
    return gathered


@shared
def wire(mesh, low_rank: bool, ranks_per_node: int) -> tuple[float, int]:
    """Relative difference of a large matrix from one process's after ten steps with a float16 wire."""
    found = []
    for several in (False, True):
        generator = torch.Generator().manual_seed(0)
        value = 0.1 * torch.randn(160, 640, generator=generator)
        p = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]) if several else value)
        optimizer = FusedCelo2([p], lr=1e-3, weight_decay=0.1, comm_dtype="float16", ranks_per_node=ranks_per_node)
        for step in range(10):
            if low_rank:
                sharded.set_low_rank_gradients([p], step)
            else:
                sharded.set_gradients([p], step, 1e-2)
            optimizer.step()
        found.append(sharded.whole(p))
    return float((found[0] - found[1]).norm() / found[0].norm()), plan_of(optimizer)[0]


@shared
def whole_parameters(mesh, **options) -> float:
    """Largest difference from one process of parameters that every rank has whole, stepped by rows."""
    single, one = sharded.build("celo2", None, mesh, specs=FEW)
    split, several = sharded.build("celo2", None, mesh, specs=FEW, zero1_mesh=mesh, **options)
    for step in range(3):
        for params, optimizer in ((single, one), (split, several)):
            sharded.set_gradients(params, step)
            optimizer.step()
    assert plan_of(several)[0] > 1
    return max(float((a - b).detach().abs().max()) for a, b in zip(single, split, strict=True))


@shared
def beside_other_groups(mesh) -> tuple[float, int]:
    """The same where ranks have made different numbers of process groups before, and how many loading a state makes."""
    dist.new_group([0])
    params, optimizer = sharded.build("celo2", [Shard(0)], mesh, specs=FEW, ranks_per_node=2)
    sharded.set_gradients(params, 0)
    optimizer.step()
    before = len(dist.distributed_c10d._world.pg_map)
    optimizer.load_state_dict(optimizer.state_dict())
    sharded.set_gradients(params, 1)
    optimizer.step()
    made = len(dist.distributed_c10d._world.pg_map) - before
    return sharded.difference(mesh, "celo2", [Shard(0)], specs=FEW, ranks_per_node=2, steps=3), made


@shared
def differing(mesh) -> list[str]:
    """What is said to ranks that were told different nodes, or round products otherwise, at first or after a step."""
    answers = []
    cases = [{"ranks_per_node": 1 + dist.get_rank() % 2}, {"ranks_per_node": 2}, {"ranks_per_node": 2}]
    for number, options in enumerate(cases):
        params, optimizer = sharded.build("celo2", [Shard(0)], mesh, specs=FEW, **options)
        sharded.set_gradients(params, 0)
        if number == 2:
            optimizer.step()
        torch.set_float32_matmul_precision("high" if dist.get_rank() == 0 else "highest")
        try:
            answers.append(sharded.refusal(RuntimeError, optimizer.step))
        finally:
            torch.set_float32_matmul_precision("highest")
    return answers
