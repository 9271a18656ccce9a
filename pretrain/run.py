"""A run under way: its data, what must be the same when it goes on, and what it saves, validates and writes down."""

import argparse
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from celo2.pretrain.checkpoint import SETTING, Checkpoints, RunState
from celo2.pretrain.evaluation import evaluate
from celo2.pretrain.hellaswag import Item, find_items
from celo2.pretrain.interruption import Interruption
from celo2.pretrain.model import GPT, SIZES, GPTConfig
from celo2.pretrain.optimizers import Optimizers
from celo2.pretrain.parallel import World
from celo2.pretrain.prepare_data import prepare_embedded
from celo2.pretrain.recipes import Recipe, Schedule
from celo2.pretrain.runlog import RunLog, versions
from celo2.pretrain.shards import Loader, find_shards, open_shard, shard_fingerprint, validation_batches
from celo2.pretrain.tokenizer import Tokenizer, get_tokenizer
from celo2.pretrain.trackers import tracker_names


@dataclass
class Data:
    """Windows addressed by the index of a sample, and a validation set that never changes."""

    folder: Path
    tokenizer: Tokenizer
    loader: Loader
    train_paths: list[Path]
    val_paths: list[Path]
    fingerprints: dict[str, Any]
    token_bytes: np.ndarray
    """Bytes of text that each token stands for."""
    items: list[Item]
    """Of HellaSwag; empty when it is not asked for."""

    @classmethod
    def open(cls, arguments: argparse.Namespace, recipe: Recipe, context: int, world: World) -> "Data":
        """Find the shards of `--data`, or write the embedded text's; collective.

        Raises ValueError and OSError for what is missing or damaged.
        """
        tokenizer = get_tokenizer(SIZES[arguments.size].tokenizer)
        folder: Path | None = arguments.data
        if folder is None:
            folder = Path("data") / f"wikipedia-{tokenizer.name}"
            if world.local_rank == 0:
                prepare_embedded(tokenizer.name, folder)
            world.barrier()
        train_paths, val_paths = find_shards(folder)
        loader = Loader(train_paths, context, arguments.seed, tokenizer.vocab_id)
        paths = (*train_paths, *val_paths) if world.main else ()
        fingerprints = world.broadcast_object({path.name: shard_fingerprint(path) for path in paths})
        items = find_items(arguments.hellaswag, folder, tokenizer)
        if recipe.val_tokens < context:
            raise ValueError(f"val_tokens={recipe.val_tokens} is less than one window of {context}: raise --val-tokens")
        return cls(folder, tokenizer, loader, train_paths, val_paths, fingerprints, tokenizer.token_bytes(), items)

    def describe(self, recipe: Recipe, steps: int, context: int) -> str:
        """Shards, tokens, epochs of `steps` and the size of the validation set, as text."""
        tokens = self.loader.num_sequences * context
        held_out = context * sum(
            (len(open_shard(path, self.tokenizer.vocab_id)) - 1) // context for path in self.val_paths
        )
        return (
            f"{self.folder}, {len(self.train_paths)} training shards, {tokens:,} tokens, "
            f"{steps * recipe.batch_tokens / tokens:.2f} epochs; validation on "
            f"{min(held_out, recipe.val_tokens):,} tokens"
            + (f", all there are of the recipe's {recipe.val_tokens:,}" if held_out < recipe.val_tokens else "")
        )


def identity_of(
    arguments: argparse.Namespace,
    config: GPTConfig,
    optimizers: Optimizers,
    schedule: Schedule,
    fingerprints: dict[str, Any],
    split: dict[str, Any],
    setting: dict[str, Any],
) -> dict[str, Any]:
    """What decides the numbers of a run, as JSON values; `split` says how its batch is shared out."""
    return {
        "model": dataclasses.asdict(config),
        "optimizer": arguments.opt,
        "theta": optimizers.theta.sha256 if optimizers.theta else None,
        "recipe": {
            key: list(v) if isinstance(v, tuple) else v
            for key, v in vars(schedule.recipe).items()
            # the model has the architecture; checkpoints from before the others were options have none
            if key not in ("name", "source", "arch")
            and (key, v) not in (("momentum", 0.95), ("newton_schulz", "auto"), ("cooldown_frac", None))
        },
        "seed": arguments.seed,
        # checkpoints from before they were options have none
        **{key: True for key in ("mask_documents", "fp8") if getattr(arguments, key)},
        "shards": fingerprints,
        **split,
        "extensions": list(schedule.extensions),
        "weights_of": None,
        SETTING: setting,
    }


def open_log(
    out_dir: Path,
    arguments: argparse.Namespace,
    identity: dict[str, Any],
    recipe: Recipe,
    optimizers: Optimizers,
    where: str,
    run_id: str,
    resumed_at: int | None,
    main: bool,
) -> RunLog:
    """Open the run's log, from the step it is resumed at (None: from the start), and note what goes on."""
    given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    config = {**identity, "arguments": given, "recipe_name": recipe.name, "versions": versions()}
    log = RunLog(
        out_dir,
        resume_step=resumed_at,
        run_id=run_id,
        config=config,
        name=f"{arguments.size}-{arguments.opt}",
        trackers=tracker_names(arguments),
        main=main,
    )
    log.write(
        "run",
        step=resumed_at or 0,
        run_id=run_id,
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        arguments=given,
        identity=identity,
        source=recipe.source,
        theta=optimizers.theta.label if optimizers.theta else None,
        device=where,
        versions=versions(),
    )
    return log


@dataclass
class Run:
    """Where a run stands, with what it needs to save and to validate; its methods are collective."""

    model: GPT
    optimizers: Optimizers
    checkpoints: Checkpoints
    log: RunLog
    data: Data
    world: World
    interruption: Interruption
    log_line: Callable[[str], object]
    """Prints a line beside a progress bar."""
    run_id: str
    identity: dict[str, Any]
    total: int = 0
    """Optimizer steps of the whole run."""
    step: int = 0
    """Those that are done."""
    skipped: int = 0
    dtype: str = "float32"
    """Of the autocast around the model."""
    micro_batch: int = 1
    val_tokens: int = 0

    def save(self) -> None:
        """Begin a checkpoint of this step; raises OSError when a disk refuses."""
        state = RunState(self.step, self.skipped, self.run_id, self.identity)
        self.checkpoints.save(self.model, self.optimizers, state, before=self.log.sync)

    def wait_for_save(self) -> bool:
        """Wait for what is written in the background; whether it is there."""
        try:
            self.checkpoints.wait()
        except OSError as error:
            self.log_line(f"warning: {error}")
            return False
        return True

    def save_and_wait(self) -> None:
        """Save this step and wait until it is written; raises OSError when it is not."""
        self.save()
        self.checkpoints.wait()

    def is_validated(self) -> bool:
        """Whether the log has a validation loss of this step."""
        return self.world.broadcast_object(self.log.last("val", "step")[-1:] == [self.step])

    def validate(self) -> None:
        """Write down the validation loss, unless a signal ends it."""
        world = self.world
        batches = validation_batches(
            self.data.val_paths,
            self.model.config.context,
            self.val_tokens,
            self.micro_batch,
            self.data.tokenizer.vocab_id,
            world.rank,
            world.ranks,
        )
        found = evaluate(self.model, batches, self.data.token_bytes, self.dtype, world, self.interruption)
        if found is not None:
            self.log.write("val", step=self.step, loss=found[0], bits_per_byte=found[1])
            self.log_line(f"step {self.step}/{self.total} | validation loss {found[0]:.4f} | {found[1]:.3f} bpb")
