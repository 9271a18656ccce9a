"""Sections of `gpu_check.py` that train: a model's step, meta-training, a small language model."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from gpu_lab import CUDA, DEVICE, Lab, Work, milliseconds, sync, whole
from gpu_speed import free, tried

from celo2.pretrain.device import peak_flops
from celo2.pretrain.machines import MACHINES
from celo2.pretrain.model import GPT, GPTConfig, model_config
from celo2.pretrain.optimizers import Optimizers
from celo2.pretrain.recipes import Recipe, learning_rate, recipe_for
from celo2.theta import Theta

if TYPE_CHECKING:
    from celo2.meta.outer_trainer import OuterTrainer
# processes that make draws ahead of the kernel
AHEAD = max(1, min(4, (os.cpu_count() or 1) - 1))


def predicted_rate(opt: str, model: GPT, tokens: int) -> float | None:
    """Return tokens a second by the model of `celo2.pretrain.machines`; None for a GPU or optimizer that it lacks."""
    name = torch.cuda.get_device_name().lower() if CUDA else ""
    machine = next((machine for key, machine in MACHINES.items() if key in name), None)
    optimizer = Work.of(opt, model).predicted_ms(opt)
    if machine is None or optimizer is None:
        return None
    return whole(tokens / (tokens * model.flops_per_token() / machine.model_rate("bfloat16") + optimizer / 1e3))


def training(lab: Lab) -> None:
    """A training step of GPT-2 124M, 16 sequences of 1024 tokens in bfloat16 autocast, by optimizer."""
    size = lab.sizes[0]
    batch, context = (2, 64) if lab.dry else (16, 1024)
    peak = peak_flops(torch.cuda.get_device_name()) if CUDA else None
    for opt in ("celo2", "adamw", "muon", "celo2-base"):
        if lab.left < 8:
            lab.say("stopped", reason="no time", next=opt)
            return

        def one(opt: str = opt) -> None:
            with DEVICE:
                model = GPT(model_config(size))
            model.init_weights(0)
            optimizers = Optimizers(opt, recipe_for(size, opt), model)
            optimizers.set_lr(0.1)
            tokens = torch.randint(256, (batch, context + 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)

            def passes() -> torch.Tensor:
                # before them: gradients that are added to old ones take longer
                optimizers.zero_grad()
                with torch.autocast(DEVICE.type, torch.bfloat16):
                    loss: torch.Tensor = model(tokens[:, :-1], tokens[:, 1:])
                loss.backward()
                return loss.detach()

            def step() -> torch.Tensor:
                loss = passes()
                optimizers.step(loss)
                return loss

            losses = [float(step()) for _ in range(5)]
            both = milliseconds(step, seconds=0.6)
            optimizer = milliseconds(optimizers.step, seconds=0.2)
            alone = milliseconds(passes, seconds=0.6)
            rate = 1e3 * batch * context / both["ms"]
            record = {"ms": whole(both["ms"]), "passes_ms": whole(alone["ms"]), "optimizer_ms": whole(optimizer["ms"])}
            record |= {"host_ms": whole(both["host_ms"]), "share": whole(1 - alone["ms"] / both["ms"])}
            record |= {"mfu": peak and whole(rate * model.flops_per_token() / peak)}
            record |= {"predicted": predicted_rate(opt, model, batch * context)}
            if CUDA:
                record["peak_gib"] = whole(torch.cuda.max_memory_allocated() / 2**30)
            passed = losses[-1] < losses[0]
            lab.say(f"{size}, {opt}", value=whole(rate), unit="tokens/s", losses=losses, passed=passed, **record)

        tried(lab, opt, one)
        free()


def trainer_of(lab: Lab, recipe: str, kind: str) -> OuterTrainer:
    """Return a meta-training of the paper on the embedded images: `kernel`, or PyTorch `eager` or `compiled`."""
    # its imports take seconds, which other sections need
    from celo2.meta.images import EMBEDDED, load_npz
    from celo2.meta.outer_trainer import OuterTrainer
    from celo2.meta.recipes import get_recipe

    changes = {"particles": 1, "window": 2} if lab.dry else {}
    sets = list(load_npz(EMBEDDED).values())[: 1 if lab.dry else None]
    kernel = kind == "kernel"
    return OuterTrainer(
        replace(get_recipe(recipe), **changes),
        sets,
        device=DEVICE,
        compiled=kind == "compiled",
        backend="triton" if kernel else "torch",
        ahead=AHEAD if kernel else 0,
    )


def meta(lab: Lab) -> None:
    """Outer steps of meta-training: windows of 50 slots of 64 trajectories by the kernel, eagerly and compiled."""
    torch.set_flush_denormal(True)
    kinds = ("kernel", "eager", "compiled")
    for recipe, kind in (("celo2-base", "kernel"), *(("celo2", kind) for kind in kinds if kind != "compiled" or CUDA)):
        # the compiler cannot be interrupted
        if lab.left < {"kernel": 25, "eager": 15, "compiled": 35}[kind] and not lab.dry:
            lab.say("stopped", reason="no time", next=f"{recipe}, {kind}")
            return

        def one(recipe: str = recipe, kind: str = kind) -> None:
            trainer = trainer_of(lab, recipe, kind)
            start = time.perf_counter()
            trainer.step()
            sync()
            first = time.perf_counter() - start
            if kind == "kernel":
                plain = trainer_of(lab, recipe, "eager")
                plain.step()
                ours, theirs = (x.truncated_step.state["hidden_weight"] for x in (trainer, plain))
                apart = (ours - theirs).abs().amax((1, 2)) / theirs.abs().amax((1, 2))
                # at large scales a trajectory is chaotic: a window apart by rounding, half of them are not
                lab.check(f"{recipe}, a window of the kernel beside PyTorch's, median", float(apart.median()), 1e-3)
            times = []
            while len(times) < (1 if lab.dry else 200 if kind == "kernel" else 8) and (not times or lab.left > 3):
                start = time.perf_counter()
                trainer.step()
                sync()
                times.append(time.perf_counter() - start)
            trainer.close()
            rate = 1 / statistics.median(times)
            record = {"inner_steps": whole(trainer.inner_steps_per_outer * rate), "pairs": trainer.total}
            record |= {"first_s": whole(first), "full_recipe_minutes": whole(100_001 / rate / 60)}
            lab.say(f"{recipe}, {kind}", value=whole(rate), unit="windows/s", **record)

        tried(lab, f"{recipe}, {kind}", one)


def meta_train(lab: Lab) -> None:
    """The paper's recipe by the kernel, each variant for half of the time: as many outer steps as there are; thetas."""
    from celo2.meta.train import card

    torch.set_flush_denormal(True)
    share = lab.left / 2
    for number, recipe in enumerate(("celo2", "celo2-base"), start=1):

        def one(recipe: str = recipe, until: float = lab.seconds - number * share) -> None:
            trainer = trainer_of(lab, recipe, "kernel")
            start = time.perf_counter()
            steps = 2 if lab.dry else trainer.recipe.outer_steps
            while trainer.outer_step < steps and lab.left > max(3.0, until):
                trainer.step()
            trainer.close()
            seconds = time.perf_counter() - start
            theta = Theta.from_arrays(trainer.theta.arrays, card(trainer, "embedded", seconds))
            theta.save(lab.out / f"theta-{recipe}-{trainer.outer_step}.safetensors")
            losses = trainer.curve[:, 0]
            window = min(50, len(losses))
            record = {"meta_loss_first": whole(losses[:window].mean()), "meta_loss": whole(losses[-window:].mean())}
            lab.say(f"{recipe}, the paper's recipe", value=trainer.outer_step, unit="outer steps", s=seconds, **record)

        tried(lab, recipe, one)


def language_model(lab: Lab) -> None:
    """The 30m model on the embedded text, byte by byte: equal steps, seeds and batches, three rates an optimizer."""
    from celo2.pretrain.prepare_data import prepare_embedded
    from celo2.pretrain.shards import Loader, find_shards, validation_batches
    from celo2.pretrain.tokenizer import get_tokenizer

    tokenizer = get_tokenizer("bytes")
    layers, heads, dim, context, sequences = (1, 1, 32, 64, 2) if lab.dry else (6, 3, 128, 512, 32)
    config = GPTConfig("modern", layers, heads, dim, context, tokenizer.vocab_size)
    rates = {"celo2": (4.6e-4, 1e-3, 2.2e-3), "muon": (1e-2, 2e-2, 4e-2), "adamw": (1e-3, 2e-3, 4e-3)}
    with tempfile.TemporaryDirectory() as folder:
        train, validation = find_shards(prepare_embedded("bytes", folder))
        val = list(validation_batches(validation, context, 1 << (10 if lab.dry else 17), 64, tokenizer.vocab_id))

        def run(opt: str, lr: float, steps: int) -> tuple[float, float]:
            """Return the validation loss in nats a byte, and seconds a step."""
            tokens = sequences * context
            adam_lr = 2e-3 if opt == "muon" else None
            recipe = Recipe(
                name="check",
                opt=opt,
                lr=lr,
                adam_lr=adam_lr,
                max_grad_norm=1.0,
                batch_tokens=tokens,
                tokens=steps * tokens,
                val_tokens=1,
                source="gpu_check",
            )
            with DEVICE:
                model = GPT(config)
            model.init_weights(0)
            optimizers = Optimizers(opt, recipe, model)
            loader = Loader(train, context, 0, tokenizer.vocab_id)
            start, first = time.perf_counter(), min(5, steps // 2)
            for step in range(steps):
                if step == first:
                    # kernels are compiled
                    sync()
                    start = time.perf_counter()
                inputs, targets = (x.to(DEVICE) for x in loader.batch(step * sequences, sequences))
                optimizers.set_lr(learning_rate(step, steps, recipe) / recipe.lr)
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
                    loss = model(inputs, targets)
                optimizers.zero_grad()
                loss.backward()
                optimizers.step(loss.detach())
            sync()
            seconds = (time.perf_counter() - start) / (steps - first)
            with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
                losses = [float(model(x.to(DEVICE), y.to(DEVICE))) for x, y in val]
            return statistics.fmean(losses), seconds

        slowest = max(run(opt, lrs[0], 5 if lab.dry else 25)[1] for opt, lrs in rates.items())
        runs = sum(map(len, rates.values()))
        steps = max(5, min(4000, int(0.8 * lab.left / runs / slowest)))
        if lab.dry:
            steps = 5
        for index in range(3):
            for opt, lrs in rates.items():
                loss, seconds = run(opt, lrs[index], steps)
                lab.say(
                    f"30m, {opt}, lr {lrs[index]:g}",
                    value=whole(loss),
                    unit="nats/byte",
                    steps=steps,
                    step_s=whole(seconds),
                )
