"""torchtitan's OptimizersContainer on sharded parameters, saved by torch.distributed.checkpoint and resumed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import (
    batch,
    byte_model,
    equal,
    mean_over_ranks,
    next_token_loss,
    own_rows,
    parameters,
    report,
    routes,
    routing_faults,
    run_snippet,
    unsharded,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from celo2 import FusedCelo2

STEPS, SAVED = 6, 3
EXPECTED = routes(FusedCelo2(byte_model()))


def build() -> tuple[Any, Any]:
    model = byte_model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # the snippet's dataclass asks for the module that it is of
    config = run_snippet("torchtitan", __name__=__name__)["celo2_optimizer"](lr=1e-2)
    return model, config.build(model_parts=[model])


def train(model: Any, optimizers: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = next_token_loss(model, own_rows(batch(step)))
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
        losses.append(mean_over_ranks(loss))
    return losses


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    model, optimizers = build()
    losses = train(model, optimizers, range(SAVED))
    dcp.save({"model": model.state_dict(), "optimizer": optimizers.state_dict()}, checkpoint_id=folder / "step")
    losses += train(model, optimizers, range(SAVED, STEPS))

    again, restored = build()
    tensors = {"model": again.state_dict(), "optimizer": restored.state_dict()}
    dcp.load(tensors, checkpoint_id=folder / "step")
    again.load_state_dict(tensors["model"])
    restored.load_state_dict(tensors["optimizer"])
    resumed = train(again, restored, range(SAVED, STEPS))
    (optimizer,) = optimizers
    report(
        losses=losses,
        resumed_losses=resumed,
        resumed_equal=equal(parameters(model), parameters(again)),
        unsharded=unsharded(optimizer),
        faults=routing_faults(optimizer, EXPECTED),
    )


if __name__ == "__main__":
    main()
