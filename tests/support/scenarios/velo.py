"""VeLO of sharded parameters beside one process's: for `test_velo_ranks.py`."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from celo2 import VeLO, VeLOWeights, velo_step
from celo2.theta import GROUP_COLUMNS
from celo2.velo_weights import PATHS
from scenarios.sharded import load, mean_over, refusal, save, square_of, whole

# rows that are cut are the largest axis, the second, or another; ties, fewer rows than ranks, vectors, two of a shape
SHAPES = [(24, 18), (18, 24), (18, 24), (3, 5), (6, 6), (7, 7), (5, 6, 7), (9, 4, 4), (8, 3, 2, 2), (9,), (2,)]


def random_weights(seed: int = 0, lstm: int = 12, mlps: int = 6, hidden: int = 4) -> VeLOWeights:
    """Dense weights whose steps are of the order of 1e-3 of a parameter."""
    rng = np.random.default_rng(seed)
    mlp, rnn = "ff_mod_stack/~", "rnn_params"
    shapes = {f"{mlp}/w0__{i}": (mlps, rows, hidden) for i, rows in enumerate(GROUP_COLUMNS)}
    shapes |= {f"{mlp}/b0": (mlps, hidden), f"{mlp}/w1": (mlps, hidden, hidden), f"{mlp}/b1": (mlps, hidden)}
    shapes |= {f"{mlp}/w2": (mlps, hidden, 3), f"{mlp}/b2": (mlps, 3)}
    shapes |= {"lstm_init_state/hidden": (1, lstm), "lstm_init_state/cell": (1, lstm)}
    for name, inputs, outputs in (
        *((name, 30, lstm) for name in ("linear", "linear_1", "linear_2")),
        ("rnn/linear", 2 * lstm, 4 * lstm),
        ("rnn_to_controls", lstm, mlps),
        ("step_size", lstm, 1),
    ):
        shapes |= {f"{rnn}/{name}/w": (inputs, outputs), f"{rnn}/{name}/b": (outputs,)}
    arrays = {path: 0.3 * rng.standard_normal(shape) for path, shape in shapes.items()}
    return VeLOWeights.from_arrays({path: arrays[path] / (3 if mlp in path else 1) for path in PATHS})


def build(placements, mesh, num_steps=20, shapes=SHAPES, **options):
    """Parameters and their optimizer; vectors are sharded along their axis, one parameter is whole on every rank."""
    generator, params = torch.Generator().manual_seed(0), []
    for index, shape in enumerate([*shapes, (6, 5)]):
        value = torch.randn(shape, generator=generator)
        if placements is not None and index < len(shapes):
            cut = [Shard(0) if isinstance(x, Shard) and len(shape) <= x.dim else x for x in placements]
            value = distribute_tensor(value, mesh, cut)
        params.append(nn.Parameter(value))
    return params, VeLO(params, num_steps, weights=random_weights(), **options)


def set_gradients(params, step, scale=0.1):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        gradient = scale * torch.randn(p.shape, generator=generator)
        p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if hasattr(p, "placements") else gradient


def difference(mesh, placements, steps=15, scale=0.1, **options) -> float:
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


def difference_in_small_blocks(mesh) -> float:
    block, velo_step.BLOCK = velo_step.BLOCK, 13
    try:
        return difference(mesh, [Shard(0)], steps=3)
    finally:
        velo_step.BLOCK = block


def hsdp_difference(mesh) -> float:
    return difference(square_of(mesh), [Replicate(), Shard(0)])


def equal_meshes(mesh) -> float:
    """Largest difference from one process when parameters are on two meshes of the same ranks, made one by one."""
    runs = []
    for meshes in ((None, None), (square_of(mesh), square_of(mesh))):
        generator, params = torch.Generator().manual_seed(0), []
        for shape, over in zip(((8, 6), (6, 5)), meshes, strict=True):
            value = torch.randn(shape, generator=generator)
            if over is not None:
                value = distribute_tensor(value, over, [Replicate(), Shard(0)])
            params.append(nn.Parameter(value))
        optimizer = VeLO(params, 5, weights=random_weights())
        set_gradients(params, 0)
        optimizer.step(loss=1.0)
        runs.append([whole(p) for p in params])
    return max(float((a - b).abs().max()) for a, b in zip(*runs, strict=True))


def count_all_reduces(mesh) -> int:
    params, optimizer = build([Shard(0)], mesh)
    set_gradients(params, 0)
    optimizer.step(loss=1.0)
    calls, original = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))
    optimizer.step(loss=1.0)
    dist.all_reduce = original
    return len(calls)


def skipped_step(mesh):
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


def mean_loss(mesh) -> float:
    """Largest difference between ranks that give their own losses, and one process that gives the mean."""
    single, one = build(None, None)
    sharded, several = build([Shard(0)], mesh)
    for step in range(5):
        mean = 2.0 - 0.2 * step
        set_gradients(single, step)
        set_gradients(sharded, step)
        one.step(loss=mean)
        several.step(loss=torch.tensor(mean + dist.get_rank() - (mesh.size() - 1) / 2))
    return max(float((one_ - whole(b)).abs().max()) for one_, b in zip(map(whole, single), sharded, strict=True))


def missing_gradient(mesh) -> str:
    params, optimizer = build([Shard(0)], mesh)
    set_gradients(params, 0)
    if dist.get_rank() == 0:
        params[2].grad = None
    return refusal(RuntimeError, lambda: optimizer.step(loss=1.0))


def other_parameters(mesh) -> str:
    params, _ = build([Shard(0)], mesh)
    chosen = params[:2] if dist.get_rank() else params[1::-1]
    set_gradients(params, 0)
    return refusal(RuntimeError, lambda: VeLO(chosen, 10, weights=random_weights()).step(loss=1.0))


def two_axes(mesh) -> str:
    w = nn.Parameter(distribute_tensor(torch.ones(4, 6), square_of(mesh), [Shard(0), Shard(1)]))
    return refusal(ValueError, lambda: VeLO([("w", w)], 10, weights=random_weights()))


def train(mesh, how: str, folder: Path) -> list[float]:
    """Losses of 6 steps: "whole" on every rank, or "sharded" by FSDP2.

    "saved" leaves a checkpoint after 3 steps; "resumed" loads that one, and takes the last 3.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5))
    if how != "whole":
        for block in (model[0], model[2]):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = VeLO(model, 6, weights=random_weights(), lr=3.0)
    first = 3 if how == "resumed" else 0
    if first:
        load(model, optimizer, folder)
    losses = []
    for step in range(first, 6):
        x = torch.randn(12, 12, generator=torch.Generator().manual_seed(step))
        share = x if how == "whole" else x.chunk(mesh.size())[dist.get_rank()]
        loss = (model(share) - share[:, :5].sin()).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
        optimizer.zero_grad()
        losses.append(mean_over(mesh if how != "whole" else None, loss))
        if how == "saved" and step == 2:
            save(model, optimizer, folder)
    return losses
