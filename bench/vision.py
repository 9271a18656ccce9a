"""Train an image classifier of timm with Celo2, AdamW or Muon: one script, from the command line to the accuracy.

    python bench/vision.py --opt celo2
    torchrun --standalone --nproc-per-node 8 bench/vision.py --data /data/imagenet --opt celo2
    python bench/vision.py --data hf:ILSVRC/imagenet-1k --model vit_base_patch16_224 --opt adamw

The Celo2 paper's evaluation on images: a ViT on ImageNet for 50,000 steps, 25 times as long as what the optimizer was
meta-trained on. Without `--data` a ViT of 0.2M parameters learns the images in the package, half a minute on one core.
Everything that is resolved is printed before step 0. A run leaves checkpoints and `metrics.jsonl` in `--out-dir`: loss,
accuracy, and the norms of the weights (the paper's figure 2). Several processes share a batch by DDP.
"""

import argparse
import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vision_data import STEP, Augmentation, EmbeddedImages, Images, RealImages, Share, load_torchvision, seed_draws
from vision_models import (
    NANO,
    attention_views,
    build_model,
    check_model,
    input_side,
    parameters_by_kind,
    register_nano,
    weight_norms,
)
from vision_presets import EMBEDDED, REAL, TUNINGS, UNTESTED

from celo2.pretrain import interruption, options
from celo2.pretrain.checkpoint import SETTING, Checkpoints, RunState
from celo2.pretrain.device import DTYPES, OptimizerTimer, device_name, precision, send
from celo2.pretrain.failures import explain
from celo2.pretrain.folder_lock import locked
from celo2.pretrain.interruption import Interruption, signals_restored
from celo2.pretrain.optimizers import Optimizers
from celo2.pretrain.parallel import World, micro_step, replicate
from celo2.pretrain.recipes import OPTS, learning_rate, warmup_steps
from celo2.pretrain.runlog import METRICS, RunLog, duration, has_records, iterate_metrics, quantity, versions
from celo2.pretrain.terminal import end_with, unfailing_streams
from celo2.pretrain.trackers import tracker_names
from celo2.theta import VARIANTS

MAX_SKIPS = 20


@torch.no_grad()
def evaluate(
    model: nn.Module, images: Images, size: int, dtype: str, world: World, interrupted: Interruption
) -> tuple[float, float] | None:
    """Mean cross-entropy in nats and top-1 accuracy over all held-out images; None when interrupted. Collective."""
    model.eval()
    # ranks poll equally often
    rounds = math.ceil(math.ceil(images.val_images / world.ranks) / size)
    batches = images.validation(size, world.rank, world.ranks)
    nats, right, seen, stopped = 0.0, 0, 0, False
    for _ in range(rounds):
        if stopped := interrupted.poll():
            break
        batch = next(batches, None)
        if batch is None:
            continue
        pixels, labels = (send(part, world.device) for part in batch)
        with precision(world.device, dtype):
            logits = model(images.prepare(pixels, False)).float()
        nats += float(F.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(-1) == labels).sum())
        seen += len(labels)
    model.train()
    if stopped:
        return None
    nats, all_right, all_seen = world.all_reduce_sum(nats, right, seen)
    return nats / all_seen, all_right / all_seen


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train an image classifier of timm with Celo2, AdamW or Muon.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"defaults are those of --data, and of the embedded images in brackets\n\n{interruption.HELP}",
    )
    positive = options.whole_number(1)
    run = parser.add_argument_group("the run")
    run.add_argument("--model", type=options.given, help=f"of timm (default: {REAL['model']} [{NANO}])")
    run.add_argument("--opt", choices=OPTS, default="celo2", help="optimizer (default: celo2)")
    run.add_argument("--weights", type=options.given, help="theta of celo2: a name, a file or a hub id")
    run.add_argument("--seed", type=options.seed, default=1337, help="weights, order, augmentation (default: 1337)")
    run.add_argument("--steps", type=positive, metavar="N", help="optimizer steps (default: 50000 [400])")
    run.add_argument("--batch", type=positive, metavar="N", help="images a step, over all ranks (default: 512 [128])")
    run.add_argument("--smoothing", type=float, default=0.0, metavar="P", help="of the labels (default: 0)")
    run.add_argument("--mixup", type=float, metavar="ALPHA", help="0 for none (default: 0.2 [0])")
    run.add_argument("--cutmix", type=float, default=0.0, metavar="ALPHA", help="0 for none (default: 0)")
    run.add_argument("--drop-path", type=float, default=0.0, metavar="P", help="stochastic depth (default: 0)")
    options.add_tuning(parser.add_argument_group("changes to the optimizer's numbers"))
    data = parser.add_argument_group("images")
    data.add_argument(
        "--data", type=options.given, metavar="DIR", help="folder with train/ and val/, or hf:DATASETS_ID"
    )
    data.add_argument(
        "--small", action="store_true", help="the embedded images, 8 x 8, and a ViT of 0.2M: what runs without --data"
    )
    data.add_argument("--image-size", type=options.whole_number(8), metavar="N", help="pixels (default: the model's)")
    data.add_argument("--aa", type=options.given, metavar="POLICY", help="of timm, or none (default: rand-m10-n2)")
    data.add_argument("--color-jitter", type=float, metavar="X", help="where there is no policy (default: 0.4)")
    data.add_argument("--reprob", type=float, metavar="P", help="random erasing (default: 0)")
    data.add_argument("--crop-pct", type=float, metavar="P", help="of validation (default: 0.9)")
    data.add_argument("--workers", type=options.whole_number(0, 256), metavar="N", help="that read (default: up to 8)")
    output = parser.add_argument_group("output")
    output.add_argument("--out-dir", type=options.path, metavar="DIR", help="(default: runs/vision-MODEL-OPT)")
    output.add_argument("--resume", choices=("auto", "never"), default="never", help="auto: go on with --out-dir")
    output.add_argument("--save-every", type=positive, metavar="N", help="steps (default: 1000 [200])")
    output.add_argument("--eval-every", type=positive, metavar="N", help="steps (default: 2500 [100])")
    output.add_argument("--log-every", type=positive, metavar="N", help="steps, norms too (default: 50 [25])")
    options.add_trackers(output)
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", type=options.given, default="auto", help="auto, cpu, cuda, mps (default: auto)")
    machine.add_argument("--dtype", choices=DTYPES, help="of the forward pass (default: bfloat16 on a GPU)")
    machine.add_argument("--threads", type=options.threads, metavar="N", help="CPU threads (default: PyTorch's choice)")
    machine.add_argument("--micro-batch", type=positive, metavar="N", help="images a forward pass (default: a share)")
    return parser.parse_args(argv)


def resolve(arguments: argparse.Namespace) -> None:
    """Fill in what the command line leaves open; raises ValueError for what does not go together."""
    if arguments.small and arguments.data is not None:
        raise ValueError(f"--small has images of its own: leave --data {arguments.data} out, or --small")
    defaults = EMBEDDED if arguments.data is None else REAL
    for name in ("image_size", "aa", "color_jitter", "reprob", "crop_pct", "workers"):
        if arguments.data is None and getattr(arguments, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} belongs to --data: the embedded images are as they are")
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for name, high in (("smoothing", 1.0), ("drop_path", 1.0), ("mixup", math.inf), ("cutmix", math.inf)):
        if not 0.0 <= getattr(arguments, name) < high:
            limit = "finite and >= 0" if high == math.inf else "within [0, 1)"
            raise ValueError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be {limit}")


def split(arguments: argparse.Namespace, world: World) -> Share:
    """How the batch is split; raises ValueError when something does not divide, with what would."""
    each, rest = divmod(arguments.batch, world.ranks)
    if rest or not each:
        raise ValueError(f"--batch {arguments.batch} does not divide among {world.ranks} ranks")
    size = arguments.micro_batch or each
    if each % size:
        raise ValueError(f"--micro-batch {size} does not divide a rank's {each} images of the batch")
    if (arguments.mixup or arguments.cutmix) and size % 2:
        raise ValueError(f"mixup and cutmix take pairs, and a forward pass has {size} images: --mixup 0, or --batch")
    return Share(size, each // size, world.rank, world.ranks)


def train(arguments: argparse.Namespace, held: ExitStack) -> int:
    """Run the training; returns the exit status. `held` keeps the lock of its folder."""
    resolve(arguments)
    where_from = "embedded" if arguments.data is None else "real"
    tuning, source = TUNINGS.get((where_from, arguments.opt), UNTESTED)
    tuning = options.tuned(tuning, arguments)
    load_torchvision()
    from timm.data import Mixup

    register_nano()
    check_model(arguments.model)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    world = World.start(arguments.device)
    interrupted = Interruption(world)
    say: Callable[..., object] = print if world.main else _silent
    device, where, total = world.device, device_name(world.device), arguments.steps
    dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    share = split(arguments, world)

    # images, the model for them, its optimizers
    images: Images
    if arguments.data is None:
        images = EmbeddedImages(arguments.seed)
    else:
        side = arguments.image_size or input_side(arguments.model)
        policy = None if arguments.aa == "none" else arguments.aa
        augmentation = Augmentation(policy, arguments.color_jitter, arguments.reprob, arguments.crop_pct)
        cores = len(os.sched_getaffinity(0)) // world.local_ranks
        workers = max(1, min(8, cores)) if arguments.workers is None else arguments.workers
        for turn in (True, False):
            # one process of a machine first, which may fetch them
            if (world.local_rank == 0) == turn:
                images = RealImages(arguments.data, side, augmentation, workers, arguments.seed)
            world.barrier()
    torch.manual_seed(arguments.seed)
    model = build_model(arguments.model, images, arguments.drop_path).to(device)
    forward: nn.Module = replicate(model, device) if world.ranks > 1 else model
    views = attention_views(model) if arguments.opt in VARIANTS else None
    optimizers = Optimizers(arguments.opt, tuning, model, arguments.weights, num_steps=arguments.steps, views=views)
    kinds = parameters_by_kind(model)
    mixup = None
    if arguments.mixup or arguments.cutmix:
        mixup = Mixup(
            arguments.mixup, arguments.cutmix, label_smoothing=arguments.smoothing, num_classes=images.classes
        )

    packages = versions() | {name: metadata.version(name) for name in ("timm", "torchvision")}
    rules = ", ".join(f"{count:,} by {rule}" for rule, count in optimizers.parameters_by_rule().items())
    clip, theta = tuning.max_grad_norm or "none", optimizers.theta
    mixed = f"mixup {arguments.mixup:g}, cutmix {arguments.cutmix:g}, smoothing {arguments.smoothing:g}"
    lines = {
        "versions": ", ".join(f"{name} {version}" for name, version in packages.items()),
        "device": f"{where}, {dtype}" + (f", {world.ranks} ranks by ddp" if world.ranks > 1 else ""),
        "images": images,
        "": f"{images.train_images:,} to train on, {total * share.batch / images.train_images:.2f} epochs; "
        f"{images.val_images:,} held out",
        "augmented": f"{images.augmentation}; {mixed}, drop path {arguments.drop_path:g}",
        "model": f"{arguments.model}, {images.side} x {images.side} pixels, {images.classes} classes",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,} ({rules})",
        "optimizer": arguments.opt + (f", theta {theta.label}" if theta else ""),
        "numbers": ", ".join(f"{key} {value}" for key, value in vars(tuning).items()),
        "source": source + ("" if tuning == TUNINGS.get((where_from, arguments.opt), UNTESTED)[0] else "; changed"),
        "schedule": f"{total:,} steps, warm-up {warmup_steps(total, tuning)}, peak lr {tuning.lr:g}, cosine to "
        f"{tuning.final_lr_frac:g} of it; weight decay {tuning.weight_decay:g}, clip {clip}",
        "batch": f"{share.batch:,} images: {share.ranks} x {share.count} x {share.size}, by ranks and micro-batches",
    }
    say("\n".join(f"{name + ':' if name else '':<12}{text}" for name, text in lines.items()))
    say(f"\n{optimizers.table()}\n")

    # where the run stands: what decides its numbers must be the same when it goes on
    out_dir: Path = arguments.out_dir or Path("runs") / f"vision-{arguments.model}-{arguments.opt}".replace("/", "-")
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"--out-dir {out_dir} is a file: give a folder")
    checkpoints = Checkpoints(out_dir, world=world)
    identity: dict[str, Any] = {
        "model": {"name": arguments.model, "classes": images.classes, "drop_path": arguments.drop_path},
        "optimizer": arguments.opt,
        "theta": theta.sha256 if theta else None,
        "tuning": {key: list(value) if isinstance(value, tuple) else value for key, value in vars(tuning).items()},
        "images": images.identity,
        **{key: getattr(arguments, key) for key in ("steps", "batch", "seed", "mixup", "cutmix", "smoothing")},
        "dtype": dtype,
        "micro_batch": share.size,
        "ranks": world.ranks,
        SETTING: {"device": where, "torch": str(torch.__version__), "timm": packages["timm"]},
    }
    held.enter_context(locked(out_dir, world))
    if world.main:
        checkpoints.remove_temporary()
    world.barrier()
    state: RunState | None = None
    if arguments.resume == "auto":
        state, notes = checkpoints.load(model, optimizers, identity, may_differ=("micro_batch", "ranks"))
        for note in notes:
            say(f"resume:     {note}")
    elif world.broadcast_object(world.main and (has_records(out_dir / METRICS) or checkpoints.latest() is not None)):
        raise ValueError(f"{out_dir} holds a run: go on with --resume auto, or give another --out-dir")
    step, skipped = (state.step, state.skipped) if state else (0, 0)
    run_id = state.run_id if state else world.broadcast_object(secrets.token_hex(4))
    say(
        f"output:     {out_dir}, run {run_id}, " + (f"resumed at step {step} of {total}" if state else "from the start")
    )
    given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    log = RunLog(
        out_dir,
        resume_step=step if state else None,
        run_id=run_id,
        config={**identity, "arguments": given, "versions": packages},
        name=f"{arguments.model}-{arguments.opt}",
        trackers=tracker_names(arguments),
        main=world.main,
    )
    log.write(
        "run",
        step=step,
        run_id=run_id,
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        arguments=given,
        identity=identity,
        source=source,
        theta=theta.label if theta else None,
        device=where,
        versions=packages,
    )

    def save() -> None:
        checkpoints.save(model, optimizers, RunState(step, skipped, run_id, identity), before=log.sync)

    def validated() -> bool:
        return world.broadcast_object(log.last("val", "step")[-1:] == [step])

    def validate() -> None:
        # without activations to keep there is room for more than a micro-batch
        found = evaluate(model, images, max(128, share.size), dtype, world, interrupted)
        if found is not None:
            log.write("val", step=step, loss=found[0], accuracy=found[1])
            say(f"step {step}/{total} | validation loss {found[0]:.4f} | accuracy {100 * found[1]:.2f} %")

    timer = OptimizerTimer(device)
    in_a_row, saved_at = 0, step if state else -1
    recent: list[float] = []
    if step == 0:
        log.write("norms", step=0, **weight_norms(kinds))
    if step % arguments.eval_every == 0 and not validated():
        validate()
    batches = images.batches(step, total, share)
    while step < total and not interrupted.signal:
        # one optimizer step: the mean over the whole batch, accumulated from micro-batches
        start = time.perf_counter()
        factor = learning_rate(step, total, tuning) / tuning.lr
        optimizers.set_lr(factor)
        optimizers.zero_grad()
        losses: list[Tensor] = []
        for index in range(share.count):
            pixels, labels = (send(part, device) for part in next(batches))
            # what is drawn from here on, by mixup, erasing and dropped paths, depends on nothing else
            seed_draws(arguments.seed, STEP, step, index, world.rank)
            pixels = images.prepare(pixels, True)
            targets = labels
            if mixup is not None:
                pixels, targets = mixup(pixels, labels)
            with micro_step(forward, index == share.count - 1, "last"):
                with precision(device, dtype):
                    logits = forward(pixels).float()
                smoothing = 0.0 if mixup is not None else arguments.smoothing
                micro_loss = F.cross_entropy(logits, targets, label_smoothing=smoothing) / share.count
                micro_loss.backward()
            losses.append(micro_loss.detach())
            if len(losses) < share.count and interrupted.poll():
                break
        if len(losses) < share.count:
            break
        flags = send(torch.tensor(interrupted.flags(), dtype=torch.float32), device)
        means = world.mean(torch.cat((torch.stack(losses).sum()[None], flags)))
        timer.start()
        grad_norm = optimizers.step(means[0])
        timer.stop()
        # the first wait for the device in this step
        (loss, *counts), norm = means.tolist(), float(grad_norm)
        interrupted.agree(counts)
        finite = math.isfinite(loss) and math.isfinite(norm)
        skipped, in_a_row = (skipped, 0) if finite else (skipped + 1, in_a_row + 1)
        optimizer_ms = timer.elapsed_ms()
        seconds = time.perf_counter() - start
        step += 1

        recent = [*recent[-49:], seconds]
        log.write(
            "train",
            step=step,
            loss=loss,
            grad_norm=norm,
            lr=tuning.lr * factor,
            step_ms=1000 * seconds,
            optimizer_ms=optimizer_ms,
            images_per_s=share.batch / seconds,
            skipped=not finite,
        )
        if step % arguments.log_every == 0 or step == total:
            norms = weight_norms(kinds)
            log.write("norms", step=step, **norms)
        if step % arguments.log_every == 0 or step == total or not finite:
            usual = sorted(recent)[len(recent) // 2]
            cells = [f"step {step}/{total}", f"loss {loss:.4f}", f"norm {norm:.4f}", f"lr {tuning.lr * factor:.1e}"]
            cells += [f"{1000 * usual:.0f} ms (opt {optimizer_ms:.1f})", f"{quantity(share.batch / usual)} images/s"]
            cells += [f"eta {duration(usual * (total - step))}"] + ([] if finite else ["SKIPPED: not finite"])
            say(" | ".join(cells))
        if in_a_row >= MAX_SKIPS:
            save()
            raise FloatingPointError(
                f"{in_a_row} steps in a row had a loss or gradient that is not finite; step {step} is saved in "
                f"{out_dir} with the parameters before them: lower the learning rate"
            )
        if step % arguments.eval_every == 0 or step == total:
            validate()
        if (step % arguments.save_every == 0 or interrupted.hangup) and step < total:
            try:
                save()
                saved_at = step
                if interrupted.hangup and not interrupted.signal:
                    say(f"SIGHUP: step {step} of {total} is saved in {out_dir}; the run goes on")
            except OSError as error:
                # the run is worth more than this checkpoint: the next one may find room
                say(f"warning: {error}")

    if step != saved_at and step > 0:
        save()
    if step == total and not validated():
        # interrupted there, or resumed there
        validate()
    if interrupted.signal:
        saved = f"step {step} of {total} is saved in {out_dir}" if step else "before the first step, nothing to save"
        say(f"{interrupted.name}: {saved}; go on with --resume auto")
        log.close()
        return 130 if interrupted.signal == signal.SIGINT else 0
    if world.main:
        finish(log, out_dir, total, skipped, images)
    log.close()
    world.barrier()
    return 0


def finish(log: RunLog, out_dir: Path, total: int, skipped: int, images: Images) -> None:
    """The last record, and what it says."""
    records = list(iterate_metrics(log.path))
    vals = [record for record in records if record["kind"] == "val"]
    seconds = sum(record["step_ms"] for record in records if record["kind"] == "train") / 1000
    loss, accuracy = (vals[-1][key] for key in ("loss", "accuracy"))
    loss = math.nan if loss is None else loss
    log.write("final", step=total, loss=loss, accuracy=accuracy, skipped=skipped, train_seconds=seconds)
    first = f"; {100 * vals[0]['accuracy']:.2f} % before step 1" if vals[0]["step"] == 0 else ""
    print(f"\nvalidation: loss {loss:.4f}, accuracy {100 * accuracy:.2f} % of {images.val_images:,}{first}")
    print(f"images:     {images}")
    print(f"training:   {duration(seconds)}, {skipped} steps skipped; {out_dir / METRICS}")


def _silent(*_: object) -> None:
    """What the other ranks print."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a mistake in it or in the data is one line on standard error and exit status 1 or 2."""
    arguments = parse_arguments(argv)
    who = "" if os.environ.get("WORLD_SIZE", "1") == "1" else f"rank {os.environ.get('RANK', '?')}: "
    with unfailing_streams():
        try:
            with signals_restored(), ExitStack() as held:
                return train(arguments, held)
        except KeyboardInterrupt:
            print("interrupted; checkpoints are as they were", file=sys.stderr)
            return 130
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            print(f"{who}error: {error}", file=sys.stderr)
            return 1
        except (RuntimeError, MemoryError) as error:
            text = explain(error, memory="lower --micro-batch, or take another --model", compiler="")
            if text is None:
                raise
            print(f"{who}error: {text}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    end_with(main)
