"""Train a GPT: one linear script, from the command line to the report.

    python pretrain/train_gpt.py --size nano --opt celo2
    torchrun --standalone --nproc-per-node 8 pretrain/train_gpt.py --size small --opt celo2 --data data/fineweb-edu

What is not given comes from the recipe of the size and the optimizer (`recipes.py`). Everything that is resolved is
printed before step 0; a run leaves checkpoints, `metrics.jsonl`, `loss.png` and `report.md` in `--out-dir`. The numbers
of a run do not depend on how many processes share it, up to the order of sums (in bfloat16 up to its rounding, which
`--parallel fsdp` does in more places); several machines start it by `launch/`.
"""

import argparse
import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from celo2.pretrain import fp8, require
from celo2.pretrain.batches import Batches
from celo2.pretrain.checkpoint import Checkpoints, RunState
from celo2.pretrain.device import OptimizerTimer, device_name, memory_gib, peak_flops, precision, send
from celo2.pretrain.evaluation import bits_per_byte
from celo2.pretrain.export import check_export, export_run
from celo2.pretrain.failures import explain, resolve_compile
from celo2.pretrain.folder_lock import locked
from celo2.pretrain.hellaswag import score
from celo2.pretrain.init_hf import load_gpt2
from celo2.pretrain.interruption import Interruption, signals_restored
from celo2.pretrain.loss import automatic_chunks
from celo2.pretrain.model import GPT, model_config
from celo2.pretrain.optimizers import Optimizers
from celo2.pretrain.options import parse_arguments, resolve_recipe
from celo2.pretrain.parallel import Parallel, World, micro_step, replicate, shard
from celo2.pretrain.recipes import Schedule, split_batch
from celo2.pretrain.run import Data, Run, identity_of, open_log
from celo2.pretrain.runlog import METRICS, ZScore, format_step, has_records
from celo2.pretrain.step_norms import StepNorms
from celo2.pretrain.summary import describe, finish, plan_of, setting_of
from celo2.pretrain.terminal import end_with, unfailing_streams
from celo2.pretrain.trackers import check_packages, tracker_names


def build(
    arguments: argparse.Namespace, schedule: Schedule, world: World, parallel: Parallel, dtype: str
) -> tuple[GPT, nn.Module, Optimizers]:
    """The model, what its training forward pass goes through, and the optimizers; weights are drawn from the seed."""
    config = model_config(arguments.size, arguments.arch or schedule.recipe.arch, bias=arguments.bias)
    # a sharded model never exists whole, and a dry run builds any size
    with torch.device("meta" if arguments.dry_run or parallel.sharded else world.device):
        model = GPT(
            config,
            recompute=arguments.activation_checkpointing,
            loss_chunks=arguments.loss_chunks,
            mask_documents=arguments.mask_documents,
        )
    if arguments.fp8 and not arguments.dry_run:
        fp8.convert(model)
    if arguments.compile:
        model.compile_parts()
    if parallel.sharded:
        shard(model, parallel, dtype)
    forward: nn.Module = model
    if not arguments.dry_run:
        if parallel.sharded:
            model.to_empty(device=world.device)
        model.init_weights(arguments.seed)
        if parallel.mode == "ddp":
            forward = replicate(model, world.device)
    optimizers = Optimizers(
        arguments.opt,
        schedule.recipe,
        model,
        arguments.weights,
        num_steps=schedule.steps,
        comm_dtype=arguments.comm_dtype,
        zero1_mesh=parallel.mesh if arguments.zero1 else None,
    )
    return model, forward, optimizers


def train(arguments: argparse.Namespace, held: ExitStack) -> int:
    """Run the training; returns the exit status. `held` keeps the lock of its folder."""
    recipe = resolve_recipe(arguments)
    schedule = Schedule(recipe, tuple(arguments.extend))
    if arguments.world_size is not None:
        print(plan_of(arguments, recipe))
        return 0
    config = model_config(arguments.size, arguments.arch or recipe.arch, bias=arguments.bias)
    if arguments.export_hf is not None:
        check_export(config, arguments.export_hf)
    world = World.start(arguments.device, background=arguments.async_save)
    interruption = Interruption(world)
    log0 = print if world.main else _silent
    micro_batch, micro_steps = split_batch(arguments.micro_batch, recipe.batch_tokens, config.context, world.ranks)
    device, where = world.device, device_name(world.device)
    dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    total = schedule.steps
    parallel = Parallel.choose(arguments.parallel, world.ranks, world.local_ranks, device.type, arguments.shards)
    if arguments.zero1 and parallel.mode != "ddp":
        raise ValueError(f"--zero1 belongs to --parallel ddp, this run is {parallel}")
    # fully_shard casts by itself
    autocast = "float32" if parallel.sharded else dtype

    uncompiled = None
    if not arguments.dry_run:
        if arguments.fp8:
            fp8.require_fp8(device, dtype)
        arguments.compile, uncompiled = resolve_compile(arguments.compile, device)
        # blocks of one run are alike on all ranks
        uncompiled = next((text for text in world.gather(uncompiled) if text is not None), None)
        arguments.compile = bool(arguments.compile) and uncompiled is None
    if arguments.loss_chunks is None:
        tokens = micro_batch * config.context
        arguments.loss_chunks = automatic_chunks(tokens, config.padded_vocab_size) if device.type == "cuda" else 1

    torch.manual_seed(arguments.seed)
    model, forward, optimizers = build(arguments, schedule, world, parallel, dtype)
    if world.main:
        print(describe(arguments, schedule, model, optimizers, (micro_batch, micro_steps), parallel, where))
    if arguments.dry_run:
        return 0
    require("matplotlib", "tqdm")
    check_packages(tracker_names(arguments))
    from tqdm import tqdm

    data = Data.open(arguments, recipe, config.context, world)
    arguments.data = data.folder
    log0(f"data:       {data.describe(recipe, total, config.context)}")

    # where the run stands: what decides its numbers must be the same when it goes on
    out_dir: Path = arguments.out_dir or Path("runs") / f"{arguments.size}-{arguments.opt}"
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"--out-dir {out_dir} is a file: give a folder")
    checkpoints = Checkpoints(
        out_dir, keep=arguments.keep, keep_every=arguments.keep_every, world=world, background=arguments.async_save
    )
    split = {"dtype": dtype, "micro_batch": micro_batch, "ranks": world.ranks, "parallel": parallel.mode}
    setting = setting_of(arguments, parallel, device, where)
    identity = identity_of(arguments, config, optimizers, schedule, data.fingerprints, split, setting)
    held.enter_context(locked(out_dir, world))
    if world.main:
        checkpoints.remove_temporary()
    world.barrier()
    state: RunState | None = None
    if arguments.resume == "auto":
        may_differ, aside = ("micro_batch", "ranks", "parallel"), ("extensions", "weights_of")
        state, notes = checkpoints.load(model, optimizers, identity, may_differ=may_differ, aside=aside)
        for note in notes:
            log0(f"resume:     {note}")
    elif world.broadcast_object(world.main and (has_records(out_dir / METRICS) or checkpoints.latest() is not None)):
        raise ValueError(f"{out_dir} holds a run: go on with --resume auto, or give another --out-dir")
    if state is not None:
        schedule.check(state.step, state.identity.get("extensions", ()))
        identity["weights_of"] = state.identity.get("weights_of")
    elif arguments.init_from is not None:
        identity["weights_of"] = checkpoints.load_weights(model, arguments.init_from, identity["model"])
    elif arguments.init_hf is not None:
        identity["weights_of"] = load_gpt2(model, arguments.init_hf, world)
    if identity["weights_of"] is not None:
        log0(f"weights:    began as those of {identity['weights_of']}")
    step, skipped = (state.step, state.skipped) if state else (0, 0)
    started_at = step
    run_id = state.run_id if state else world.broadcast_object(secrets.token_hex(4))
    log0(
        f"output:     {out_dir}, run {run_id}, " + (f"resumed at step {step} of {total}" if state else "from the start")
    )
    log = open_log(out_dir, arguments, identity, recipe, optimizers, where, run_id, step if state else None, world.main)
    loss_z, norm_z = ZScore(log.last("train", "loss")), ZScore(log.last("train", "grad_norm"))
    peak, flops = peak_flops(where), model.flops_per_token()
    timer, norms = OptimizerTimer(device), StepNorms(model, world, parallel.replicas)
    in_a_row, saved_at = 0, step if state else -1
    recent: list[float] = []
    # None: no bar unless standard error is a terminal
    disable = None if world.main else True
    bar = tqdm(total=total, initial=step, unit="step", disable=disable, dynamic_ncols=True)
    log_line = tqdm.write if world.main else _silent

    batches = Batches(
        data.loader,
        data.token_bytes,
        micro_batch,
        device=device,
        total=total * micro_steps,
        rank=world.rank,
        ranks=world.ranks,
    )
    held.enter_context(batches)
    run = Run(model, optimizers, checkpoints, log, data, world, interruption, log_line, run_id, identity)
    run.step, run.skipped, run.total = step, skipped, total
    run.dtype, run.micro_batch, run.val_tokens = autocast, micro_batch, recipe.val_tokens
    if uncompiled is not None:
        log0(f"compile:    no, {uncompiled}")
    if arguments.compile:
        log0("compile:    each kind of block when it is first used, a minute or more each unless it is in the cache")
    if run.step % arguments.eval_every == 0 and not run.is_validated():
        # at the start, and where a signal ended the validation of this step
        run.validate()
    while run.step < total and not interruption.signal:
        # one optimizer step: the mean over the whole batch, accumulated from micro-batches
        start = time.perf_counter()
        factor = schedule.learning_rate(run.step) / recipe.lr
        optimizers.set_lr(factor)
        optimizers.zero_grad()
        losses, text_bytes = [], 0
        for index in range(micro_steps):
            inputs_BT, targets_BT, count = batches.read(run.step * micro_steps + index)
            text_bytes += count
            with micro_step(forward, index == micro_steps - 1, arguments.reduce):
                with precision(device, autocast):
                    micro_loss = forward(send(inputs_BT, device), send(targets_BT, device)) / micro_steps
                micro_loss.backward()
            losses.append(micro_loss.detach())
            if len(losses) < micro_steps and interruption.poll():
                break
        if len(losses) < micro_steps:
            break
        # what ranks tell each other in a step, in one message: losses, bytes of text, signals
        numbers = send(torch.tensor([text_bytes, *interruption.flags()], dtype=torch.float32), device)
        means = world.mean(torch.cat((torch.stack(losses).sum()[None], numbers)))
        measured = arguments.norms_every and (run.step + 1) % arguments.norms_every == 0
        if measured:
            norms.before()
        timer.start()
        grad_norm = optimizers.step(means[0])
        timer.stop()
        # the first wait for the device in this step
        (loss, mean_bytes, *flags), norm = means.tolist(), float(grad_norm)
        interruption.agree(flags)
        finite = math.isfinite(loss) and math.isfinite(norm)
        run.skipped, in_a_row = (run.skipped, 0) if finite else (run.skipped + 1, in_a_row + 1)
        optimizer_ms = timer.elapsed_ms()
        seconds = time.perf_counter() - start
        run.step += 1

        recent = [*recent[-49:], seconds]
        seconds_left = sorted(recent)[len(recent) // 2] * (total - run.step)
        record = log.write(
            "train",
            step=run.step,
            loss=loss,
            loss_z=loss_z(loss),
            bits_per_byte=bits_per_byte(loss * recipe.batch_tokens, mean_bytes * world.ranks),
            grad_norm=norm,
            grad_norm_z=norm_z(norm),
            lr=recipe.lr * factor,
            step_ms=1000 * seconds,
            optimizer_ms=optimizer_ms,
            optimizer_share=optimizer_ms / (1000 * seconds),
            tokens_per_s=recipe.batch_tokens / seconds,
            mfu=flops * recipe.batch_tokens / seconds / (peak * world.ranks) if peak else None,
            memory_gib=memory_gib(device),
            skipped=not finite,
        )
        if measured:
            log.write("norms", step=run.step, **norms.after())
        bar.update()
        if run.step % arguments.log_every == 0 or run.step == total or not finite:
            log_line(format_step(record, total, seconds_left))
        if in_a_row >= arguments.max_skips:
            run.wait_for_save()
            run.save_and_wait()
            raise FloatingPointError(
                f"{in_a_row} steps in a row had a loss or gradient that is not finite; step {run.step} is saved in "
                f"{out_dir} with the parameters before them: lower the learning rate, or look at these steps' data"
            )
        if run.step % arguments.eval_every == 0 or run.step == total:
            run.validate()
        if (run.step % arguments.save_every == 0 or interruption.hangup) and run.step < total:
            run.wait_for_save()
            try:
                run.save()
                saved_at = run.step
                if interruption.hangup and not interruption.signal:
                    log_line(f"SIGHUP: step {run.step} of {total} is saved in {out_dir}; the run goes on")
            except OSError as error:
                # the run is worth more than this checkpoint: the next one may find room
                log_line(f"warning: {error}")
    bar.close()

    if not run.wait_for_save():
        saved_at = -1
    if run.step != saved_at and run.step > 0:
        run.save_and_wait()
    if run.step == total and not run.is_validated():
        # interrupted there, or the last steps were skipped
        run.validate()
    if interruption.signal:
        saved = (
            f"step {run.step} of {total} is saved in {out_dir}"
            if run.step
            else "before the first step, nothing to save"
        )
        log0(f"{interruption.name}: {saved}; go on with --resume auto")
        log.close()
        if world.main and run.step > started_at and (requeue := os.environ.get("CELO2_REQUEUE")):
            # for the launch script: there is more to do, and another job comes further
            Path(requeue).touch()
        return 130 if interruption.signal == signal.SIGINT else 0
    hellaswag = score(model, data.items, data.tokenizer, world, autocast) if data.items else None
    finish(arguments, schedule, model, optimizers, data.tokenizer, log, out_dir, run.skipped, world, hellaswag)
    log.close()
    if arguments.export_hf is not None:
        log0(f"export:     {export_run(out_dir, arguments.export_hf, world)}")
    world.barrier()
    return 0


def _silent(*_: object) -> None:
    """What the other ranks print."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a mistake in it or in the data is one line on standard error and exit status 1."""
    arguments = parse_arguments(argv)
    with unfailing_streams():
        return _train(arguments)


def _train(arguments: argparse.Namespace) -> int:
    try:
        with signals_restored(), ExitStack() as held:
            return train(arguments, held)
    except KeyboardInterrupt:
        print("interrupted; checkpoints are as they were", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"{_who()}{error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        text = explain(
            error,
            memory="lower --micro-batch, which keeps the numbers, or --size",
            compiler="leave --compile out, or give --no-compile",
        )
        if text is None:
            raise
        print(f"{_who()}{text}", file=sys.stderr)
        return 1


def _who() -> str:
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return "error: " if alone else f"rank {os.environ.get('RANK', '?')}: error: "


def command() -> NoReturn:
    """`celo2-train`: run the command line, and end the process."""
    end_with(main)


if __name__ == "__main__":
    command()
