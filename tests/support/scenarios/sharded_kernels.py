"""Scenarios of `sharded` and others through interpreted kernels: for `test_sharded_kernels.py`."""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from celo2 import FusedCelo2
from celo2.backends import batches, owner, triton
from celo2.blocks import Blocks
from celo2.comm import Ranks
from celo2.planner import Planner
from celo2.skips import SkipWatch
from scenarios import sharded

# uneven, empty, heads that do not align with shards, batched, a convolution, a vector: small, for the interpreter
SPECS = [
    ((10, 6), {}),
    ((2, 5), {}),
    ((12, 4), {"heads": 3}),
    ((6, 8), {"heads": 2, "axis": 1}),
    ((2, 4, 5), {}),
    ((6, 2, 2), {"flatten": True}),
    ((7,), {}),
    ((6, 4), {"rule": "adamw"}),
]
FEW = [((10, 6), {}), ((2, 5), {}), ((7,), {}), ((6, 4), {"rule": "adamw"})]
# two hidden units
TRITON = {"backend": "triton", "hidden": 2}


def tiled_difference(mesh):
    """Several aligned tiles a shard, cut as on a GPU; NaN in all memory that nobody has written."""
    choose, empty = Blocks.choose, torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    Blocks.choose = classmethod(lambda cls, columns, device: cls(columns=64, step_rows=8))
    torch.empty = poisoned
    specs = [((130, 64), {}), ((64, 128), {})]
    try:
        return sharded.difference(mesh, "celo2", [Shard(0)], steps=1, specs=specs, **TRITON)
    finally:
        Blocks.choose, torch.empty = choose, empty


def shards(params, optimizer):
    """This rank's part of all parameters and state."""
    tensors = [*params, *(value for p in params for value in optimizer.state[p].values())]
    return [(t.to_local() if hasattr(t, "placements") else t).detach().clone() for t in tensors]


def same_on_all(before, after):
    same = torch.tensor(float(all(torch.equal(a, b) for a, b in zip(before, after, strict=True))))
    dist.all_reduce(same, op=dist.ReduceOp.MIN)
    return bool(same)


def disagreement(mesh):
    """What a found infinity on the last rank, and a gradient that rank 0 lacks, do to a step."""
    params, optimizer = sharded.build("celo2", [Shard(0)], mesh, specs=FEW, **TRITON)
    sharded.set_gradients(params, 0)
    optimizer.step()
    before = shards(params, optimizer)
    optimizer.found_inf = torch.tensor(float(dist.get_rank() == dist.get_world_size() - 1))
    optimizer.step()
    skipped = optimizer.skipped_steps
    del optimizer.found_inf
    gradient, message = params[1].grad, ""
    if dist.get_rank() == 0:
        params[1].grad = None
    with deferred_check():
        optimizer.step()
    unchanged = same_on_all(before, shards(params, optimizer))
    try:
        print(optimizer.grad_norm)
    except RuntimeError as error:
        message = str(error)
    params[1].grad = gradient
    optimizer.step()
    goes_on = not same_on_all(before, shards(params, optimizer))
    return {"unchanged": unchanged, "skipped": skipped, "message": message, "goes on": goes_on}


@contextmanager
def deferred_check():
    """Leave the flags of a step unread when it ends, as on a GPU."""
    check, Ranks.check_flags = Ranks.check_flags, lambda comm: None
    try:
        yield
    finally:
        Ranks.check_flags = check


def beside_whole_ones(mesh):
    """Largest difference from one process when some parameters are not sharded, and the norm counts them once."""
    generator = torch.Generator().manual_seed(0)
    values = [0.1 * torch.randn(shape, generator=generator) for shape in ((6, 4), (4, 6), (5, 3), (5,), (4, 3))]
    placements = ([Shard(0)], None, [Replicate()], None, [Shard(0)])
    models = []
    for backend, placed in (("torch", (None,) * 5), ("triton", placements)):
        params = [
            nn.Parameter(value.clone() if where is None else distribute_tensor(value, mesh, where))
            for value, where in zip(values, placed, strict=True)
        ]
        optimizer = FusedCelo2(
            [{"params": params[:4], "rule": "celo2"}, {"params": params[4:], "rule": "adamw"}],
            lr=1e-2,
            weights=sharded.theta("celo2-base", 2),
            max_grad_norm=0.1,
            backend=backend,
        )
        for step in range(2):
            sharded.set_gradients(params, step)
            optimizer.step()
        models.append([sharded.whole(p) for p in params])
    assert optimizer.planner.kernels.backend.shards and not optimizer.planner.kernels.refused
    return max(float((a - b).abs().max()) for a, b in zip(*models, strict=True))


def divided_rows(mesh, variant):
    """Largest difference from one process when whole parameters are stepped by rows (ZeRO-1); ranks end alike."""
    generator = torch.Generator().manual_seed(0)
    values = [0.1 * torch.randn(shape, generator=generator) for shape in ((10, 6), (2, 5), (5,), (6, 3, 4), (4, 3))]
    models = []
    for backend, over in (("torch", None), ("triton", mesh)):
        params = [nn.Parameter(value.clone()) for value in values]
        groups = [{"params": params[:4], "rule": "celo2"}, {"params": params[4:], "rule": "adamw"}]
        options = {"weights": sharded.theta(variant, 2), "max_grad_norm": 0.1, "backend": backend, "zero1_mesh": over}
        optimizer = FusedCelo2(groups, lr=1e-2, comm_dtype="float32", **options)
        for step in range(3):
            sharded.set_gradients(params, step)
            if step == 1:
                params[1].grad = None
            if step == 2 and over is not None:
                # a gradient in memory of another order
                params[0].grad = params[0].grad.T.contiguous().T
            optimizer.step()
        models.append([p.detach() for p in params])
    kernels = optimizer.planner.kernels
    assert kernels.backend.shards and not kernels.backend.batches and not kernels.refused
    first = [value.clone() for value in models[1]]
    for value in first:
        dist.broadcast(value, 0)
    assert same_on_all(first, models[1])
    return max(float((a - b).abs().max()) for a, b in zip(*models, strict=True))


def fsdp2_losses(mesh):
    """Losses of a model in one process and under `fully_shard`, whose gradients move from step to step."""
    losses = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        model = sharded.Tied()
        if backend == "triton":
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = FusedCelo2(
            model, lr=1e-2, weights=sharded.theta("celo2", 2), max_grad_norm=0.5, comm_dtype="float32", backend=backend
        )
        run = []
        for step in range(3):
            tokens = torch.randint(13, (12, 8), generator=torch.Generator().manual_seed(step))
            if backend == "triton":
                tokens = tokens.chunk(mesh.size())[mesh.get_local_rank()]
            loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total = loss.detach().clone()
            if backend == "triton":
                dist.all_reduce(total)
                total /= mesh.size()
            run.append(float(total))
        losses.append(run)
    return losses


@contextmanager
def no_host_reads():
    """Refuse to read a tensor on the host, but for the interpreter, within a launch."""
    names = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__")
    originals = {name: getattr(torch.Tensor, name) for name in names}
    modules = (batches, owner, triton)
    launch, launches, inside = triton.launch, [], []
    look = SkipWatch.look

    def guarded(name):
        def read(*args, **kwargs):
            assert inside, f"a tensor's {name} in the step"
            return originals[name](*args, **kwargs)

        return read

    def counted(kernel, *args, **kwargs):
        launches.append(kernel)
        inside.append(kernel)
        launch(kernel, *args, **kwargs)
        inside.pop()

    for name in names:
        setattr(torch.Tensor, name, guarded(name))
    for module in modules:
        module.launch = counted
    # on a GPU it does not wait
    SkipWatch.look = lambda *_, **__: None
    try:
        with deferred_check():
            yield launches
    finally:
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)
        for module in modules:
            module.launch = launch
        SkipWatch.look = look


def launches_without_host_reads(mesh) -> list[int]:
    """Launches of a step, for one matrix and for several."""
    counts = []
    for shapes in ([(8, 4)], [(8, 4), (6, 4), (4, 6)]):
        specs = [*((shape, {}) for shape in shapes), ((6, 4), {"rule": "adamw"})]
        params, optimizer = sharded.build("celo2", [Shard(0)], mesh, specs=specs, max_grad_norm=0.3, **TRITON)
        sharded.set_gradients(params, 0)
        optimizer.step()  # plans, and compares the plan between ranks
        sharded.set_gradients(params, 1)
        with no_host_reads() as launches:
            optimizer.step()
        assert optimizer.planner.kernels.backend.shards
        counts.append(len(launches))
    return counts


def alternating_gradients(mesh):
    """Largest difference from one process when every other step lacks gradients, and how many plans that makes."""
    plans, original = [], Planner.plan_kernels

    def counted(*args):
        plans.append(args)
        return original(*args)

    Planner.plan_kernels = counted
    try:
        worst = alternating_difference(mesh)
    finally:
        Planner.plan_kernels = original
    return worst, len(plans)


def alternating_difference(mesh):
    (single, one), (several, optimizer) = (
        sharded.build("celo2-base", where, mesh, specs=FEW, backend=backend, hidden=2)
        for where, backend in ((None, "torch"), ([Shard(0)], "triton"))
    )
    for step in range(6):
        for params, stepper in ((single, one), (several, optimizer)):
            sharded.set_gradients(params, step)
            for p in params[:2] if step % 2 else params[1:]:
                p.grad = None
            stepper.step()
    return max(float((sharded.whole(a) - sharded.whole(b)).abs().max()) for a, b in zip(single, several, strict=True))


def refused(mesh):
    """Which parameters go through PyTorch, with a limit above the rule's clip and in float64."""
    found = {}
    for name, options in (("limit", {"max_grad_norm": 2000.0}), ("float64", {"dtype": torch.float64})):
        params, optimizer = sharded.build("celo2", [Shard(0)], mesh, specs=FEW, **TRITON, **options)
        sharded.set_gradients(params, 0)
        optimizer.step()
        found[name] = [optimizer.planner.kernels.backend is None, optimizer.table()]
    return found
