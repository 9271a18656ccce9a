"""Meta-train theta: the command line of the outer loop.

    python -m celo2.meta.train --recipe celo2-short --resume auto
    torchrun --standalone --nproc-per-node 2 -m celo2.meta.train --recipe celo2

Leaves in `--out-dir`: the last two checkpoints, one theta a checkpoint, `curve.jsonl` and `curve.png`, and at the end
`theta.safetensors` with its card. SIGHUP saves and goes on; SIGTERM, SIGUSR1 and SIGINT save and stop, while it
compiles at once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from celo2.files import remove_temporary, write_atomic
from celo2.meta.compilation import descendants, end_descendants
from celo2.meta.images import load_image_sets
from celo2.meta.network import Examples
from celo2.meta.outer_trainer import CURVE, OuterTrainer
from celo2.meta.recipes import ABLATIONS, RECIPES, Recipe, get_recipe
from celo2.meta.texts import embedded_text, embedded_windows, zipf_memory
from celo2.meta.truncated_step import BACKENDS, backend_of
from celo2.pretrain import options, require
from celo2.pretrain.device import device_name
from celo2.pretrain.failures import explain, require_compiler
from celo2.pretrain.folder_lock import locked
from celo2.pretrain.interruption import HELP, Interruption, Stop, signals_restored
from celo2.pretrain.parallel import World
from celo2.pretrain.runlog import duration, versions, write_png
from celo2.pretrain.terminal import attempt, printable, unfailing_streams
from celo2.theta import Theta, load_weights

THETA = "theta.safetensors"
# outer steps that the meta-loss of a progress line is averaged over; one window is noise of its scales and ages
SMOOTHING = 50
# processes a rank that make draws ahead: one takes 3 ms a step, and a window of the kernel 0.8 (predicted, H100)
MOST_AHEAD = 4


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Meta-train Celo2's theta on small tasks.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=HELP,
    )
    parser.add_argument(
        "--recipe", type=options.given, default="celo2", metavar="NAME", help=f"{' | '.join(RECIPES)} (default: celo2)"
    )
    parser.add_argument(
        "--ablate",
        type=options.given,
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"ablations: {' | '.join(ABLATIONS)}",
    )
    parser.add_argument(
        "--start",
        type=options.given,
        metavar="WEIGHTS",
        help="a theta to start from, not where the recipe does: a name, a file, a run's folder, or a hub id",
    )
    parser.add_argument("--outer-steps", type=int, metavar="N", help="outer steps; the schedule stretches with them")
    parser.add_argument(
        "--seed",
        type=options.whole_number(0, 2**64 - 1, ", which 64 bits hold"),
        default=0,
        help="theta's start, data order, perturbations (default: 0)",
    )
    parser.add_argument(
        "--data",
        type=options.given,
        default="embedded",
        metavar="SOURCE",
        help="embedded | official | an .npz (default: embedded)",
    )
    parser.add_argument(
        "--out-dir", type=options.path, metavar="DIR", help="folder of this run (default: runs/meta/RECIPE)"
    )
    parser.add_argument(
        "--resume", choices=("auto", "never"), default="never", help="auto: go on where --out-dir stands"
    )
    parser.add_argument("--save-every", type=int, default=250, metavar="N", help="outer steps (default: 250)")
    parser.add_argument("--log-every", type=int, default=25, metavar="N", help="outer steps (default: 25)")
    parser.add_argument("--device", type=options.given, default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument(
        "--threads", type=options.threads, metavar="N", help="CPU threads of a rank (default: PyTorch's choice)"
    )
    parser.add_argument(
        "--backend",
        type=options.given,
        default="auto",
        metavar="NAME",
        help=f"{' | '.join(BACKENDS)}: what advances the MLP's trajectories; auto: a Triton kernel on a GPU",
    )
    parser.add_argument("--no-compile", action="store_true", help="run eagerly, several times slower")
    arguments = parser.parse_args(argv)
    for name in ("outer_steps", "save_every", "log_every"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")
    return arguments


def draw_curve(curve: NDArray[np.float64], path: Path, title: str) -> None:
    """Draw meta-loss, imitation loss where there is one, horizon and gradient norm over the outer steps."""
    from matplotlib.figure import Figure

    columns = dict(zip(CURVE, curve.T, strict=True))
    shown = ["meta_loss", "horizon", "gradient_norm"]
    if columns["imitation"].any():
        shown.insert(1, "imitation")
    figure = Figure(figsize=(8, 2.2 * len(shown)), layout="constrained")
    for axis, name in zip(figure.subplots(len(shown), 1, sharex=True), shown, strict=True):
        values = columns[name]
        width = min(SMOOTHING, len(values))
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axis.plot(np.arange(1, len(values) + 1), values, color="0.8", linewidth=0.6)
        axis.plot(np.arange(width, len(values) + 1), smooth, linewidth=1.4)
        axis.set_ylabel(name.replace("_", " "))
        if name == "gradient_norm":
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    figure.axes[0].set_title(printable(title), parse_math=False)
    figure.axes[-1].set_xlabel("outer step")
    write_png(figure, path, dpi=110)


def write_curve(trainer: OuterTrainer, out_dir: Path) -> None:
    """Write the curve as lines of JSON and as a picture; both are made anew, so a resumed run repeats no line."""
    lines = [
        json.dumps({"outer_step": step, **dict(zip(CURVE, map(float, row), strict=True))}) + "\n"
        for step, row in enumerate(trainer.curve, start=1)
    ]
    write_atomic(out_dir / "curve.jsonl", [line.encode() for line in lines])
    title = f"{trainer.recipe.name}, seed {trainer.seed}"
    attempt("picture", lambda: draw_curve(trainer.curve, out_dir / "curve.png", title))


def card(trainer: OuterTrainer, data: str, seconds: float) -> dict[str, str]:
    """Return what a theta's file says of its making."""
    recipe, software = trainer.recipe, versions()
    start = {} if trainer.start is None else {"start": printable(trainer.start.label)}
    return start | {
        "name": recipe.variant,
        "variant": recipe.variant,
        "orthogonalize": "true" if recipe.variant == "celo2" else "false",
        "recipe": recipe.name,
        "recipe_fields": json.dumps(recipe.identity),
        "data": printable(data),
        "data_sha256": trainer.family.fingerprint,
        "seed": str(trainer.seed),
        "outer_steps": str(trainer.outer_step),
        "inner_steps": str(trainer.outer_step * trainer.inner_steps_per_outer),
        "ranks": str(trainer.world),
        "seconds": f"{seconds:.0f}",
        "machine": device_name(trainer.device),
        "torch": software["torch"],
        "git": software["git"],
        "meta_loss": f"{trainer.recent(SMOOTHING)[:, 0].mean():.4f}",
    }


def train(arguments: argparse.Namespace, held: ExitStack) -> int:
    """Run the meta-training; returns the exit status. `held` keeps the lock of its folder."""
    require("matplotlib", "tqdm", extra="meta")
    from tqdm import tqdm

    recipe = get_recipe(arguments.recipe).ablated(arguments.ablate)
    if arguments.outer_steps is not None:
        recipe = recipe.with_outer_steps(arguments.outer_steps)
    start = None if arguments.start is None else load_weights(arguments.start)
    world = World.start(arguments.device)
    device, main, compiled = world.device, world.main, not arguments.no_compile
    if compiled:
        require_compiler(device, "give --no-compile")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    # as XLA does on the authors' machines: momenta of dead units decay to denormals, which are slow to compute with
    torch.set_flush_denormal(True)
    backend = backend_of(arguments.backend, device)
    trainer = OuterTrainer(
        recipe,
        load_tasks(recipe, arguments.data),
        seed=arguments.seed,
        device=device,
        compiled=compiled,
        backend=backend,
        group=world.control,
        ahead=processes_ahead(device, backend, world),
        start=start,
    )
    held.callback(trainer.close)
    out_dir: Path = arguments.out_dir or Path("runs/meta") / recipe.name
    held.enter_context(locked(out_dir, world))
    if main:
        remove_temporary(out_dir)
    world.barrier()
    clock = out_dir / "seconds.json"
    seconds_before = 0.0
    if arguments.resume == "auto":
        path = trainer.resume(out_dir)
        if path is not None:
            seconds_before = read_clock(clock).get(str(trainer.outer_step), 0.0)
        for note in trainer.notes if main else ():
            print(f"resume: {note}: the run goes on, no longer to the bit")
    elif world.broadcast_object(main and any(out_dir.glob("checkpoint-*"))):
        raise ValueError(f"{out_dir} holds a run: continue it with --resume auto, or choose another --out-dir")
    total = recipe.outer_steps
    if main:
        print(
            f"recipe {recipe.name} | {trainer.total} pairs of {len(trainer.family.tasks)} tasks: "
            f"{', '.join(task.name for task in trainer.family.tasks)}"
        )
        print(
            f"outer steps {trainer.outer_step}/{total} | {trainer.inner_steps_per_outer:,} inner steps each | "
            f"{trainer.world} rank(s) | {device_name(device)} | backend {backend}"
        )
        sys.stdout.flush()
    interruption = Interruption(world)
    started = time.perf_counter()
    if compiled and trainer.outer_step < total and trainer.count_regions():
        compile_ahead(trainer, world, interruption)
    measured: tuple[int, float] | None = None
    saved_at = trainer.outer_step
    # disable=None: no bar unless standard error is a terminal
    with tqdm(total=total, initial=trainer.outer_step, unit="outer", disable=None if main else True) as bar:
        while trainer.outer_step < total and not interruption.settle():
            if interruption.hangup and trainer.outer_step != saved_at:
                checkpoint(trainer, out_dir, clock, seconds_before + time.perf_counter() - started)
                saved_at = trainer.outer_step
            figures = trainer.step()
            bar.update()
            if measured is None:
                # the first step is slower than the others
                measured = (trainer.outer_step, time.perf_counter())
            step = trainer.outer_step
            if main and (step % arguments.log_every == 0 or step == total):
                bar.write(progress_line(trainer, figures, measured), file=sys.stdout)
                sys.stdout.flush()
            if step % arguments.save_every == 0 or step == total:
                checkpoint(trainer, out_dir, clock, seconds_before + time.perf_counter() - started)
                saved_at = step
    if trainer.outer_step < total:
        if trainer.outer_step != saved_at:
            checkpoint(trainer, out_dir, clock, seconds_before + time.perf_counter() - started)
        if main:
            print(f"stopped at outer step {trainer.outer_step}: the same command with --resume auto goes on")
        return 128 + interruption.signal
    if main:
        seconds = seconds_before + time.perf_counter() - started
        theta = Theta.from_arrays(trainer.theta.arrays, card(trainer, arguments.data, seconds))
        theta.save(out_dir / THETA)
        write_curve(trainer, out_dir)
        print(f"{theta!r} after {duration(seconds)} -> {out_dir / THETA}")
    return 0


def processes_ahead(device: torch.device, backend: str, world: World) -> int:
    """Return how many processes make draws ahead: none where a window takes longer than its draws, as on a CPU."""
    if backend != "triton" or device.type == "cpu":
        return 0
    return max(1, min(MOST_AHEAD, len(os.sched_getaffinity(0)) // world.local_ranks - 1))


def compile_ahead(trainer: OuterTrainer, world: World, interruption: Interruption) -> None:
    """Compile the inner step; a signal to stop for ends that at once, with `Stop` on every rank.

    On a CPU the first rank of a machine compiles, with all its processors, and the others load what it has compiled.
    """
    began = time.perf_counter()
    if world.main:
        print(
            f"compiling {trainer.count_regions()} regions of the inner step: a minute or more, unless they are in the "
            "cache; --no-compile goes without",
            flush=True,
        )
    try:
        # a compiler that is ended first leaves no temporary files; one that Stop finds is killed
        with interruption.at_once(partial(end_descendants, [*descendants()])):
            if trainer.device.type == "cpu":
                wait_for([world.rank - world.local_rank] if world.local_rank else [], world)
            trainer.compile()
            world.announce(f"compiled {world.rank}")
            wait_for(range(world.ranks), world)
    except Stop as stop:
        world.announce("stopped", str(stop.signal))
        if world.main:
            name = signal.Signals(stop.signal).name
            print(f"{name} while it compiled: stops at outer step {trainer.outer_step}, checkpoints are as they were")
        raise
    if world.main:
        print(f"compiled in {duration(time.perf_counter() - began)}", flush=True)


def wait_for(ranks: Iterable[int], world: World) -> None:
    """Wait until these ranks have compiled, open to signals. Raises Stop as soon as a rank has announced one."""
    for rank in ranks:
        while world.ranks > 1 and world.announced(f"compiled {rank}") is None:
            number = world.announced("stopped")
            if number is not None:
                raise Stop(int(number))
            time.sleep(0.1)


def load_tasks(recipe: Recipe, images: str) -> list[Examples]:
    """Load the inner tasks of a recipe. Raises as `load_image_sets`."""
    sets: list[Examples] = list(load_image_sets(images)) if "images" in recipe.tasks else []
    if "text" in recipe.tasks:
        sets.append(embedded_text())
    if "memory" in recipe.tasks:
        sets.append(zipf_memory())
    if "transformer" in recipe.tasks:
        sets.append(embedded_windows())
    return sets


def read_clock(path: Path) -> dict[str, float]:
    """Return the wall time in seconds by outer step; a missing or damaged file costs the record, not the run."""
    try:
        return {str(step): float(seconds) for step, seconds in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def checkpoint(trainer: OuterTrainer, out_dir: Path, clock: Path, seconds: float) -> None:
    """Save on all ranks; rank 0 also writes the curve and the wall time at this step."""
    trainer.save(out_dir)
    if trainer.rank == 0:
        times = read_clock(clock)
        times[str(trainer.outer_step)] = round(seconds, 1)
        write_atomic(clock, [json.dumps(times).encode()])
        write_curve(trainer, out_dir)


def progress_line(trainer: OuterTrainer, figures: dict[str, float], measured: tuple[int, float]) -> str:
    """One line: outer step, smoothed meta-loss, gradient norm, horizon, inner steps a second, time left."""
    step, total = trainer.outer_step, trainer.recipe.outer_steps
    recent = dict(zip(CURVE, trainer.recent(SMOOTHING).mean(0), strict=True))
    parts = [f"outer {step}/{total}", f"meta-loss {recent['meta_loss']:.4f}"]
    if trainer.recipe.expert is not None:
        parts.append(f"imitation {recent['imitation']:.4f}")
    parts += [f"gradient norm {figures['gradient_norm']:.3g}", f"lr {figures['lr']:.2e}"]
    parts.append(f"horizon {figures['horizon']:.0f}")
    if figures["non_finite"]:
        parts.append(f"{figures['non_finite']:.0f} losses not finite")
    first, since = measured
    if step > first:
        rate = (step - first) / (time.perf_counter() - since)
        parts += [
            f"{rate * trainer.inner_steps_per_outer:,.0f} inner steps/s",
            f"eta {duration((total - step) / rate)}",
        ]
    return " | ".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for a user's mistake, 128 + the signal that stopped it."""
    arguments = parse_arguments(argv)
    with unfailing_streams():
        return _train(arguments)


def _train(arguments: argparse.Namespace) -> int:
    try:
        with signals_restored(), ExitStack() as held:
            status = train(arguments, held)
        if dist.is_initialized():
            # a rank that leaves while another still works may abort in gloo's teardown
            dist.barrier()
        return status
    except Stop as stop:
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("interrupted; checkpoints are as they were", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        memory = "share the particles among more machines (torchrun)"
        text = explain(error, memory=memory, compiler="give --no-compile, or mend the compiler")
        if text is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
