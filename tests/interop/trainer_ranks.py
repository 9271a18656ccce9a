"""Hugging Face's Trainer: both ways to hand over the optimizer, accumulation, resuming; FSDP2 on several processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from common import (
    batch,
    distance,
    equal,
    let_accelerate_shard_on_cpus,
    llama,
    local_bytes,
    parameters,
    report,
    routes,
    routing_faults,
    run_snippet,
    unsharded,
)
from torch import Tensor
from transformers import TrainingArguments

from celo2 import FusedCelo2

STEPS, SAVED = 6, 3
CLASS, OPTIMIZERS = "Hugging Face Trainer", "Hugging Face Trainer with an optimizer of your own"
WORLD = int(os.environ["WORLD_SIZE"])


def dataset() -> list[dict[str, Tensor]]:
    """Six batches of eight rows."""
    rows = torch.cat([batch(step) for step in range(STEPS)])
    return [{"input_ids": row, "labels": row} for row in rows]


def train(way: str, folder: Path, *, accumulation: int = 1, resume: bool = False, fsdp: bool = False) -> dict[str, Any]:
    """Train eight rows a step on all processes together, saving at a step, or go on from what was saved."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=8 // accumulation // WORLD,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        save_steps=SAVED,
        report_to="none",
        disable_tqdm=True,
        seed=1,
        fsdp=fsdp,
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"} if fsdp else None,
    )
    checkpoint = str(folder / f"checkpoint-{SAVED}") if resume else None
    model = llama()
    names = run_snippet(way, model=model, arguments=arguments, dataset=dataset(), checkpoint=checkpoint, lr=1e-2)
    trainer = names["trainer"]
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, FusedCelo2)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "losses": [log["loss"] for log in logs],
        "rates": [log["learning_rate"] for log in logs],
        "parameters": parameters(model),
        "bytes": local_bytes(optimizer),
        "unsharded": unsharded(optimizer),
        "faults": routing_faults(optimizer, EXPECTED),
    }


def public(run: dict[str, Any]) -> dict[str, Any]:
    """What of a run is reported."""
    return {key: value for key, value in run.items() if key != "parameters"}


EXPECTED = routes(FusedCelo2(llama()))


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    folder, found = Path(sys.argv[1]), {}
    if WORLD > 1:
        let_accelerate_shard_on_cpus()
    runs = {}
    # the Trainer itself refuses an optimizer that is made already with FSDP
    for way in (CLASS, OPTIMIZERS) if WORLD == 1 else (CLASS,):
        place = folder / way.replace(" ", "-")
        run = runs[way] = train(way, place, fsdp=WORLD > 1)
        resumed = train(way, place, fsdp=WORLD > 1, resume=True)
        found[way] = {
            **public(run),
            "resumed losses": resumed["losses"][-(STEPS - SAVED) :],
            "resumed equal": equal(run["parameters"], resumed["parameters"]),
            "resumed faults": resumed["faults"],
        }
    if WORLD == 1:
        found["difference of ways"] = distance(runs[CLASS]["parameters"], runs[OPTIMIZERS]["parameters"])
        run = train(CLASS, folder / "accumulated", accumulation=2)
        found["accumulated"] = public(run)
        found["accumulated"]["difference"] = distance(run["parameters"], runs[CLASS]["parameters"])
        torch.save(runs[CLASS]["parameters"], folder.parent / "trainer.pt")
    else:
        expected = torch.load(folder.parent / "trainer.pt")
        found["difference"] = distance(runs[CLASS]["parameters"], expected)
    report(**found)


if __name__ == "__main__":
    main()
