"""Parameters that are sharded on a mesh, stepped beside one process's: for `test_sharded.py` and others."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from celo2 import FusedCelo2, MatrixView, Theta
from celo2.theta import GROUP_COLUMNS

# odd, tall, wide, batched, heads that do not align with shards, fewer rows than ranks, a convolution, a vector
SPECS = [
    ((24, 18), {}),
    ((18, 24), {}),
    ((3, 5), {}),
    ((36, 10), {"split": 3, "heads": 2}),
    ((10, 36), {"heads": 4, "axis": 1}),
    ((36, 10), {"heads": 4}),
    ((6, 5, 7), {}),
    ((16, 3, 2, 2), {"flatten": True}),
    ((9,), {}),
    ((14, 6), {"rule": "adamw"}),
]


def theta(variant: str, hidden: int = 8) -> Theta:
    rng = np.random.default_rng(0)
    shapes = {f"w0__{i}": (columns, hidden) for i, columns in enumerate(GROUP_COLUMNS)}
    shapes |= {"b0": (hidden,), "w1": (hidden, hidden), "b1": (hidden,), "w2": (hidden, 3), "b2": (3,)}
    card = {"variant": variant, "orthogonalize": "true" if variant == "celo2" else "false"}
    return Theta.from_arrays({name: 0.4 * rng.standard_normal(shape) for name, shape in shapes.items()}, card)


def build(variant, placements, mesh, dtype=torch.float32, specs=SPECS, hidden=8, **options):
    """Parameters of `specs`, placed on a mesh unless `placements` is None, and their optimizer."""
    groups = []
    generator = torch.Generator().manual_seed(0)
    for shape, group in specs:
        value = (0.1 * torch.randn(shape, generator=generator)).to(dtype)
        if placements is not None:
            cut = [
                Shard(0) if isinstance(x, Shard) and (len(shape) < 2 or "flatten" in group) else x for x in placements
            ]
            value = distribute_tensor(value, mesh, cut)
        groups.append({"params": [nn.Parameter(value)], "rule": "celo2", **group})
    options = {"lr": 1e-2, "weight_decay": 0.1, "weights": theta(variant, hidden), "comm_dtype": "float32", **options}
    return [group["params"][0] for group in groups], FusedCelo2(groups, **options)


def set_gradients(params, step, scale=0.05):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        gradient = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)
        p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if hasattr(p, "placements") else gradient


def whole(p):
    return p.detach().full_tensor() if hasattr(p, "placements") else p.detach()


def difference(mesh, variant, placements, steps=10, scale=0.05, backend="auto", **options) -> float:
    """Largest difference of a parameter from one process's in PyTorch after some steps."""
    single, one = build(variant, None, mesh, **options)
    sharded, several = build(variant, placements, mesh, backend=backend, **options)
    for step in range(steps):
        set_gradients(single, step, scale)
        set_gradients(sharded, step, scale)
        one.step()
        several.step()
    assert math.isclose(float(one.grad_norm), float(several.grad_norm), rel_tol=1e-5)
    states = [(one.state[a], several.state[b]) for a, b in zip(single, sharded, strict=True)]
    for a, b in states:
        assert a.keys() == b.keys()
        assert all(a[key].shape == b[key].shape for key in a), [(k, a[k].shape, b[k].shape) for k in a]
        # on every rank, also where a shard is empty or has nothing of a matrix
        for key in ("row_factor", "column_factor", "factor", "step"):
            if key in a:
                torch.testing.assert_close(whole(b[key]), a[key], rtol=1e-4, atol=1e-20)
    return max(float((whole(a) - whole(b)).abs().max()) for a, b in zip(single, sharded, strict=True))


def loads_of_8_bits(mesh) -> tuple[bool, bool, bool]:
    """Whether whole and sharded states of 8 bits load each other to the bit, and whether momenta have 8 bits."""
    single, one = build("celo2", None, mesh, state_dtype="int8")
    sharded, several = build("celo2", [Shard(0)], mesh, state_dtype="int8")
    set_gradients(single, 0)
    one.step()
    several.load_state_dict(one.state_dict())
    set_gradients(sharded, 1)
    again = build("celo2", None, mesh, state_dtype="int8")[1]

    def equal(some, others) -> bool:
        pairs = [(one.state[a], several.state[b]) for a, b in zip(some, others, strict=True)]
        return all(torch.equal(a[key], whole(b[key])) for a, b in pairs for key in a)

    whole_to_shards = equal(single, sharded)
    several.step()
    saved = several.state_dict()
    for values in saved["state"].values():
        values.update({key: whole(value) for key, value in values.items()})
    again.load_state_dict(saved)
    one = again
    shards_to_whole = equal([p for group in again.param_groups for p in group["params"]], sharded)
    momenta = [several.state[p] for p in sharded if p.ndim > 1 and "momentum_fast" in several.state[p]]
    return whole_to_shards, shards_to_whole, all(state["momentum_slow"].dtype == torch.int8 for state in momenta)


def cut_columns_of_8_bits(mesh) -> str:
    return refusal(ValueError, lambda: build("celo2", [Shard(1)], mesh, state_dtype="int8"))


def refusal(kind, attempt) -> str:
    """What an attempt is answered with, nothing when it is not refused."""
    try:
        attempt()
    except kind as error:
        return str(error)
    return ""


# a transformer's, of width 128
WIRE_SPECS = [
    ((384, 128), {"split": 3, "heads": 2}),
    ((128, 128), {"heads": 2, "axis": 1}),
    ((128, 128), {}),
    ((512, 128), {}),
    ((128, 512), {}),
]


def set_low_rank_gradients(params, step):
    """Four directions that stay and a little noise: most singular values are below a thousandth of the largest."""
    directions, noise = torch.Generator().manual_seed(100), torch.Generator().manual_seed(101 + step)
    for p in params:
        m, n = p.shape
        gradient = torch.randn(m, 4, generator=directions) @ torch.randn(4, n, generator=directions)
        gradient = 1e-2 * (gradient / 2 + 1e-2 * torch.randn(m, n, generator=noise))
        p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if hasattr(p, "placements") else gradient


def wire_runs(
    mesh, split: bool, low_rank: bool = False, steps: int = 10, comm_dtype: str = "bfloat16"
) -> list[list[torch.Tensor]]:
    """Parameters of one process, on rank 0, and of all ranks after steps with a 16-bit wire, of usual scale and rate.

    `split` says that every rank has whole parameters; else they are sharded. Gradients are noise, or of low rank.
    """
    runs = []
    for several in (False, True):
        generator = torch.Generator().manual_seed(0)
        values = [0.1 * torch.randn(shape, generator=generator) for shape, _ in WIRE_SPECS]
        if several and not split:
            values = [distribute_tensor(value, mesh, [Shard(0)]) for value in values]
        params = [nn.Parameter(value) for value in values]
        groups = [{"params": [p], **view} for p, (_, view) in zip(params, WIRE_SPECS, strict=True)]
        options = {"zero1_mesh": mesh} if several and split else {}
        optimizer = FusedCelo2(groups, lr=1e-3, weight_decay=0.1, comm_dtype=comm_dtype, **options)
        for step in range(steps if several or dist.get_rank() == 0 else 0):
            if low_rank:
                set_low_rank_gradients(params, step)
            else:
                set_gradients(params, step, 1e-2)
            optimizer.step()
        runs.append([whole(p) for p in params])
    return runs


def relative_differences(runs: list[list[torch.Tensor]]) -> dict[str, float]:
    """Of each parameter's worst matrix, and of all parameters, between two runs of `wire_runs`."""
    differences, squares = {}, torch.zeros(2)
    for (shape, view), one, other in zip(WIRE_SPECS, *runs, strict=True):
        a, b = (MatrixView(**view).matrices(p) for p in (one, other))
        ratios = torch.linalg.matrix_norm(a - b) / torch.linalg.matrix_norm(a)
        differences[f"{shape} {view}"] = float(ratios.max())
        squares += torch.stack([(one - other).square().sum(), one.square().sum()])
    differences["all"] = float((squares[0] / squares[1]).sqrt())
    return differences


def collectives_of(step) -> dict[str, int]:
    """How often a step calls each collective of `torch.distributed`; all-gathers under one name."""
    names = [
        "all_reduce",
        "all_to_all_single",
        "all_gather_into_tensor",
        "all_gather",
        "all_gather_object",
        "broadcast",
    ]
    if hasattr(dist, "all_gather_single"):
        # the name of all_gather_into_tensor since PyTorch 2.13
        names.append("all_gather_single")
    counts = dict.fromkeys(names, 0)
    originals = {name: getattr(dist, name) for name in names}

    def counted(name):
        def call(*args, **kwargs):
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counted(name))
    step()
    for name, original in originals.items():
        setattr(dist, name, original)
    counts["gather"] = counts.pop("all_gather_into_tensor") + counts.pop("all_gather_single", 0)
    return {name: count for name, count in counts.items() if count}


def count_collectives(mesh, variant, backend="auto", **options):
    params, optimizer = build(variant, [Shard(0)], mesh, backend=backend, **options)
    set_gradients(params, 0)
    optimizer.step()
    set_gradients(params, 1)
    return collectives_of(optimizer.step) | optimizer.planner.ranks.plan.bytes_sent()


def skipped_steps(mesh, places=(0, 8, 9), **options):
    """Whether steps with a NaN in a parameter's gradient on rank 0 change no byte, and how many were counted."""
    params, optimizer = build("celo2", [Shard(0)], mesh, **options)
    set_gradients(params, 0)
    optimizer.step()
    before = (
        [whole(p).clone() for p in params],
        [{key: whole(value).clone() for key, value in optimizer.state[p].items()} for p in params],
    )
    for where in places:
        set_gradients(params, 1)
        shard = params[where].grad.to_local()
        if shard.numel() and dist.get_rank() == 0:
            shard.view(-1)[0] = math.nan
        optimizer.step()
    after = (
        [whole(p) for p in params],
        [{key: whole(value) for key, value in optimizer.state[p].items()} for p in params],
    )
    same = all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    same = same and all(torch.equal(a[key], b[key]) for a, b in zip(before[1], after[1], strict=True) for key in a)
    return same, optimizer.skipped_steps


def missing_gradients(mesh, places=(0, 4, 8), backend="auto", **options):
    params, optimizer = build("celo2", [Shard(0)], mesh, backend=backend, **options)
    single, one = build("celo2", None, mesh, **options)
    for step in range(3):
        for chosen, stepper in ((params, optimizer), (single, one)):
            set_gradients(chosen, step)
            if step == 1:
                for where in places:
                    chosen[where].grad = None
            stepper.step()
    worst = max(float((whole(a) - whole(b)).abs().max()) for a, b in zip(params, single, strict=True))
    set_gradients(params, 3)
    if dist.get_rank() == 0:
        params[1].grad = None
    return worst, refusal(RuntimeError, optimizer.step)


def idle_matrices(single, one, several, optimizer, specs=SPECS):
    """Largest difference from one process when a gradient comes late, and to one element, which is on one rank alone.

    And whether what never had a gradient is what it was: everything after the first step, later all but each
    parameter's first matrix. `one` steps the parameters `single`, and all ranks' `optimizer` steps `several`.
    """
    before, still = [whole(p).clone() for p in several], True
    for step in range(3):
        for params, stepper in ((single, one), (several, optimizer)):
            for p in params:
                gradient = torch.zeros(p.shape, dtype=p.dtype)
                if step == 1:
                    gradient[(0,) * p.ndim] = 1e-2
                p.grad = (
                    distribute_tensor(gradient, p.device_mesh, p.placements) if hasattr(p, "placements") else gradient
                )
            stepper.step()
        for p, old, (shape, group) in zip(several, before, specs, strict=True):
            if step == 0:
                still = still and torch.equal(whole(p), old)
            elif len(shape) > 1 and "rule" not in group:
                view = MatrixView(**group)
                still = still and torch.equal(view.matrices(whole(p))[1:], view.matrices(old)[1:])
    moved = all(not torch.equal(whole(p), old) for p, old in zip(several, before, strict=True))
    return max(float((whole(a) - whole(b)).abs().max()) for a, b in zip(several, single, strict=True)), still, moved


def idle_shards(mesh, variant, axis, backend="auto", specs=SPECS, hidden=8):
    """`idle_matrices` of sharded parameters."""
    options = {"weight_decay": 0.0, "specs": specs, "hidden": hidden}
    one = build(variant, None, mesh, **options)
    return idle_matrices(*one, *build(variant, [Shard(axis)], mesh, backend=backend, **options), specs)


def other_parameters(mesh):
    params, _ = build("celo2", [Shard(0)], mesh)
    chosen = params[:2] if dist.get_rank() else [params[1], params[0]]
    optimizer = FusedCelo2([{"params": chosen, "rule": "celo2"}], weights=theta("celo2"))
    set_gradients(params, 0)
    return refusal(RuntimeError, optimizer.step)


def other_options(mesh):
    """One option at a time that rank 0 gives otherwise: every rank hears of it, and nobody waits for ever."""
    messages = []
    for options in ({"max_grad_norm": 1.0}, {"lr": 3e-3}, {"adam_betas": (0.8, 0.95)}, {"weight_decay": 0.2}):
        params, _ = build("celo2", [Shard(0)], mesh)
        optimizer = FusedCelo2([{"params": params[:2], "rule": "celo2"}], weights=theta("celo2"))
        optimizer.param_groups[0].update(options if dist.get_rank() == 0 else {})
        set_gradients(params, 0)
        messages.append(refusal(RuntimeError, optimizer.step))
    return messages


def offloaded(mesh):
    """What FSDP2's CPUOffloadPolicy leaves: a shard on the CPU of a mesh of GPUs."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    from celo2.shard_layout import chunk

    devices = DeviceMesh("cuda", mesh.mesh, _init_backend=False)
    meta = TensorMeta(torch.Size((4, 4)), (4, 1), torch.float32)
    start, stop = chunk(4, dist.get_world_size(), dist.get_rank())
    shard = torch.zeros(stop - start, 4)
    parameter = DTensor(shard, DTensorSpec(devices, (Shard(0),), tensor_meta=meta), requires_grad=True)
    return refusal(ValueError, lambda: FusedCelo2([parameter]))


class Tied(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.norm(x) @ self.embedding.weight.T


def train(mesh, how: str, folder: Path) -> list[float]:
    """Losses of 6 steps of a model with tied embeddings: "whole" on every rank, or "sharded" by FSDP2.

    "saved" leaves a checkpoint after 3 steps; "resumed" loads that one, and takes the last 3.
    """
    torch.manual_seed(0)
    model = Tied()
    if how != "whole":
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = FusedCelo2(model, lr=1e-2, weights=theta("celo2"), max_grad_norm=1.0, comm_dtype="float32")
    first = 3 if how == "resumed" else 0
    if first:
        load(model, optimizer, folder)
    losses = []
    for step in range(first, 6):
        tokens = torch.randint(13, (12, 8), generator=torch.Generator().manual_seed(step))
        share = tokens if how == "whole" else tokens.chunk(mesh.size())[dist.get_rank()]
        logits = model(share[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), share[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over(mesh if how != "whole" else None, loss))
        if how == "saved" and step == 2:
            save(model, optimizer, folder)
    return losses


def mean_over(mesh, loss) -> float:
    """The mean of a loss over the ranks of a mesh; without one, the loss."""
    total = loss.detach().clone()
    if mesh is not None:
        dist.all_reduce(total)
        total /= mesh.size()
    return float(total)


def save(model, optimizer, folder: Path) -> None:
    """Write a checkpoint as trainers do, with `torch.distributed.checkpoint`; collective."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load(model, optimizer, folder: Path, **options) -> None:
    """Load what `save` has written, by processes of any number."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder, **options)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)


def square_of(mesh, names=("replicas", "shards")):
    """The same four ranks, two by two."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def hsdp_difference(mesh, variant, **options) -> float:
    return difference(square_of(mesh), variant, [Replicate(), Shard(0)], **options)
