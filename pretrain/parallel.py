"""The processes of a run: who they are, how the model lies on them, and what they agree on.

`torchrun` (or Slurm, see `launch/`) starts one process a device. A `World` is their number, this one's place among them
and the few messages of the harness itself; they travel on the host (gloo), so none of them waits for a GPU.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from celo2.pretrain.device import select_device
from celo2.pretrain.model import GPT

PARALLEL = ("auto", "fsdp", "hsdp", "ddp")
REDUCE = ("last", "every")


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} in the environment is no number: start with torchrun") from None


def _store() -> torch._C._distributed_c10d.Store:
    """What the processes found each other by: it answers without the others' doing anything."""
    return dist.distributed_c10d._get_default_store()


@dataclass(frozen=True)
class World:
    """The processes of a run. Methods with several processes are collective: every rank calls them alike."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int
    """Processes on this machine."""
    device: torch.device
    control: dist.ProcessGroup | None = None
    """For messages of the harness; None in a run of one process."""
    background: dist.ProcessGroup | None = None
    """For checkpoints written in the background, whose messages must not mix with those of the training."""

    @classmethod
    def start(cls, device: str = "auto", *, background: bool = False) -> World:
        """Join the processes that the environment names (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

        `device` is a name for `select_device`; with several GPUs in a machine each process takes its own. Raises
        ValueError for a device that is not there, for one GPU named to several processes of a machine, and for more
        processes of a machine than it has GPUs.
        """
        ranks, rank = _variable("WORLD_SIZE", 1), _variable("RANK", 0)
        local_rank = _variable("LOCAL_RANK", rank)
        local_ranks = _variable("LOCAL_WORLD_SIZE", ranks)
        if ranks > 1 and torch.cuda.is_available() and device in ("auto", "cuda"):
            gpus = torch.cuda.device_count()
            # all ranks of the machine raise, or some would wait for the others
            if max(local_rank + 1, _variable("LOCAL_WORLD_SIZE", 1)) > gpus:
                raise ValueError(
                    f"{local_ranks} processes on this machine, and each sees {gpus} GPU(s): start one for each GPU, "
                    "let each see all of them, or give --device cpu"
                )
            device = f"cuda:{local_rank}"
        elif local_ranks > 1 and device.startswith("cuda:"):
            raise ValueError(
                f"--device {device}: each of {local_ranks} processes would take it; give cuda, which gives each its own"
            )
        chosen = select_device(device)
        if ranks == 1:
            return cls(0, 1, 0, 1, chosen)
        if chosen.type == "mps":
            raise ValueError(f"WORLD_SIZE={ranks}: several processes train on GPUs or on the CPU, not on {chosen}")
        # gloo connects every two ranks
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        if not dist.is_initialized():
            gpu = chosen.type == "cuda"
            dist.init_process_group("nccl" if gpu else "gloo", device_id=chosen if gpu else None)
        control = dist.new_group(backend="gloo")
        writer = dist.new_group(backend="gloo") if background else None
        return cls(rank, ranks, local_rank, local_ranks, chosen, control, writer)

    @property
    def main(self) -> bool:
        """Whether this process prints and logs."""
        return self.rank == 0

    def all_reduce_max(self, value: int) -> int:
        """The largest of all ranks' values."""
        if self.control is None:
            return value
        tensor = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def all_reduce_sum(self, *values: float) -> list[float]:
        """The sums of all ranks' values, in float64."""
        if self.control is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the ranks, on its device and without waiting for it."""
        if self.control is None:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.ranks

    def broadcast_object(self, value: Any) -> Any:
        """What rank 0 gives; the others' values do not count."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.control is not None:
            dist.barrier(group=self.control)

    def announce(self, name: str, value: str = "") -> None:
        """Leave a word for the other ranks, who may look for it when they like. Not collective."""
        if self.control is not None:
            _store().set(f"celo2/{name}", value)

    def announced(self, name: str) -> str | None:
        """What some rank has announced by this name, or None; ConnectionError when the one that keeps it has left."""
        try:
            if self.control is None or not _store().check([f"celo2/{name}"]):
                return None
            return _store().get(f"celo2/{name}").decode()
        except dist.DistError as error:
            raise ConnectionError("another rank has left") from error

    def gather(self, value: Any, *, background: bool = False) -> list[Any]:
        """All ranks' values, by rank."""
        group = self.background if background else self.control
        if group is None:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value, group=group)
        return values


@dataclass(frozen=True)
class Parallel:
    """How the model lies on the ranks: `mode` is "none", "fsdp", "hsdp" or "ddp"."""

    mode: str
    mesh: DeviceMesh | None
    shards: int
    """Ranks among which each parameter is cut."""
    replicas: int

    @classmethod
    def choose(cls, mode: str, ranks: int, local_ranks: int, device_type: str, shards: int | None = None) -> Parallel:
        """Resolve `--parallel` and make the mesh: hsdp cuts within `shards` ranks, by default those of one machine.

        Raises ValueError when `shards` does not divide the ranks, or belongs to another mode.
        """
        if shards is not None and mode != "hsdp":
            raise ValueError(f"--shards {shards} belongs to --parallel hsdp")
        if ranks == 1:
            return cls("none", None, 1, 1)
        if mode in ("auto", "fsdp"):
            return cls("fsdp", init_device_mesh(device_type, (ranks,), mesh_dim_names=("shards",)), ranks, 1)
        if mode == "ddp":
            return cls("ddp", init_device_mesh(device_type, (ranks,), mesh_dim_names=("replicas",)), 1, ranks)
        shards = local_ranks if shards is None else shards
        if shards < 1 or ranks % shards:
            raise ValueError(f"--shards {shards} must divide the {ranks} ranks")
        names = ("replicas", "shards")
        mesh = init_device_mesh(device_type, (ranks // shards, shards), mesh_dim_names=names)
        return cls("hsdp", mesh, shards, ranks // shards)

    @property
    def sharded(self) -> bool:
        """Whether ranks have parts of the parameters (fsdp, hsdp)."""
        return self.mode in ("fsdp", "hsdp")

    def __str__(self) -> str:
        if self.mode == "hsdp":
            return f"hsdp, {self.replicas} x {self.shards}"
        return "one process" if self.mode == "none" else f"{self.mode}, {self.shards * self.replicas} ranks"


def shard(model: GPT, parallel: Parallel, dtype: str) -> None:
    """Cut the parameters by `fully_shard` (FSDP2), a group for each block and one for the rest.

    With `dtype="bfloat16"` it computes in bfloat16 from float32 parameters, and gradients are reduced in float32; the
    residual stream and the norms are bfloat16 too, which autocast (one process, DDP) keeps in float32. The model may
    still be on the meta device: it then never exists whole on a rank.
    """
    policy = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        # inputs as they are: RoPE's tables stay float32
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=parallel.mesh, mp_policy=policy)
    fully_shard(model, mesh=parallel.mesh, mp_policy=policy)


def replicate(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Wrap a model for data parallelism: `DistributedDataParallel`, with gradients as views of its buckets."""
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


@contextmanager
def micro_step(model: nn.Module, last: bool, reduce: str) -> Iterator[None]:
    """Forward and backward of one micro-batch; gradients travel after the last of a step only, or after every one.

    After the last alone, ranks keep whole gradients in float32 until then; `reduce="every"` keeps shards.
    """
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(last)
        model.set_requires_gradient_sync(last or reduce == "every")
        yield
    elif isinstance(model, DistributedDataParallel) and not last and reduce == "last":
        with model.no_sync():
            yield
    else:
        yield
