"""Whole parameters whose steps are split over replicas, beside one process's: for `test_zero1.py`."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from celo2 import FusedCelo2
from celo2.zero1 import gather_rows
from scenarios.sharded import (
    SPECS,
    Tied,
    collectives_of,
    idle_matrices,
    load,
    mean_over,
    refusal,
    save,
    set_gradients,
    theta,
)

MATRICES = [index for index, (shape, group) in enumerate(SPECS) if len(shape) > 1 and "rule" not in group]


def build(variant, mesh, dtype=torch.float32, **options):
    """Parameters of every kind, and their optimizer; without a mesh, one process's."""
    groups = []
    generator = torch.Generator().manual_seed(0)
    for shape, group in SPECS:
        value = (0.1 * torch.randn(shape, generator=generator)).to(dtype)
        groups.append({"params": [nn.Parameter(value)], "rule": "celo2", **group})
    options = {"lr": 1e-2, "weight_decay": 0.1, "weights": theta(variant), "comm_dtype": "float32", **options}
    return [group["params"][0] for group in groups], FusedCelo2(groups, zero1_mesh=mesh, **options)


def same_on_all_ranks(params) -> bool:
    own = torch.cat([p.detach().reshape(-1).contiguous().view(torch.uint8) for p in params])
    first = own.clone()
    dist.broadcast(first, 0)
    differs = torch.tensor(float(not torch.equal(own, first)))
    dist.all_reduce(differs)
    return float(differs) == 0


def everything(params, optimizer):
    """Copies of all that a step may change on this rank."""
    state = [value for p in params for value in optimizer.state[p].values()]
    return [(v.to_local() if isinstance(v, DTensor) else v).detach().clone() for v in (*params, *state)]


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def distance(some, others) -> float:
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in zip(some, others, strict=True))


def difference(mesh, variant, steps=10, scale=0.05, **options) -> float:
    """Largest difference of a parameter from one process's, on rank 0, after some steps that leave all ranks alike."""
    single, one = build(variant, None, **options)
    split, several = build(variant, mesh, **options)
    for step in range(steps):
        set_gradients(split, step, scale)
        several.step()
        assert same_on_all_ranks(split), step
        if dist.get_rank() == 0:
            set_gradients(single, step, scale)
            one.step()
            assert math.isclose(float(one.grad_norm), float(several.grad_norm), rel_tol=1e-5)
    for index, (a, b) in enumerate(zip(single, split, strict=True)):
        assert one.state[a].keys() == several.state[b].keys()
        for key, value in several.state[b].items():
            assert value.shape == one.state[a][key].shape
            assert isinstance(value, DTensor) == (index in MATRICES and key != "step"), (index, key)
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            close = torch.allclose(whole, one.state[a][key], rtol=1e-4, atol=1e-6)
            assert close or dist.get_rank() > 0, (index, key)
    return distance(single, split)


def placed_as_fsdp2(mesh) -> bool:
    """Whether every state tensor has the placements of a parameter's that is a shard itself."""
    params, optimizer = build("celo2", mesh)
    matrices = [params[index] for index in MATRICES]
    shards = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in matrices]
    groups = [{"params": [p], **SPECS[index][1]} for p, index in zip(shards, MATRICES, strict=True)]
    sharded = FusedCelo2(groups, weights=theta("celo2"))
    for p, q in zip(matrices, shards, strict=True):
        for key, value in optimizer.state[p].items():
            other = sharded.state[q][key]
            if isinstance(other, DTensor) and not (
                value.placements == other.placements
                and value.device_mesh == other.device_mesh
                and value.to_local().shape == other.to_local().shape
            ):
                return False
    return True


def low_precision(mesh, **options):
    """Relative distance of parameters from a float32 process's, and of their mean, which rounding does not move."""
    single, one = build("celo2", None)
    split, several = build("celo2", mesh, **options)
    start = [p.detach().clone() for p in split]
    with torch.no_grad():
        for a, b in zip(single, split, strict=True):
            a.copy_(b)
    for step in range(10):
        set_gradients(split, step)
        for a, b in zip(single, split, strict=True):
            a.grad = b.grad.float()
        one.step()
        several.step()
        assert same_on_all_ranks(split), step
    a = torch.cat([single[index].detach().flatten() for index in MATRICES])
    b = torch.cat([split[index].detach().float().flatten() for index in MATRICES])
    moved = torch.cat([start[index].float().flatten() for index in MATRICES]) - a
    return {"distance": float((a - b).norm() / moved.norm()), "mean": float((a - b).mean().abs() / moved.abs().mean())}


def layouts(mesh) -> float:
    """A transposed parameter, gradients of other strides, and memory that moves on one rank."""

    def parameters():
        generator = torch.Generator().manual_seed(1)
        values = [torch.randn(12, 7, generator=generator), torch.randn(9, 2, 3, 3, generator=generator)]
        return [nn.Parameter(0.1 * values[0].T), nn.Parameter(0.1 * values[1])]

    runs = []
    for over in (None, mesh):
        params = parameters()
        groups = [{"params": [params[0]]}, {"params": [params[1]], "flatten": True}]
        optimizer = FusedCelo2(groups, lr=1e-2, weights=theta("celo2"), comm_dtype="float32", zero1_mesh=over)
        for step in range(4):
            set_gradients(params, step)
            params[1].grad = params[1].grad.to(memory_format=torch.channels_last)
            if step == 2 and over is not None and dist.get_rank() == 0:
                params[0].data = params[0].data.clone(memory_format=torch.contiguous_format)
                params[1].data = params[1].data.clone()
            optimizer.step()
        assert over is None or same_on_all_ranks(params)
        runs.append(params)
    return distance(*runs)


def nothing_to_split(mesh) -> float:
    """Vectors, an embedding, a scalar, an empty matrix and a frozen one."""
    runs = []
    for over in (None, mesh):
        generator = torch.Generator().manual_seed(3)
        shapes = {"bias": (5,), "embedding": (7, 3), "scale": (), "empty": (0, 4), "frozen": (4, 4)}
        params = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
        params["frozen"].requires_grad_(False)
        optimizer = FusedCelo2(
            list(params.items()), lr=1e-2, max_grad_norm=1.0, weights=theta("celo2"), zero1_mesh=over
        )
        for _ in range(3):
            for p in params.values():
                p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
            optimizer.step()
        runs.append([p for p in params.values() if p.numel()])
    assert same_on_all_ranks(runs[1])
    return distance(*runs)


def gathered(mesh) -> bool:
    """Whether the rows of all ranks arrive in tensors of all dtypes and layouts, for buckets of any size."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(1, 3), (5, 4), (8, 2, 3), (13, 7), (2, 40), (30, 5)]
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    truth = [torch.randn(shape, generator=generator).to(dtype) for dtype in dtypes for shape in shapes]
    truth.append(torch.randn(7, 11, generator=generator).T)
    for limit in (1, 100, 1000, 1 << 20):
        own = []
        for tensor in truth:
            mine = distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None).to_local()
            own.append(torch.full_like(tensor, math.nan))
            size = -(-tensor.shape[0] // mesh.size())
            own[-1][mesh.get_local_rank() * size :][: mine.shape[0]] = mine
        gather_rows(own, mesh, limit)
        if not equal(own, truth):
            return False
    return True


def count_collectives(mesh, variant):
    params, optimizer = build(variant, mesh)
    set_gradients(params, 0)
    optimizer.step()
    set_gradients(params, 1)
    return collectives_of(optimizer.step)


def skipped_steps(mesh):
    """Steps that nobody may take: a bad element in a row of the last rank, in a vector, for AdamW, a scaler's flag."""
    params, optimizer = build("celo2", mesh, max_grad_norm=1.0)
    set_gradients(params, 0)
    optimizer.step()
    before = everything(params, optimizer)
    for where, bad in ((0, math.nan), (3, math.inf), (8, math.nan), (9, -math.inf)):
        set_gradients(params, 1)
        params[where].grad.view(-1)[-1] = bad
        optimizer.step()
        assert not math.isfinite(float(optimizer.grad_norm))
    set_gradients(params, 1)
    optimizer.found_inf = torch.tensor(float(dist.get_rank() == 0))
    optimizer.step()
    del optimizer.found_inf
    skipped = torch.tensor([optimizer.skipped_steps, -optimizer.skipped_steps])
    dist.all_reduce(skipped, dist.ReduceOp.MAX)
    assert skipped[0] == -skipped[1]
    unchanged = equal(before, everything(params, optimizer))
    optimizer.grad_scale = torch.tensor(4.0)
    single, one = build("celo2", None, max_grad_norm=1.0)
    set_gradients(single, 0)
    one.step()
    set_gradients(single, 1)
    one.step()
    set_gradients(params, 1)
    for p in params:
        p.grad *= 4
    optimizer.step()
    return unchanged, int(skipped[0]), distance(single, params)


def missing_gradients(mesh):
    params, optimizer = build("celo2", mesh)
    single, one = build("celo2", None)
    for chosen, stepper in ((params, optimizer), (single, one)):
        stepper.step()
        assert stepper.grad_norm is None
        for step in range(3):
            set_gradients(chosen, step)
            without = [chosen[index] for index in (0, 4, 8, 9)] if step == 1 else []
            for p in without:
                p.grad = None
            before = everything(without, stepper)
            stepper.step()
            assert equal(before, everything(without, stepper))
    assert same_on_all_ranks(params)
    worst = distance(params, single)
    set_gradients(params, 3)
    if dist.get_rank() == 0:
        params[1].grad = None
    return worst, refusal(RuntimeError, optimizer.step)


def idle(mesh, variant):
    """`idle_matrices` of parameters that are split."""
    return idle_matrices(*build(variant, None, weight_decay=0.0), *build(variant, mesh, weight_decay=0.0))


def copies(mesh):
    """A pickled and a deep copy, a late group, and state dicts of one process and back: all step alike."""
    params, optimizer = build("celo2", mesh)
    single, one = build("celo2", None)
    for chosen, stepper in ((params, optimizer), (single, one)):
        set_gradients(chosen, 0)
        stepper.step()
        late = nn.Parameter(torch.linspace(-0.1, 0.1, 35).view(5, 7))
        stepper.add_param_group({"params": [late], "rule": "celo2"})
        chosen.append(late)
    pickled = pickle.loads(pickle.dumps((params, optimizer)))
    deep = copy.deepcopy((params, optimizer))
    # what one process saved, here; and what this optimizer saved, in one that does not split
    loaded, whole = build("celo2", mesh), build("celo2", None)
    for (chosen, stepper), source, saved in ((loaded, single, one), (whole, params, optimizer)):
        late = nn.Parameter(torch.zeros(5, 7))
        stepper.add_param_group({"params": [late], "rule": "celo2"})
        chosen.append(late)
        with torch.no_grad():
            for p, q in zip(chosen, source, strict=True):
                p.copy_(q)
        stepper.load_state_dict(saved.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    runs = {"pickled": pickled, "deep": deep, "loaded": loaded, "whole": whole, "single": (single, one)}
    for chosen, stepper in ((params, optimizer), *runs.values()):
        for step in (1, 2):
            set_gradients(chosen, step)
            stepper.step()
    return {name: distance(params, chosen) for name, (chosen, _) in runs.items()}


def full_state_dicts(mesh):
    """Whole state dicts, from a split optimizer into one that is split, from rank 0 alone, and into one that is not."""
    options = {"lr": 1e-2, "weights": theta("celo2"), "comm_dtype": "float32"}

    def make(over):
        torch.manual_seed(0)
        model = Tied() if over is None else DistributedDataParallel(Tied())
        return model, FusedCelo2(model, zero1_mesh=over, **options)

    def steps(model, optimizer, first, last):
        for step in range(first, last):
            set_gradients(list(model.parameters()), step)
            optimizer.step()

    model, optimizer = make(mesh)
    steps(model, optimizer, 0, 2)
    saved_model, saved = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    saved_model, saved = copy.deepcopy((saved_model, saved))
    is_plain = not any(isinstance(v, DTensor) for state in saved["state"].values() for v in state.values())
    steps(model, optimizer, 2, 4)
    distances = []
    for over, from_rank0 in ((None, False), (mesh, False), (mesh, True)):
        other, loaded = make(over)
        # loading takes keys away
        given = copy.deepcopy((saved_model, saved)) if not from_rank0 or dist.get_rank() == 0 else ({}, {})
        how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_rank0)
        set_model_state_dict(other, given[0], options=how)
        set_optimizer_state_dict(other, loaded, given[1], options=how)
        steps(other, loaded, 2, 4)
        distances.append(distance(model.parameters(), other.parameters()))
    return is_plain, distances


def refusals(mesh):
    """What each mistake is answered with."""
    square = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("a", "b"))
    weight = nn.Parameter(torch.ones(4, 4))
    shard = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    moved = nn.Parameter(torch.ones(4, 4))
    optimizer = FusedCelo2([moved], zero1_mesh=mesh)
    assert optimizer.state[moved]
    moved.data = moved.data.double()
    moved.grad = torch.ones(4, 4, dtype=torch.float64)
    attempts = {
        "dtensor": lambda: FusedCelo2([shard], zero1_mesh=mesh),
        "late dtensor": lambda: optimizer.add_param_group({"params": [shard]}),
        "mesh": lambda: FusedCelo2([weight], zero1_mesh=square),
        "type": lambda: FusedCelo2([weight], zero1_mesh=dist.group.WORLD),
        "device": lambda: FusedCelo2([nn.Parameter(torch.ones(4, 4, device="meta"))], zero1_mesh=mesh),
        "moved": optimizer.step,
    }
    return {name: refusal((ValueError, TypeError), attempt) for name, attempt in attempts.items()}


def state_bytes(mesh) -> float:
    """Bytes of this model's state on the fullest rank, as a share of one process's."""

    def count(over):
        optimizer = FusedCelo2(Tied(width=96), weights=theta("celo2"), zero1_mesh=over)
        states = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
        tensors = [value for state in states if "momentum_fast" in state for value in state.values()]
        return sum(x.nbytes for x in (v.to_local() if isinstance(v, DTensor) else v for v in tensors))

    fullest = torch.tensor(count(mesh))
    dist.all_reduce(fullest, dist.ReduceOp.MAX)
    return int(fullest) / count(None)


def train(mesh, mode: str, folder: Path, source: str | None = None, saves: bool = False):
    """Losses of 6 steps with tied embeddings, and the parameters; of the last 3 from what `source` saved after 3.

    `mode` is `"whole"` (one process), `"ddp"` (split), or `"fsdp2"`.
    """
    torch.manual_seed(0)
    model = Tied()
    split = None
    if mode == "ddp":
        # gradients of their own memory, and views of buckets
        model, split = DistributedDataParallel(model, gradient_as_bucket_view=source is not None), mesh
    elif mode == "fsdp2":
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    options = {"lr": 1e-2, "weights": theta("celo2"), "max_grad_norm": 1.0, "comm_dtype": "float32"}
    optimizer = FusedCelo2(model, zero1_mesh=split, **options)
    first = 0
    if source is not None:
        load(model, optimizer, folder / source)
        first = 3
    losses = []
    for step in range(first, 6):
        tokens = torch.randint(13, (12, 8), generator=torch.Generator().manual_seed(step))
        share = tokens if mode == "whole" else tokens.chunk(mesh.size())[dist.get_rank()]
        loss = nn.functional.cross_entropy(model(share[:, :-1]).flatten(0, 1), share[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over(mesh if mode != "whole" else None, loss))
        if mode == "ddp":
            assert same_on_all_ranks(list(model.parameters())), step
        if saves and step == 2:
            save(model, optimizer, folder / mode)
    parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return losses, [p.detach() for p in parameters]
