"""Train a GPT: one linear script, from the command line to the report.

    python pretrain/train_gpt.py --size nano --opt celo2
    torchrun --standalone --nproc-per-node 1 pretrain/train_gpt.py --size small --opt celo2 --data data/fineweb-edu

What is not given comes from the recipe of the size and the optimizer (`recipes.py`). Everything that is resolved is
printed before step 0; a run leaves checkpoints, `metrics.jsonl`, `loss.png` and `report.md` in `--out-dir`.
"""

import argparse
import dataclasses
import io
import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from celo2.pretrain.checkpoint import Checkpoints, RunState
from celo2.pretrain.device import DTYPES, OptimizerTimer, device_name, peak_flops, precision, select_device
from celo2.pretrain.model import ARCHS, GPT, SIZES, model_config
from celo2.pretrain.optimizers import Optimizers
from celo2.pretrain.prepare_data import prepare_embedded
from celo2.pretrain.recipes import OPTS, RECIPES, Recipe, learning_rate, recipe_for, split_batch, warmup_steps
from celo2.pretrain.runlog import (
    CURVE,
    METRICS,
    RunLog,
    ZScore,
    draw_curve,
    duration,
    format_step,
    quantity,
    read_metrics,
    versions,
    write_report,
)
from celo2.pretrain.shards import Loader, find_shards, open_shard, shard_fingerprint, validation_batches
from celo2.pretrain.tokenizer import Tokenizer, get_tokenizer


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a GPT-2 or GPT-3-sized language model with Celo2, AdamW or Muon.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="recipes: " + ", ".join(RECIPES),
    )
    run = parser.add_argument_group("the run")
    run.add_argument("--size", default="nano", metavar="SIZE", help=f"{' | '.join(SIZES)} (default: nano)")
    run.add_argument("--opt", default="celo2", metavar="OPT", help=f"{' | '.join(OPTS)} (default: celo2)")
    run.add_argument("--arch", choices=ARCHS, help="architecture (default: the size's own)")
    run.add_argument("--bias", action="store_true", help="biases, as in the published GPT-2 weights (arch gpt2)")
    run.add_argument("--recipe", metavar="NAME", help="a named recipe instead of the default one")
    run.add_argument("--weights", help="theta of celo2: a name, a file or a hub id (default: the bundled one of --opt)")
    run.add_argument("--seed", type=int, default=1337, help="initial weights and data order (default: 1337)")
    recipe = parser.add_argument_group("changes to the recipe")
    recipe.add_argument("--steps", type=int, metavar="N", help="optimizer steps")
    recipe.add_argument("--batch-tokens", type=int, metavar="N", help="tokens an optimizer step")
    recipe.add_argument("--lr", type=float, help="peak learning rate")
    recipe.add_argument("--weight-decay", type=float, help="decoupled weight decay")
    recipe.add_argument("--max-grad-norm", type=float, help="global gradient-norm clip, 0 for none")
    recipe.add_argument("--val-tokens", type=int, metavar="N", help="tokens of the fixed validation set")
    data = parser.add_argument_group("data and output")
    data.add_argument("--data", type=Path, metavar="DIR", help="folder of .bin shards (default: the embedded text)")
    data.add_argument("--out-dir", type=Path, metavar="DIR", help="folder of this run (default: runs/SIZE-OPT)")
    data.add_argument("--resume", choices=("auto", "never"), default="never", help="auto: go on where --out-dir stands")
    data.add_argument(
        "--save-every", type=int, default=200, metavar="N", help="steps between checkpoints (default: 200)"
    )
    data.add_argument("--keep", type=int, default=2, metavar="K", help="newest checkpoints that stay (default: 2)")
    data.add_argument("--keep-every", type=int, metavar="N", help="checkpoints of every N-th step stay as well")
    data.add_argument(
        "--eval-every", type=int, default=100, metavar="N", help="steps between validations (default: 100)"
    )
    data.add_argument("--log-every", type=int, default=1, metavar="N", help="steps between printed lines (default: 1)")
    data.add_argument("--prompt", default="The ", help="start of the text sample")
    data.add_argument("--sample-tokens", type=int, default=200, metavar="N", help="length of the sample, 0 for none")
    data.add_argument("--wandb", choices=("off", "online", "offline"), default="off", help="log to Weights & Biases")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    machine.add_argument(
        "--dtype", choices=DTYPES, help="of the forward pass (default: bfloat16 on a GPU, else float32)"
    )
    machine.add_argument(
        "--micro-batch", type=int, metavar="N", help="sequences a forward pass (default: 16,384 tokens)"
    )
    machine.add_argument("--compile", action="store_true", help="torch.compile every block")
    machine.add_argument(
        "--max-skips", type=int, default=20, metavar="N", help="skipped steps in a row that end the run"
    )
    machine.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
    arguments = parser.parse_args(argv)
    for name in ("save_every", "eval_every", "log_every", "micro_batch", "max_skips"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")
    return arguments


def resolve_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe with the command line's changes; raises ValueError for an unknown name or a value out of range."""
    recipe = recipe_for(arguments.size, arguments.opt)
    if arguments.recipe is not None:
        if arguments.recipe not in RECIPES:
            raise ValueError(f"unknown recipe {arguments.recipe!r}: choose one of {', '.join(RECIPES)}")
        recipe = RECIPES[arguments.recipe]
        if recipe.opt != arguments.opt:
            raise ValueError(
                f"recipe {recipe.name!r} is for --opt {recipe.opt}, not {arguments.opt}: its learning rate would not "
                "fit; take its other numbers with --steps, --batch-tokens and so on"
            )
    changes = {
        key: getattr(arguments, key)
        for key in ("batch_tokens", "lr", "weight_decay", "max_grad_norm", "val_tokens")
        if getattr(arguments, key) is not None
    }
    if changes.get("max_grad_norm") == 0:
        changes["max_grad_norm"] = None
    if arguments.steps is not None:
        if arguments.steps < 1:
            raise ValueError(f"--steps {arguments.steps}: must be at least 1")
        changes["tokens"] = arguments.steps * changes.get("batch_tokens", recipe.batch_tokens)
    return dataclasses.replace(recipe, **changes)


class Interruption:
    """SIGTERM, SIGUSR1 and SIGINT, noted and acted on between micro-batches: save, then stop."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def received(self) -> bool:
        return self.signal is not None

    @property
    def name(self) -> str:
        return signal.Signals(self.signal).name if self.signal is not None else "none"

    def _note(self, number: int, frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


def bits_per_byte(nats: float, targets_bytes: int) -> float:
    """Summed loss in nats over the bytes of text that the target tokens stand for."""
    return nats / math.log(2) / max(targets_bytes, 1)


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: np.ndarray,
    device: torch.device,
    dtype: str,
    interruption: Interruption,
) -> tuple[float, float] | None:
    """Validation loss in nats a token, token-weighted, and in bits per byte; None when interrupted."""
    model.eval()
    nats, tokens, text_bytes = 0.0, 0, 0
    for inputs_BT, targets_BT in batches:
        if interruption.received():
            return None
        with precision(device, dtype):
            nats += float(model(inputs_BT.to(device), targets_BT.to(device), reduction="sum"))
        tokens += targets_BT.numel()
        text_bytes += int(token_bytes[targets_BT.numpy()].sum())
    model.train()
    return nats / tokens, bits_per_byte(nats, text_bytes)


def describe(
    arguments: argparse.Namespace,
    recipe: Recipe,
    model: GPT,
    optimizers: Optimizers,
    micro: tuple[int, int],
    where: str,
) -> str:
    """Everything that is resolved, as text."""
    config, steps = model.config, recipe.steps
    parameters, rules = model.num_params(), optimizers.parameters_by_rule()
    flops, peak = model.flops_per_token(), peak_flops(where)
    gib = 2**30
    theta = optimizers.theta
    weights = f", theta {theta.label} ({theta.card.get('recipe', 'no recipe in its card')})" if theta else ""
    lines = {
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "device": where + ("" if peak else ": not in the table of peak FLOPs, so no MFU"),
        "model": f"{arguments.size}, {config.arch}: {config.n_layer} layers, {config.n_head} x {config.head_dim} "
        f"heads, width {config.width}, context {config.context}, vocabulary {config.vocab_size}",
        "parameters": f"{parameters:,} ({', '.join(f'{count:,} by {rule}' for rule, count in rules.items())})",
        "optimizer": arguments.opt + weights,
        "recipe": f"{recipe.name}; source: {recipe.source}",
        "schedule": f"{steps:,} steps, warm-up {warmup_steps(steps, recipe)}, peak lr {recipe.lr:g}, cosine to "
        f"{recipe.final_lr_frac:g} of it, weight decay {recipe.weight_decay:g}, clip {recipe.max_grad_norm or 'none'}",
        "batch": f"{recipe.batch_tokens:,} tokens: {micro[0]} sequences of {config.context}, {micro[1]} micro-batches",
        "FLOPs": f"{quantity(flops)} a token, {quantity(flops * recipe.batch_tokens)} a step, "
        f"{quantity(flops * recipe.batch_tokens * steps)} in all",
        "memory": f"{4 * parameters / gib:.3f} GiB parameters, {4 * parameters / gib:.3f} GiB gradients, "
        f"{optimizers.state_bytes() / gib:.3f} GiB optimizer state, and the activations",
    }
    return "\n".join(f"{name + ':':<12}{text}" for name, text in lines.items()) + "\n\n" + optimizers.table() + "\n"


def train(arguments: argparse.Namespace) -> int:
    """Run the training; returns the exit status."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: this version trains on one process; use --nproc-per-node 1"
        )
    recipe = resolve_recipe(arguments)
    config = model_config(arguments.size, arguments.arch, bias=arguments.bias)
    micro_batch, micro_steps = split_batch(arguments.micro_batch, recipe.batch_tokens, config.context)
    device = select_device(arguments.device)
    dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    where = device_name(device)
    total = recipe.steps

    torch.manual_seed(arguments.seed)
    # the model and its optimizer; a dry run builds both on the meta device, at any size
    with torch.device("meta" if arguments.dry_run else device):
        model = GPT(config)
    if not arguments.dry_run:
        model.init_weights(arguments.seed)
    optimizers = Optimizers(arguments.opt, recipe, model, arguments.weights)
    print(describe(arguments, recipe, model, optimizers, (micro_batch, micro_steps), where))
    if arguments.dry_run:
        return 0

    # data: windows addressed by the sample index, a validation set that never changes
    tokenizer = get_tokenizer(SIZES[arguments.size].tokenizer)
    if arguments.data is None:
        arguments.data = prepare_embedded(tokenizer.name, Path("data") / f"wikipedia-{tokenizer.name}")
    train_paths, val_paths = find_shards(arguments.data)
    loader = Loader(train_paths, config.context, arguments.seed, tokenizer.vocab_id)
    shards = {path.name: shard_fingerprint(path) for path in (*train_paths, *val_paths)}
    token_bytes = tokenizer.token_bytes()
    if recipe.val_tokens < config.context:
        raise ValueError(
            f"val_tokens={recipe.val_tokens} is less than one window of {config.context}: raise --val-tokens"
        )

    epochs = total * recipe.batch_tokens / (loader.num_sequences * config.context)
    held_out = config.context * sum(
        (len(open_shard(path, tokenizer.vocab_id)) - 1) // config.context for path in val_paths
    )
    print(
        f"data:       {arguments.data}, {len(train_paths)} training shards, "
        f"{loader.num_sequences * config.context:,} tokens, {epochs:.2f} epochs; validation on "
        f"{min(held_out, recipe.val_tokens):,} tokens"
        + (f", all there are of the recipe's {recipe.val_tokens:,}" if held_out < recipe.val_tokens else "")
    )

    # where the run stands: what decides its numbers must be the same when it goes on
    out_dir: Path = arguments.out_dir or Path("runs") / f"{arguments.size}-{arguments.opt}"
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"--out-dir {out_dir} is a file: give a folder")
    checkpoints = Checkpoints(out_dir, keep=arguments.keep, keep_every=arguments.keep_every)
    identity = {
        "model": dataclasses.asdict(config),
        "optimizer": arguments.opt,
        "theta": optimizers.theta.sha256 if optimizers.theta else None,
        "recipe": {
            key: list(v) if isinstance(v, tuple) else v
            for key, v in vars(recipe).items()
            if key not in ("name", "source")
        },
        "seed": arguments.seed,
        "shards": shards,
        "dtype": dtype,
        "micro_batch": micro_batch,
    }
    state: RunState | None = None
    if arguments.resume == "auto":
        checkpoints.remove_temporary()
        state, notes = checkpoints.load(model, optimizers, identity, may_differ=("micro_batch",))
        for note in notes:
            print(f"resume:     {note}")
    elif read_metrics(out_dir / METRICS) or checkpoints.latest() is not None:
        raise ValueError(f"{out_dir} holds a run: go on with --resume auto, or give another --out-dir")
    out_dir.mkdir(parents=True, exist_ok=True)
    step, skipped = (state.step, state.skipped) if state else (0, 0)
    run_id = state.run_id if state else secrets.token_hex(4)
    print(
        f"output:     {out_dir}, run {run_id}, " + (f"resumed at step {step} of {total}" if state else "from the start")
    )
    given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    log = RunLog(
        out_dir,
        resume_step=step if state else None,
        wandb=arguments.wandb,
        run_id=run_id,
        config={**identity, "arguments": given, "recipe_name": recipe.name, "versions": versions()},
    )
    log.write(
        "run",
        step=step,
        run_id=run_id,
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        arguments=given,
        identity=identity,
        source=recipe.source,
        theta=optimizers.theta.label if optimizers.theta else None,
        device=where,
        versions=versions(),
    )

    def save() -> None:
        log.sync()
        checkpoints.save(model, optimizers, RunState(step, skipped, run_id, identity))

    if arguments.compile:
        for block in model.blocks:
            block.compile()
    interruption = Interruption()
    loss_z, norm_z = ZScore(log.last("train", "loss")), ZScore(log.last("train", "grad_norm"))
    peak, flops = peak_flops(where), model.flops_per_token()
    timer = OptimizerTimer(device)
    in_a_row, saved_at = 0, step if state else -1
    recent: list[float] = []
    # disable=None: no bar unless standard error is a terminal
    bar = tqdm(total=total, initial=step, unit="step", disable=None, dynamic_ncols=True)

    def validate() -> None:
        batches = validation_batches(val_paths, config.context, recipe.val_tokens, micro_batch, tokenizer.vocab_id)
        found = evaluate(model, batches, token_bytes, device, dtype, interruption)
        if found is not None:
            log.write("val", step=step, loss=found[0], bits_per_byte=found[1])
            tqdm.write(f"step {step}/{total} | validation loss {found[0]:.4f} | {found[1]:.3f} bpb")

    if step % arguments.eval_every == 0 and log.last("val", "step")[-1:] != [step]:
        # at the start, and where a signal ended the validation of this step
        validate()
    while step < total and not interruption.received():
        # one optimizer step: the mean over the whole batch, accumulated from micro-batches
        start = time.perf_counter()
        factor = learning_rate(step, total, recipe) / recipe.lr
        optimizers.set_lr(factor)
        optimizers.zero_grad()
        losses, text_bytes = [], 0
        for micro_step in range(micro_steps):
            first = (step * micro_steps + micro_step) * micro_batch
            inputs_BT, targets_BT = loader.batch(first, micro_batch)
            text_bytes += int(token_bytes[targets_BT.numpy()].sum())
            with precision(device, dtype):
                micro_loss = model(inputs_BT.to(device), targets_BT.to(device)) / micro_steps
            micro_loss.backward()
            losses.append(micro_loss.detach())
            if interruption.received():
                break
        if len(losses) < micro_steps:
            break
        loss = float(torch.stack(losses).sum())
        timer.start()
        norm = optimizers.step() if math.isfinite(loss) else math.nan
        timer.stop()
        finite = math.isfinite(loss) and math.isfinite(norm)
        skipped, in_a_row = (skipped, 0) if finite else (skipped + 1, in_a_row + 1)
        optimizer_ms = timer.elapsed_ms()
        seconds = time.perf_counter() - start
        step += 1

        recent = [*recent[-49:], seconds]
        seconds_left = sorted(recent)[len(recent) // 2] * (total - step)
        record = log.write(
            "train",
            step=step,
            loss=loss,
            loss_z=loss_z(loss),
            bits_per_byte=bits_per_byte(loss * recipe.batch_tokens, text_bytes),
            grad_norm=norm,
            grad_norm_z=norm_z(norm),
            lr=recipe.lr * factor,
            step_ms=1000 * seconds,
            optimizer_ms=optimizer_ms,
            tokens_per_s=recipe.batch_tokens / seconds,
            mfu=flops * recipe.batch_tokens / seconds / peak if peak else None,
            skipped=not finite,
        )
        bar.update()
        if step % arguments.log_every == 0 or step == total or not finite:
            tqdm.write(format_step(record, total, seconds_left))
        if in_a_row >= arguments.max_skips:
            save()
            raise FloatingPointError(
                f"{in_a_row} steps in a row had a loss or gradient that is not finite; step {step} is saved in "
                f"{out_dir} with the parameters before them: lower the learning rate, or look at these steps' data"
            )
        if step % arguments.eval_every == 0 or step == total:
            validate()
        if step % arguments.save_every == 0 and step < total:
            try:
                save()
                saved_at = step
            except OSError as error:
                # the run is worth more than this checkpoint: the next one may find room
                tqdm.write(f"warning: {error}")
    bar.close()

    if step != saved_at and step > 0:
        save()
    if step == total and log.last("val", "step")[-1:] != [total]:
        # interrupted there, or the last steps were skipped
        validate()
    if interruption.received():
        saved = f"step {step} of {total} is saved in {out_dir}" if step else "before the first step, nothing to save"
        print(f"{interruption.name}: {saved}; go on with --resume auto")
        log.close()
        return 130 if interruption.signal == signal.SIGINT else 0
    finish(arguments, recipe, model, optimizers, tokenizer, log, out_dir, skipped)
    log.close()
    return 0


def finish(
    arguments: argparse.Namespace,
    recipe: Recipe,
    model: GPT,
    optimizers: Optimizers,
    tokenizer: Tokenizer,
    log: RunLog,
    out_dir: Path,
    skipped: int,
) -> None:
    """Print and write what a finished run has to show: validation loss, sample, picture, report."""
    val = next(record for record in reversed(log.records) if record["kind"] == "val")
    loss, bpb = val["loss"], val["bits_per_byte"]
    device = next(model.parameters()).device
    prompt = torch.tensor([[tokenizer.eot, *tokenizer.encode(arguments.prompt).tolist()]], device=device)
    generator = torch.Generator(device).manual_seed(arguments.seed)
    tokens_BT = model.generate(prompt, max(arguments.sample_tokens, 0), generator=generator)
    text = tokenizer.decode(tokens_BT[0].tolist())
    # a byte model may well write control characters
    sample = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    title = f"{arguments.size}, {arguments.opt}" + (f" ({optimizers.theta.label})" if optimizers.theta else "")
    draw_curve(log.records, out_dir / CURVE, title)
    seconds = sum(record["step_ms"] for record in log.records if record["kind"] == "train") / 1000
    facts: dict[str, Any] = {
        "run": title,
        "validation loss": f"{loss:.4f} nats a token, {bpb:.4f} bits per byte",
        "steps": f"{recipe.steps:,} of {recipe.batch_tokens:,} tokens, {skipped} skipped",
        "peak lr, decay": f"{recipe.lr:g}, {recipe.weight_decay:g}",
        "training time": duration(seconds),
        "data": arguments.data,
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    write_report(out_dir, facts, sample)
    log.write(
        "final", step=recipe.steps, loss=loss, bits_per_byte=bpb, skipped=skipped, train_seconds=seconds, sample=sample
    )
    if arguments.sample_tokens > 0:
        print(f"\nsample:\n{sample}\n")
    print(f"theta:           {optimizers.theta.label}" if optimizers.theta else f"optimizer:       {arguments.opt}")
    print(f"validation loss: {facts['validation loss']}")
    print(f"training time:   {facts['training time']}")
    print(f"picture:         {out_dir / CURVE}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a mistake in it or in the data is one line on standard error and exit status 1."""
    arguments = parse_arguments(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # the sample may hold what the terminal's encoding does not
        sys.stdout.reconfigure(errors="replace")
    handlers = {number: signal.getsignal(number) for number in Interruption.SIGNALS}
    try:
        return train(arguments)
    except KeyboardInterrupt:
        print("interrupted; checkpoints are as they were", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        print(f"error: {str(error).splitlines()[0]}; lower --micro-batch, the numbers stay the same", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
