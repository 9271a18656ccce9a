"""Sections of `gpu_check.py` that measure, each figure with the model's prediction where there is a model."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_lab import (
    CUDA,
    DEVICE,
    Lab,
    Work,
    dtypes_of,
    gpu,
    graph_milliseconds,
    kernel_microseconds,
    milliseconds,
    model_of,
    step_of,
    sync,
    whole,
)

from celo2.kernels.roofline import INSTRUCTIONS, phase_bytes, roofline
from celo2.pretrain.device import peak_flops

BASELINE = "adamw"
STEPPED = (
    "adamw",
    "celo2",
    "celo2-base",
    "muon",
    "adamw, harness",
    "celo2-base, bfloat16 state",
    "celo2, bfloat16 state",
    "celo2-base, int8 state",
    "celo2, int8 state",
    "celo2-base, PyTorch",
)


def free() -> None:
    """Give memory back: of a model of 1.3 billion parameters there is room for two."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def tried(lab: Lab, name: str, work: Callable[[], None]) -> None:
    """Do a piece of a section; a failure is a record, and the next piece goes on."""
    try:
        work()
    except Exception as error:
        lab.say(name, error=repr(error)[:400])


def step_times(lab: Lab) -> None:
    """A step of every optimizer on the harness's own parameters: as a loop makes it, the host's part, and the ratio."""
    for size in lab.sizes:
        # stays beside each of the others, for a ratio of two times a moment apart
        baseline = step_of(BASELINE, size, model_of(size))
        for name in STEPPED:
            if lab.left < 8:
                lab.say("stopped", reason="no time", next=f"{size}, {name}")
                return

            def one(name: str = name, size: str = size, baseline: Callable[[], Any] = baseline) -> None:
                others = torch.cuda.memory_allocated() if CUDA else 0
                model = model_of(size)
                work = Work.of(name, model)
                step = step_of(name, size, model)
                start = time.perf_counter()
                step()
                sync()
                first = time.perf_counter() - start
                figures = milliseconds(step, beside=baseline, seconds=0.2)
                ratio = figures.pop("ratio")
                parameters, moved = work.learned + work.adamw, work.moved(name)
                record: dict[str, Any] = {key: whole(value) for key, value in figures.items()}
                record |= {"first_s": whole(first), "ps": whole(1e9 * figures["ms"] / parameters)}
                record |= {"times_adamw": whole(ratio), "parameters": parameters}
                if moved is not None and not work.flops:
                    record["tb_s"] = whole(moved / figures["ms"] / 1e9)
                    record["bytes"] = whole(moved / parameters)
                if CUDA:
                    record["peak_gib"] = whole((torch.cuda.max_memory_allocated() - others) / 2**30)
                lab.say(f"{size}, {name}", unit="ms", value=record["ms"], predicted=work.predicted_ms(name), **record)

            tried(lab, f"{size}, {name}", one)
            free()
        del baseline
        free()


def graphs(lab: Lab) -> None:
    """A step replayed from a CUDA graph: the device alone. A capture that fails may spoil what follows."""
    if not CUDA:
        lab.say("skipped", reason="CUDA graphs need a GPU")
        return
    for size in lab.sizes:
        for name in ("celo2-base", "celo2", BASELINE):
            if lab.left < 6:
                lab.say("stopped", reason="no time")
                return

            def one(name: str = name, size: str = size) -> None:
                model = model_of(size)
                work = Work.of(name, model)
                value = graph_milliseconds(step_of(name, size, model, capturable=True))
                lab.say(f"{size}, {name}", value=whole(value), unit="ms", predicted=work.predicted_ms(name))

            tried(lab, f"{size}, {name}", one)
            free()


def phases(lab: Lab) -> None:
    """Every kernel of a step: time on the device, and for the four over elements bandwidth and prediction."""
    from celo2.kernels.report import PHASES

    here = gpu()
    for size in lab.sizes:
        for name in ("celo2-base", "celo2-base, bfloat16 state", "celo2"):
            if lab.left < 6:
                lab.say("stopped", reason="no time")
                return

            def one(name: str = name, size: str = size) -> None:
                model = model_of(size)
                work, dtypes = Work.of(name, model), dtypes_of(name)
                predicted = roofline(here, INSTRUCTIONS[here.target], dtypes) if here else {}
                times = kernel_microseconds(step_of(name, size, model))
                total, launches = (sum(column) for column in zip(*times.values(), strict=True))
                expected = work.predicted_ms(name)
                sums = {"unit": "us", "launches": launches, "predicted": expected and whole(1e3 * expected)}
                lab.say(f"{size}, {name}: all kernels", value=whole(total), **sums)
                for kernel, (microseconds, count) in list(times.items())[:24]:
                    record: dict[str, Any] = {"value": whole(microseconds), "unit": "us", "launches": count}
                    phase = PHASES.get(kernel)
                    if phase is not None:
                        moved = phase_bytes(phase, dtypes)
                        record |= {"phase": phase, "bytes": moved}
                        record["tb_s"] = whole(moved * work.learned / microseconds / 1e6)
                        if here:
                            record["of_sheet"] = whole(record["tb_s"] * 1e12 / here.bandwidth)
                            record["predicted"] = whole(1e6 * predicted[phase] * work.learned)
                    lab.say(f"{size}, {name}: {kernel[:70]}", **record)

            tried(lab, f"{size}, {name}", one)
            free()


def newton_schulz(lab: Lab) -> None:
    """Five iterations by shape, in float16: ours, beside the standard form through torch.bmm and our products."""
    from celo2.batched_newton_schulz import orthogonalize_, products_for, symmetric_product, takes_one_program
    from celo2.newton_schulz import _standard_form, in_best_form, newton_schulz_flops, product

    shapes = [(12, 768, 3072), (12, 3072, 768), (432, 64, 768), (144, 768, 64)]
    shapes += [(24, 2048, 8192), (24, 8192, 2048), (1152, 128, 2048), (384, 2048, 128), (48, 768, 768), (8, 4096, 4096)]
    peak = peak_flops(torch.cuda.get_device_name()) if CUDA else None
    for batch, m, n in [(2, 64, 128), (2, 128, 64)] if lab.dry else shapes:
        if lab.left < 4:
            lab.say("stopped", reason="no time")
            return
        d = torch.randn(batch, m, n, device=DEVICE, dtype=torch.float16)
        norms = torch.linalg.matrix_norm(d.float())
        x = d / norms[:, None, None]
        x = (x.mT if m > n else x).half()
        squares = torch.empty_like(norms)

        def ours(d: torch.Tensor = d, norms: torch.Tensor = norms, squares: torch.Tensor = squares) -> None:
            # results are as good a start as noise: their norm is that of many singular values near 1
            orthogonalize_(d, 1 / norms, 5, squares)

        def standard(x: torch.Tensor = x) -> torch.Tensor:
            return _standard_form(x, 5, product)

        def before(x: torch.Tensor = x.bfloat16()) -> torch.Tensor:  # noqa: B008
            return _standard_form(x, 5, products_for(x) or product)

        fastest = milliseconds(ours, seconds=0.1)
        theirs = milliseconds(standard, seconds=0.1)
        flops = batch * newton_schulz_flops(m, n, 5)
        record = {"torch_ms": whole(theirs["ms"]), "ratio": whole(fastest["ms"] / theirs["ms"])}
        record["bfloat16_standard_ms"] = whole(milliseconds(before, seconds=0.1)["ms"])
        record["tflops"] = whole(flops / fastest["ms"] / 1e9)
        if takes_one_program(d, 5):
            record["in_batches_ms"] = whole(
                milliseconds(lambda x=x: in_best_form(x, 5, products_for(x) or product), seconds=0.1)["ms"]
            )
        predicted = 1e3 * flops / peak if peak else None
        lab.say(f"{batch} x [{m}, {n}]", value=whole(fastest["ms"]), unit="ms", predicted=predicted, **record)
        del d, x
        free()
    # from which size on half of a product is worth a kernel of our own: `SYMMETRIC_FROM`
    for m in (64,) if lab.dry else (128, 256, 512, 768, 1024, 2048, 4096):
        if lab.left < 3:
            lab.say("stopped", reason="no time")
            return
        batch = max(1, (8 * 2048**2) // m**2)
        r = torch.randn(batch, m, m, device=DEVICE, dtype=torch.float16) / m
        if CUDA:
            kernel = milliseconds(lambda r=r: symmetric_product(r, r), seconds=0.05)["ms"]
        else:
            kernel = milliseconds(lambda r=r: product(r, r), seconds=0.05)["ms"]
        bmm = milliseconds(lambda r=r: torch.bmm(r, r), seconds=0.05)["ms"]
        lab.say(
            f"symmetric product, {batch} x [{m}, {m}]",
            value=whole(kernel),
            unit="ms",
            bmm_ms=whole(bmm),
            ratio=whole(kernel / bmm),
        )
        del r
        free()


def first_step(lab: Lab) -> None:
    """Seconds until a first step is done, with an empty cache of compiled kernels and then with it full."""
    from celo2.compilation import MOST_THREADS

    for opt in ("celo2", "celo2-base"):
        with tempfile.TemporaryDirectory() as cache:
            for state in ("empty", "full"):
                if lab.left < 10:
                    lab.say("stopped", reason="no time")
                    return
                program = str(Path(__file__).with_name("gpu_sections.py"))
                command = [sys.executable, program, "one_step", "--out", str(lab.out), "--seconds", str(lab.left)]
                environment = {
                    **os.environ,
                    "TRITON_CACHE_DIR": cache,
                    "CELO2_CHECK_OPT": opt,
                    "CELO2_CHECK_CACHE": state,
                }
                command += ["--dry"] if lab.dry else []
                subprocess.run(command, env=environment, timeout=lab.left, check=True)
    lab.say("threads that compile", value=min(MOST_THREADS, len(os.sched_getaffinity(0))))


def one_step(lab: Lab) -> None:
    """The child of `first_step`."""
    opt, state, size = os.environ["CELO2_CHECK_OPT"], os.environ["CELO2_CHECK_CACHE"], lab.sizes[0]
    step = step_of(opt, size, model_of(size))
    sync()
    start = time.perf_counter()
    step()
    sync()
    lab.section = "first_step"
    lab.say(f"{size}, {opt}, {state} cache", value=whole(time.perf_counter() - start), unit="s")


def sweep(lab: Lab) -> None:
    """Tiles and warps of the kernels that go over elements: the time of each, for a table of this architecture."""
    from celo2.blocks import Blocks
    from celo2.kernels.report import PHASES

    size, names = lab.sizes[0], {field.name for field in dataclasses.fields(Blocks)}
    choose = Blocks.choose
    variants: list[dict[str, int]] = [
        {},
        {"warps": 8, "step_rows": 8},
        {"warps": 8},
        {"step_rows": 2},
        {"step_rows": 8},
        {"rows": 32},
        {"rows": 128},
        {"rows": 128, "warps": 8, "step_rows": 8},
        {"apply_rows": 16},
        {"apply_rows": 32},
    ]
    for variant in variants[: 2 if lab.dry else None]:
        if lab.left < 10:
            lab.say("stopped", reason="no time", next=str(variant))
            break
        assert set(variant) <= names

        def one(variant: dict[str, int] = variant) -> None:
            def chosen(cls: type[Blocks], columns: int, device: torch.device) -> Blocks:
                blocks = choose(columns, device)
                changed = dict(variant)
                if "step_rows" in changed:
                    # narrow tiles have as many elements a step
                    changed["step_rows"] *= 128 // blocks.columns
                if "rows" in changed:
                    changed["rows"] = min(changed["rows"], blocks.columns)
                return dataclasses.replace(blocks, **changed)

            Blocks.choose = classmethod(chosen)  # type: ignore[assignment, method-assign]
            model = model_of(size)
            times = kernel_microseconds(step_of("celo2-base", size, model))
            kernels = {name: whole(times[name][0]) for name in PHASES if name in times}
            lab.say(f"{variant or 'as it is'}", blocks=variant, kernels=kernels)

        try:
            tried(lab, str(variant), one)
        finally:
            Blocks.choose = choose  # type: ignore[method-assign]
        free()


def step_for_counters(lab: Lab) -> None:
    """A step of GPT-2 124M and two symmetric products, after a warm-up, for ncu: it counts between start and stop."""
    from celo2.batched_newton_schulz import products_for
    from celo2.newton_schulz import orthogonalize

    step = step_of("celo2-base", lab.sizes[0], model_of(lab.sizes[0]))
    x = torch.full((12, 768, 3072) if CUDA else (1, 64, 64), 1e-3, device=DEVICE, dtype=torch.float16)
    for _ in range(2):
        step()
        orthogonalize(x, 1, products_for(x))
    sync()
    if CUDA:
        torch.cuda.profiler.start()
    step()
    orthogonalize(x, 1, products_for(x))
    sync()
    if CUDA:
        torch.cuda.profiler.stop()
