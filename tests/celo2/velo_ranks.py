"""The program of one rank for `test_velo.py`: `torchrun ... velo_ranks.py FOLDER`; rank 0 prints JSON."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_ranks import leave
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from celo2 import VeLO, VeLOWeights, velo_step

# rows that are cut are the largest axis, the second, or another; ties, fewer rows than ranks, vectors, two of a shape
SHAPES = [(24, 18), (18, 24), (18, 24), (3, 5), (6, 6), (7, 7), (5, 6, 7), (9, 4, 4), (8, 3, 2, 2), (9,), (2,)]


def weights() -> VeLOWeights:
    return VeLOWeights.load(Path(sys.argv[1]) / "velo.state")


def build(placements, mesh, num_steps=20, shapes=SHAPES, **options):
    """Parameters and their optimizer; vectors are sharded along their axis, one parameter is whole on every rank."""
    generator, params = torch.Generator().manual_seed(0), []
    for index, shape in enumerate([*shapes, (6, 5)]):
        value = torch.randn(shape, generator=generator)
        if placements is not None and index < len(shapes):
            cut = [Shard(0) if isinstance(x, Shard) and len(shape) <= x.dim else x for x in placements]
            value = distribute_tensor(value, mesh, cut)
        params.append(nn.Parameter(value))
    return params, VeLO(params, num_steps, weights=weights(), **options)


def set_gradients(params, step, scale=0.1):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        gradient = scale * torch.randn(p.shape, generator=generator)
        p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if hasattr(p, "placements") else gradient


def whole(p):
    return p.detach().full_tensor() if hasattr(p, "placements") else p.detach()


def difference(placements, mesh, steps=15, scale=0.1, **options) -> float:
    """Largest difference of a parameter from one process's after some steps."""
    single, one = build(None, None, **options)
    sharded, several = build(placements, mesh, **options)
    before = [p.detach().clone() for p in single]
    for step in range(steps):
        loss = 2.0 - 0.1 * step + (step == 7)
        for params, optimizer in ((single, one), (sharded, several)):
            set_gradients(params, step, scale)
            optimizer.step(loss=loss)
    moved = max(float((p.detach() - q).abs().max()) for p, q in zip(single, before, strict=True))
    assert moved > 1e-3, moved
    for a, b in zip(single, sharded, strict=True):
        mine, theirs = one.state[a], several.state[b]
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            torch.testing.assert_close(whole(theirs[key]), value, rtol=1e-4, atol=1e-6, msg=f"{tuple(a.shape)} {key}")
    return max(float((whole(a) - whole(b)).abs().max()) for a, b in zip(single, sharded, strict=True))


def count_all_reduces(mesh) -> int:
    params, optimizer = build([Shard(0)], mesh)
    set_gradients(params, 0)
    optimizer.step(loss=1.0)
    calls, original = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))
    optimizer.step(loss=1.0)
    dist.all_reduce = original
    return len(calls)


def skipped(mesh):
    """Whether a NaN in a gradient on rank 0 changes no byte anywhere, and how many steps were skipped."""
    params, optimizer = build([Shard(0)], mesh)
    set_gradients(params, 0)
    optimizer.step(loss=1.0)
    before = [[p.to_local().clone() if hasattr(p, "to_local") else p.detach().clone() for p in params]]
    before.append([{key: whole(value).clone() for key, value in optimizer.state[p].items()} for p in params])
    set_gradients(params, 1)
    if dist.get_rank() == 0:
        params[1].grad.to_local()[0, 0] = math.nan
    optimizer.step(loss=1.0)
    same = all(
        torch.equal(p.to_local() if hasattr(p, "to_local") else p, q) for p, q in zip(params, before[0], strict=True)
    )
    for p, old in zip(params, before[1], strict=True):
        state = optimizer.state[p]
        same = same and all(torch.equal(whole(state[key]), old[key]) for key in old if key != "skipped")
    return same, optimizer.skipped_steps


def mean_loss(mesh, world) -> float:
    """Largest difference between ranks that give their own losses, and one process that gives the mean."""
    single, one = build(None, None)
    sharded, several = build([Shard(0)], mesh)
    for step in range(5):
        mean = 2.0 - 0.2 * step
        set_gradients(single, step)
        set_gradients(sharded, step)
        one.step(loss=mean)
        several.step(loss=torch.tensor(mean + dist.get_rank() - (world - 1) / 2))
    return max(float((one_ - whole(b)).abs().max()) for one_, b in zip(map(whole, single), sharded, strict=True))


def missing_gradient(mesh) -> str:
    params, optimizer = build([Shard(0)], mesh)
    set_gradients(params, 0)
    if dist.get_rank() == 0:
        params[2].grad = None
    try:
        optimizer.step(loss=1.0)
    except RuntimeError as error:
        return str(error)
    return ""


def other_parameters(mesh) -> str:
    params, _ = build([Shard(0)], mesh)
    chosen = params[:2] if dist.get_rank() else params[1::-1]
    set_gradients(params, 0)
    try:
        VeLO(chosen, 10, weights=weights()).step(loss=1.0)
    except RuntimeError as error:
        return str(error)
    return ""


def two_meshes() -> str:
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    w = nn.Parameter(distribute_tensor(torch.ones(4, 6), square, [Shard(0), Shard(1)]))
    try:
        VeLO([("w", w)], 10, weights=weights())
    except ValueError as error:
        return str(error)
    return ""


def train(folder: Path, world: int, mesh):
    """FSDP2: losses of 6 steps, a checkpoint after 3, and the losses after loading it."""
    losses = {}
    for name in ("whole", "sharded", "resumed"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5))
        if name != "whole":
            for block in (model[0], model[2]):
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = VeLO(model, 6, weights=weights(), lr=3.0)
        first = 0
        if name == "resumed":
            # written by the run of two ranks
            model_state, optimizer_state = get_state_dict(model, optimizer)
            dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "checkpoint")
            set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
            first = 3
        run = []
        for step in range(first, 6):
            x = torch.randn(12, 12, generator=torch.Generator().manual_seed(step))
            share = x if name == "whole" else x.chunk(world)[dist.get_rank()]
            loss = (model(share) - share[:, :5].sin()).square().mean()
            loss.backward()
            optimizer.step(loss=loss)
            optimizer.zero_grad()
            total = loss.detach().clone()
            if name != "whole":
                dist.all_reduce(total)
                total /= world
            run.append(float(total))
            if name == "sharded" and world == 2 and step == 2:
                model_state, optimizer_state = get_state_dict(model, optimizer)
                dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / "checkpoint")
        losses[name] = run
    return losses


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    results = {f"axis {axis}": difference([Shard(axis)], mesh) for axis in (0, 1)}
    results["axis 2"] = difference([Shard(2)], mesh, shapes=[(5, 6, 7), (9, 4, 4), (3, 4, 6, 2)])
    results["decay"] = difference([Shard(0)], mesh, steps=11, scale=2e3, weight_decay=0.1)
    block, velo_step.BLOCK = velo_step.BLOCK, 13
    results["small blocks"] = difference([Shard(0)], mesh, steps=3)
    velo_step.BLOCK = block
    report = {}
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        results["hsdp"] = difference([Replicate(), Shard(0)], square)
        report["2-D"] = two_meshes()
    report |= {
        "differences": results,
        "all_reduces": count_all_reduces(mesh),
        "skipped": skipped(mesh),
        "mean loss": mean_loss(mesh, world),
        "missing": missing_gradient(mesh),
        "other": other_parameters(mesh),
        "losses": train(Path(sys.argv[1]), world, mesh),
    }
    leave(report)


if __name__ == "__main__":
    main()
