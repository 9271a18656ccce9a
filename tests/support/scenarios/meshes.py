"""Parameters on two axes of a mesh of four ranks, beside one process's: for `test_meshes.py`."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from celo2 import FusedCelo2
from celo2.sharding import shard_spec_of
from scenarios.sharded import SPECS, load, refusal, save, square_of, theta

DATA, TENSOR = 0, 1  # axes of the mesh

# cuts in order, (axis of the tensor, axis of the mesh), of shapes: matrix, three axes, flattened, vector
COLUMNWISE = [(0, TENSOR), (0, DATA)]  # FSDP2 after tensor parallelism: rows twice
ROWWISE = [(1, TENSOR), (0, DATA)]  # rows and columns
LAYOUTS = {
    "columnwise": [COLUMNWISE, [(1, TENSOR), (0, DATA)], COLUMNWISE, COLUMNWISE],
    "rowwise": [ROWWISE, [(2, TENSOR), (1, DATA)], COLUMNWISE, [(0, DATA)]],
    "rowwise over columns": [[(0, TENSOR), (1, DATA)], [(2, TENSOR), (0, DATA)], [(0, DATA), (0, TENSOR)], COLUMNWISE],
    "columns twice": [[(1, DATA), (1, TENSOR)], [(0, DATA), (0, TENSOR)], [(0, TENSOR)], [(0, TENSOR)]],
    "one axis": [[(1, DATA)], [(1, DATA)], [(0, DATA)], [(0, DATA)]],
    "replicas": [[(0, TENSOR)], [(0, TENSOR)], [(0, TENSOR)], [(0, TENSOR)]],
}
SMALL = [((7, 6), {}), ((8, 6), {"heads": 2}), ((6, 8), {"heads": 4, "axis": 1}), ((2, 5, 4), {}), ((5,), {})]


def shards_of(value: torch.Tensor, mesh, cuts, coordinate) -> torch.Tensor:
    for axis, along in cuts:
        chunks = value.chunk(mesh.size(along), dim=axis)
        empty = value.narrow(axis, 0, 0)
        value = chunks[coordinate[along]] if coordinate[along] < len(chunks) else empty
    return value


def place(value: torch.Tensor, mesh, cuts) -> DTensor:
    """Cut a tensor over a mesh without a message."""
    placements: list = [Replicate()] * mesh.ndim
    for number, (axis, along) in enumerate(cuts):
        before = [other for where, other in cuts[:number] if where == axis]
        strided = before and before[0] > along
        placements[along] = _StridedShard(axis, split_factor=mesh.size(before[0])) if strided else Shard(axis)
    local = shards_of(value, mesh, cuts, mesh.get_coordinate()).contiguous()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=value.shape, stride=value.stride())


def cuts_of(layout: str, shape, group) -> list[tuple[int, int]]:
    matrix, batch, flat, vector = LAYOUTS[layout]
    return vector if len(shape) < 2 else matrix if len(shape) == 2 else flat if "flatten" in group else batch


def build(variant, mesh, layouts, specs, **options):
    """An optimizer whose parameters take the layouts in turn, on the mesh or on a slice of it; None: whole ones."""
    groups, placed = [], []
    generator = torch.Generator().manual_seed(0)
    for number, (shape, group) in enumerate(specs):
        value = 0.1 * torch.randn(shape, generator=generator)
        there, cuts = None, None
        if mesh is not None:
            layout = layouts[number % len(layouts)]
            there, cuts = mesh, cuts_of(layout, shape, group)
            if layout == "one axis":
                there, cuts = mesh["data"], cuts
            value = place(value, there, cuts)
        placed.append((there, cuts))
        groups.append({"params": [nn.Parameter(value)], "rule": "celo2", **group})
    options = {"lr": 1e-2, "weight_decay": 0.1, "weights": theta(variant), "comm_dtype": "float32", **options}
    return [group["params"][0] for group in groups], FusedCelo2(groups, **options), placed


def set_gradients(params, placed, step, scale) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p, (mesh, cuts) in zip(params, placed, strict=True):
        gradient = scale * torch.randn(p.shape, generator=generator)
        p.grad = gradient if mesh is None else place(gradient, mesh, cuts)


def data_and_tensor(ranks):
    return square_of(ranks, ("data", "tensor"))


def differences(ranks, variant, layouts, specs=SPECS, steps=10, scale=0.05, backend="torch", **options) -> list[float]:
    """Largest difference from one process's: of a parameter, of a factor relative to its own, and of the norm."""
    mesh = data_and_tensor(ranks)
    alone, one, wholes = build(variant, None, layouts, specs, **options)
    cut, several, placed = build(variant, mesh, layouts, specs, backend=backend, **options)
    found = [0.0, 0.0, 0.0]
    for step in range(steps):
        set_gradients(alone, wholes, step, scale)
        set_gradients(cut, placed, step, scale)
        one.step()
        several.step()
        found[2] = max(found[2], abs(float(several.grad_norm) / float(one.grad_norm) - 1))
    if backend == "triton":
        assert several.planner.kernels.refused == {} and several.planner.kernels.backend is not None
    for a, b, (there, cuts) in zip(alone, cut, placed, strict=True):
        expected = shards_of(a.detach(), there, cuts, there.get_coordinate())
        if expected.numel():
            found[0] = max(found[0], float((b.to_local() - expected).abs().max()))
        for key in ("row_factor", "column_factor", "factor"):
            if key not in one.state[a]:
                continue
            whole, part = one.state[a][key], several.state[b][key]
            assert part.shape == whole.shape
            values = part.full_tensor()
            found[1] = max(found[1], float(((values - whole) / whole).abs().max()))
    gathered = [None] * 4
    dist.all_gather_object(gathered, found)
    return [max(numbers) for numbers in zip(*gathered, strict=True)]


def replicas_agree(ranks, backend) -> bool:
    """Whether ranks with the same shard have the same bits after steps in bfloat16, which are rounded at random."""
    specs = [((7, 6), {}), ((5,), {})]
    mesh = data_and_tensor(ranks)
    params, optimizer, placed = build("celo2", mesh, ["replicas"], specs, state_dtype="bfloat16", backend=backend)
    for step in range(3):
        set_gradients(params, placed, step, 0.05)
        optimizer.step()
    values = [p.to_local() for p in params] + [
        v.to_local() for p in params for v in optimizer.state[p].values() if v.ndim
    ]
    gathered = [None] * 4
    dist.all_gather_object(gathered, values)
    pairs = [(gathered[column], gathered[2 + column]) for column in range(2)]  # replicas are along the first axis
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def owners(ranks, over: bool) -> dict[str, object]:
    """Newton-Schulz of an HSDP mesh: who owns, and elements that this rank sends and has of directions."""
    specs = [((16, 16), {})] * 8
    mesh = data_and_tensor(ranks)
    params, optimizer, placed = build("celo2", mesh, ["replicas"], specs, ns_over_replicas=over)
    set_gradients(params, placed, 0, 0.05)
    optimizer.step()
    plan = optimizer.planner.ranks.plan
    return {
        "owned": [list(plan.owner.values()).count(rank) for rank in range(4)],
        "sent": sum(plan.send_counts),
        "returned": sum(plan.return_counts),
        "own": sum(plan.part_counts),
    }


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 12)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 24, bias=False)
        self.down = nn.Linear(24, 12, bias=False)
        self.head = nn.Linear(12, 16, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))


def model_of(mesh):
    """A model as a trainer with FSDP2 and tensor parallelism makes it: what is not parallel is sharded over data."""
    torch.manual_seed(0)
    model = Block()
    if mesh is not None:
        parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["data"])
    return model, FusedCelo2(model, lr=1e-2, max_grad_norm=1.0, weights=theta("celo2"), comm_dtype="float32")


def train(model, optimizer, steps, first=0):
    losses = []
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(16, (8, 6), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def trained(ranks, folder: Path) -> dict[str, object]:
    """FSDP2 after tensor parallelism beside one process; its checkpoint resumes there, and in one process."""
    mesh = data_and_tensor(ranks)
    expected = train(*model_of(None), 8)
    model, optimizer = model_of(mesh)
    losses = train(model, optimizer, 4)
    save(model, optimizer, folder)
    losses += train(model, optimizer, 8, first=4)
    again, resumed = model_of(mesh)
    load(again, resumed, folder)
    replayed = train(again, resumed, 8, first=4)
    after = losses[4:]
    if dist.get_rank() == 0:
        whole, alone = model_of(None)
        load(whole, alone, folder, no_dist=True)
        after = train(whole, alone, 8, first=4)
    dist.barrier()
    return {
        "difference": max(abs(a - b) for a, b in zip(losses, expected, strict=True)),
        "resumed": replayed == losses[4:],
        "alone": max(abs(a - b) for a, b in zip(after, losses[4:], strict=True)),
    }


def refusals(ranks) -> list[str]:
    """What is said to strides that fully_shard does not make, a short shard, VeLO, and a mesh apart."""
    mesh, value = data_and_tensor(ranks), torch.zeros(8, 8)
    odd = DTensor.from_local(value[:2], mesh, [_StridedShard(0, split_factor=4), Shard(0)], run_check=False)
    short = DTensor.from_local(value[:1], mesh, [Shard(0), Shard(0)], run_check=False, shape=(8, 8), stride=(8, 1))
    across = DeviceMesh("cpu", [[0, 3], [1, 2]])
    apart = place(value, across, [(0, 0)])
    cases = (
        lambda: FusedCelo2([nn.Parameter(odd)], weights="momentum"),
        lambda: step_of(FusedCelo2([nn.Parameter(short)], weights="momentum")),
        lambda: shard_spec_of(place(value, mesh, ROWWISE)).only_cut(),
        lambda: step_of(FusedCelo2([nn.Parameter(place(value, mesh, ROWWISE)), nn.Parameter(apart)], weights="adam")),
    )
    return [refusal(ValueError, case) for case in cases]


def step_of(optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
