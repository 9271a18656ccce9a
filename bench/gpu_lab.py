"""What the sections of `gpu_check.py` share: records, clocks, models to step, and what is predicted of them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_page
import numpy as np
import torch

from celo2 import FusedCelo2, param_groups
from celo2.kernels.roofline import ADAMW_BYTES, DTYPES, GPUS, INSTRUCTIONS, Dtypes, Gpu, phase_bytes, roofline
from celo2.newton_schulz import newton_schulz_flops
from celo2.pretrain.device import peak_flops
from celo2.pretrain.model import GPT, model_config
from celo2.pretrain.optimizers import Optimizers
from celo2.pretrain.recipes import recipe_for

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# the element types that are moved, by state dtype: float32 parameters, gradients and directions
MOVED = {"float32": DTYPES["float32"], "bfloat16": DTYPES["bfloat16-state-wide"]}
MOVED["int8"] = Dtypes("fp32", "fp32", "i8", "bf16", "fp32")


def sync() -> None:
    if CUDA:
        torch.cuda.synchronize()


@dataclass
class Lab:
    """One section at work: where its records go, how long it has, and at which sizes it works."""

    section: str
    out: Path
    seconds: float
    dry: bool

    def __post_init__(self) -> None:
        self._start = time.monotonic()
        self.sizes = ("nano",) if self.dry else ("small", "xl")

    @property
    def left(self) -> float:
        """Seconds until this section is stopped."""
        return self.seconds - (time.monotonic() - self._start)

    def say(self, what: str, **values: Any) -> None:
        """Append a record, on the disk before this returns, and print it."""
        line = gpu_page.append(self.out, {"section": self.section, "what": what, **values})
        try:
            print(line[:400], flush=True)
        except BrokenPipeError:
            # the run was killed: leave the device
            os._exit(1)

    def check(self, what: str, value: float, limit: float, **values: Any) -> None:
        """Record whether `value` is at most `limit`; a NaN is not."""
        self.say(what, value=value, limit=limit, passed=bool(value <= limit), **values)


def backend() -> str:
    """Return what the learned rule is stepped by: the kernels wherever these versions run them."""
    from celo2.backends.parts import interpreted, interpreter_fault

    return "triton" if CUDA or (interpreted() and interpreter_fault() is None) else "torch"


# clocks


def seconds_of(step: Callable[[], Any], count: int) -> float:
    """Wall time of a call, of a run of them that ends when the device has done all."""
    sync()
    start = time.perf_counter()
    for _ in range(count):
        step()
    sync()
    return (time.perf_counter() - start) / count


def milliseconds(
    step: Callable[[], Any],
    *,
    beside: Callable[[], Any] | None = None,
    rounds: int = 3,
    seconds: float = 0.3,
    warm: int = 2,
) -> dict[str, float]:
    """Time of a call as a training loop makes it, one after another, and of the host alone, medians in milliseconds.

    The first is wall time of a run of calls that ends when the device has done all; the second is until one call
    returns, with nothing queued before it. With a call `beside` it every round times both, a moment apart, and `ratio`
    is the median of the rounds' ratios.
    """
    calls = [step] if beside is None else [step, beside]
    for _ in range(warm):
        for call in calls:
            call()
    counts = [max(3, min(50, int(seconds / (seconds_of(call, 1) + 1e-9)))) for call in calls]
    if not CUDA:
        counts, rounds = [1] * len(calls), 1
    loops = [[seconds_of(call, count) for call, count in zip(calls, counts, strict=True)] for _ in range(rounds)]
    hosts = []
    for _ in range(2 * rounds):
        start = time.perf_counter()
        step()
        hosts.append(time.perf_counter() - start)
        sync()
    figures = {"ms": 1e3 * statistics.median(loop[0] for loop in loops), "host_ms": 1e3 * statistics.median(hosts)}
    if beside is not None:
        figures["ratio"] = statistics.median(mine / theirs for mine, theirs in loops)
    return figures


def graph_milliseconds(step: Callable[[], Any]) -> float:
    """Time of a replayed CUDA graph of a call: the device alone. Raises what capture raises."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    sync()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return milliseconds(graph.replay)["ms"]


def kernel_microseconds(step: Callable[[], Any], rounds: int = 3) -> dict[str, tuple[float, int]]:
    """Time on the device of every kernel of a call, in microseconds, and how often it is launched."""
    from torch.profiler import ProfilerActivity, profile

    step()
    sync()
    with profile(activities=[ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]) as found:
        for _ in range(rounds):
            step()
        sync()
    times = {}
    for event in found.key_averages():
        total = event.self_device_time_total if CUDA else event.self_cpu_time_total
        # the optimizer's own mark spans all of its kernels
        if total > 0 and not event.key.startswith("Optimizer."):
            times[event.key] = (total / rounds, event.count // rounds)
    return dict(sorted(times.items(), key=lambda item: -item[1][0]))


# models and optimizers as the harness makes them


def model_of(size: str) -> GPT:
    """Return a model of the harness with weights and gradients that look like a training's; no forward pass is made."""
    torch.manual_seed(0)
    with DEVICE:
        model = GPT(model_config(size))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02)
            p.grad = 1e-4 * torch.randn_like(p)
    return model


def step_of(name: str, size: str, model: GPT, *, capturable: bool = False) -> Callable[[], Any]:
    """Return a step on the harness's groups: "celo2", "celo2-base, int8 state", "muon", "adamw", "adamw, harness".

    AdamW and Muon are PyTorch's own and alone: neither clips, and nothing is read on the host.
    """
    opt, _, option = name.partition(", ")
    if option == "harness":
        return Optimizers(opt, recipe_for(size, opt), model).step
    if opt == "adamw":
        return torch.optim.AdamW(model.parameters(), 1e-4, fused=True, capturable=capturable).step
    groups = param_groups(model, variant="celo2" if opt == "muon" else opt, views=model.matrix_views())
    if opt == "muon":
        hidden = [p for group in groups if group["rule"] == "celo2" for _, p in group["params"]]
        rest = [p for group in groups if group["rule"] != "celo2" for _, p in group["params"]]
        members = torch.optim.Muon(hidden, 1e-4), torch.optim.AdamW(rest, 1e-4, fused=True, capturable=capturable)
        return lambda: [member.step() for member in members]
    options: dict[str, Any] = {"backend": "torch"} if option == "PyTorch" else {}
    if option.endswith("state"):
        options = {"state_dtype": option.split()[0]}
    return FusedCelo2(groups, 1e-4, weights=opt, orthogonalize=None if opt == "celo2" else False, **options).step


# predictions


def gpu() -> Gpu | None:
    """Return the data sheet of this GPU, None when there is none."""
    name = torch.cuda.get_device_name() if CUDA else ""
    return next((gpu for gpu in GPUS if gpu.name.split()[0] in name), None)


@dataclass
class Work:
    """What a step has to do: parameters of the learned rule, of AdamW, and operations of Newton-Schulz."""

    learned: int
    adamw: int
    flops: int

    @classmethod
    def of(cls, name: str, model: GPT) -> Work:
        """Count it for a step of `step_of`."""
        opt = name.partition(", ")[0]
        everything = sum(p.numel() for p in model.parameters())
        if opt == "adamw":
            return cls(0, everything, 0)
        if opt == "celo2-base":
            return cls(everything, 0, 0)
        views, flops, learned = model.matrix_views(), 0, 0
        for group in param_groups(model, views=views):
            for parameter_name, p in group["params"] if group["rule"] == "celo2" else ():
                matrices = p[None]
                if opt == "celo2" and parameter_name in views:
                    matrices = views[parameter_name].matrices(p)
                batch, m, n = matrices.shape
                flops += batch * newton_schulz_flops(m, n, 5)
                learned += p.numel()
        return cls(learned, everything - learned, flops)

    def moved(self, name: str) -> float | None:
        """Bytes that a step must move, Newton-Schulz left out; None where the implementation decides."""
        opt, _, option = name.partition(", ")
        if opt == "muon" or (option and not option.endswith("state")):
            return None
        return self.learned * sum(phase_bytes(k, dtypes_of(name)) for k in range(1, 5)) + self.adamw * ADAMW_BYTES

    def predicted_ms(self, name: str) -> float | None:
        """Milliseconds by the roofline model, Newton-Schulz by its operations; None where there is no model."""
        here = gpu()
        if here is None or self.moved(name) is None:
            return None
        peak = peak_flops(torch.cuda.get_device_name()) or float("inf")
        rule = sum(roofline(here, INSTRUCTIONS[here.target], dtypes_of(name)).values())
        return 1e3 * (self.learned * rule + self.adamw * ADAMW_BYTES / here.bandwidth + self.flops / peak)


def dtypes_of(name: str) -> Dtypes:
    """Return what a step of this optimizer moves."""
    opt, _, option = name.partition(", ")
    moved = MOVED[option.split()[0]] if option.endswith("state") else MOVED["float32"]
    return moved._replace(d="bf16") if opt == "celo2" else moved


def largest(*values: float) -> float:
    """Return the largest value; a NaN when one is, which `max` would pass over."""
    return float(np.max(values))


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def whole(value: float) -> float:
    """Round for a record, to four digits."""
    return float(f"{value:.4g}") if np.isfinite(value) else value
