"""Lightning on the processes of torchrun: DDP, and FSDP2 through ModelParallelStrategy; saved and resumed."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from common import (
    batch,
    byte_model,
    distance,
    equal,
    next_token_loss,
    parameters,
    report,
    routes,
    routing_faults,
    run_snippet,
    unsharded,
)

# after what `common` declares for torchvision, which Lightning imports
# isort: split
import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from celo2 import FusedCelo2

STEPS, SAVED = 6, 3
EXPECTED = routes(FusedCelo2(byte_model()))
WORLD = int(os.environ["WORLD_SIZE"])
TASK = run_snippet("Lightning", loss_of=next_token_loss, lr=1e-2)["Task"]


class Sharded(TASK):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class Losses(lightning.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.values.append(float(trainer.strategy.reduce(trainer.callback_metrics["loss"], reduce_op="mean")))


def train(way: str, folder: Path, *, steps: int = STEPS, resume: bool = False) -> dict[str, Any]:
    # of an epoch that was left in the middle Lightning takes as many batches as are missing, from the first on
    first = SAVED if resume else 0
    rows = torch.cat([batch((first + step) % STEPS) for step in range(STEPS)])
    losses = Losses()
    sharded = way == "model parallel"
    strategy = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1) if sharded else DDPStrategy()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=strategy,
        max_steps=steps,
        callbacks=[losses],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    task = (Sharded if sharded else TASK)(byte_model())
    sampler = DistributedSampler(rows, WORLD, int(os.environ["RANK"]), shuffle=False)
    data = DataLoader(rows, batch_size=8 // WORLD, sampler=sampler)
    trainer.fit(task, data, ckpt_path=str(folder / "saved.ckpt") if resume else None)
    if steps == SAVED:
        trainer.save_checkpoint(folder / "saved.ckpt")
    optimizer = trainer.optimizers[0]
    return {
        "losses": losses.values,
        "parameters": parameters(task.model),
        "unsharded": unsharded(optimizer),
        "faults": routing_faults(optimizer, EXPECTED),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder, found, runs = Path(sys.argv[1]), {}, {}
    for way in ("ddp", "model parallel"):
        place = folder / way.replace(" ", "-")
        place.mkdir(exist_ok=True)
        run = runs[way] = train(way, place)
        train(way, place, steps=SAVED)
        resumed = train(way, place, resume=True)
        found[way] = {
            **{key: value for key, value in run.items() if key != "parameters"},
            "resumed losses": resumed["losses"],
            "resumed equal": equal(run["parameters"], resumed["parameters"]),
            "resumed faults": resumed["faults"],
        }
    report(**found, difference=distance(runs["ddp"]["parameters"], runs["model parallel"]["parameters"]))


if __name__ == "__main__":
    main()
