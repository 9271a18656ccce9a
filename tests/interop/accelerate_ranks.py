"""accelerate on the processes of torchrun: DDP and FSDP2 through `prepare`, saved and resumed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import accelerate.state
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from common import (
    batch,
    byte_model,
    distance,
    equal,
    let_accelerate_shard_on_cpus,
    local_bytes,
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

from celo2 import FusedCelo2

STEPS, SAVED = 6, 3


def accelerator_for(way: str) -> Accelerator:
    """A new accelerator: the state that is shared by all of a process is of one way."""
    accelerate.state.AcceleratorState._reset_state(True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap", reshard_after_forward=True)
    return Accelerator(cpu=True, fsdp_plugin=plugin if way == "fsdp2" else None)


def train(way: str, folder: Path | None, first: int = 0) -> dict[str, Any]:
    """Train; save at a step, or begin at one with what was saved."""
    accelerator = accelerator_for(way)
    names = run_snippet("accelerate", accelerator=accelerator, model=byte_model(), lr=1e-2)
    model, optimizer = names["model"], names["optimizer"]
    before = unsharded(optimizer.optimizer)
    if first:
        accelerator.load_state(str(folder))
    losses = []
    for step in range(first, STEPS):
        if folder is not None and not first and step == SAVED:
            accelerator.save_state(str(folder))
        loss = next_token_loss(model, own_rows(batch(step)))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_ranks(loss))
    return {
        "type": accelerator.distributed_type.value,
        "losses": losses,
        "parameters": parameters(model),
        "unsharded": [before, unsharded(optimizer.optimizer)],
        "bytes": local_bytes(optimizer.optimizer),
        "faults": routing_faults(optimizer.optimizer, EXPECTED),
    }


EXPECTED = routes(FusedCelo2(byte_model()))


def main() -> None:
    torch.set_num_threads(1)
    let_accelerate_shard_on_cpus()
    folder, found = Path(sys.argv[1]), {}
    runs = {}
    for way in ("ddp", "fsdp2"):
        run = runs[way] = train(way, folder / way)
        resumed = train(way, folder / way, SAVED)
        found[way] = {key: run[key] for key in ("type", "losses", "unsharded", "bytes", "faults")}
        found[way] |= {
            "resumed losses": resumed["losses"],
            "resumed equal": equal(run["parameters"], resumed["parameters"]),
            "resumed faults": resumed["faults"],
        }
    report(**found, difference=distance(runs["ddp"]["parameters"], runs["fsdp2"]["parameters"]))


if __name__ == "__main__":
    main()
