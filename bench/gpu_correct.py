"""Sections of `gpu_check.py` that say whether the kernels are right on this device, before any of them is timed."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import gpu_page
import numpy as np
import torch
from gpu_lab import CUDA, DEVICE, Lab, backend, gpu, largest, milliseconds, rms, whole
from torch import nn

from celo2 import FusedCelo2, Theta, load_weights
from celo2.pretrain.device import peak_flops
from celo2.reference import MatrixState, VectorState, matrix_update, vector_update

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"


def environment(lab: Lab) -> None:
    """Versions, tools and settings; copy bandwidth and the rate of a matrix product."""
    from celo2.backends.parts import interpreter_fault

    names = ("TF32", "TRITON", "CUDA_", "NCCL", "PYTORCH_")
    lab.say(
        "versions",
        **gpu_page.versions(),
        device=torch.cuda.get_device_name() if CUDA else f"CPU, {platform.machine()}",
        cores=len(os.sched_getaffinity(0)),
        tf32=torch.backends.cuda.matmul.allow_tf32,
        settings={key: value for key, value in os.environ.items() if any(name in key for name in names)},
        tools={name: shutil.which(name) is not None for name in ("nvcc", "ncu", "compute-sanitizer", "git")},
        interpreter=interpreter_fault() or "runs",
        backend=backend(),
    )
    if shutil.which("nvidia-smi") and CUDA:
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,memory.total"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)
        lab.say("driver", query=query, found=(found.stdout or found.stderr).strip()[:300])
    size = 1 << (30 if CUDA else 24)
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    rate = 2 * size / milliseconds(lambda: target.copy_(source))["ms"] / 1e9
    sheet = gpu()
    lab.say("copy", value=whole(rate), unit="TB/s", predicted=sheet and sheet.bandwidth / 1e12)
    side = 8192 if CUDA else 256
    a = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    rate = 2 * side**3 / milliseconds(lambda: a @ a)["ms"] / 1e9
    peak = peak_flops(torch.cuda.get_device_name()) if CUDA else None
    lab.say("bfloat16 matrix product", value=whole(rate), unit="TFLOP/s", predicted=peak and peak / 1e12)


class Oracle:
    """The rule in float64 on the host, for one parameter."""

    def __init__(self, theta: Theta, p: torch.Tensor, orthogonalize: bool) -> None:
        self.theta, self.orthogonalize = theta.tensors(torch.float64, torch.device("cpu")), orthogonalize
        wide = p.detach().cpu().double()
        self.state = VectorState.zeros_like(wide) if p.ndim < 2 else MatrixState.zeros_like(wide)

    def update(self, p: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        p, g = p.detach().cpu().double(), g.detach().cpu().double()
        if p.ndim < 2:
            u, self.state = vector_update(self.theta, p, g, self.state)
        else:
            u, self.state = matrix_update(self.theta, p, g, self.state, orthogonalize=self.orthogonalize)
        return u


def _parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(DEVICE, dtype)) for shape in shapes]


def _set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (1e-3 * torch.randn(p.shape, generator=generator)).to(DEVICE, p.dtype)


def _optimizer(params: list[nn.Parameter], **options: object) -> FusedCelo2:
    # at a learning rate of 1 a step writes p - u
    return FusedCelo2([{"params": params, "rule": "celo2"}], **{"lr": 1.0, "backend": backend(), **options})


def golden(lab: Lab) -> None:
    """The authors' updates, both variants, in float32."""
    files = ("normal_gradients", "tiny_gradients", "huge_gradients_clipped", "zero_gradients_every_third_step")
    # the interpreter takes ten seconds for one
    for file in files[:1] if lab.dry and backend() == "triton" else files:
        with np.load(GOLDEN / f"{file}.npz") as arrays:
            data = dict(arrays)
        theta = Theta.from_arrays({k.removeprefix("theta/"): v for k, v in data.items() if k.startswith("theta/")})
        for variant, limit in (("celo2_base", 1e-5), ("celo2", 3e-5)):
            prefix = f"{variant}/update/"
            names = [key.removeprefix(prefix) for key in data if key.startswith(prefix)]
            params = [nn.Parameter(torch.tensor(data[f"param/{name}"], device=DEVICE)) for name in names]
            optimizer = _optimizer(params, weights=theta, orthogonalize=variant == "celo2", ns_dtype="float32")
            worst = 0.0
            for step in range(len(data[f"grad/{names[0]}"])):
                for name, p in zip(names, params, strict=True):
                    p.grad = torch.tensor(data[f"grad/{name}"][step], device=DEVICE)
                before = [p.detach().clone() for p in params]
                optimizer.step()
                for name, p, old in zip(names, params, before, strict=True):
                    update = (old - p.detach()).cpu()
                    worst = largest(worst, float((update - torch.tensor(data[prefix + name][step])).abs().max()))
                    p.data.copy_(torch.tensor(data[f"{variant}/param/{name}"][step]))
            lab.check(f"golden {file}, {variant}: largest error", worst, limit)


def oracle(lab: Lab) -> None:
    """Updates against float64, by the precision of parameters, state and Newton-Schulz."""
    theta = load_weights("celo2")
    shapes: list[tuple[int, ...]] = [(64, 128), (70, 130)]
    if not lab.dry:
        # large enough for symmetric products; the oracle takes seconds for a million elements
        shapes += [(640, 1152), (1152, 640), (768, 64)]
    float32, bfloat16 = torch.float32, torch.bfloat16
    cases = [
        # limits on the RMS of the error, of an update with an RMS of 1
        ("float32", float32, {"orthogonalize": False}, 1e-5),
        ("Newton-Schulz in float32", float32, {"orthogonalize": True, "ns_dtype": "float32"}, 1e-4),
        ("Newton-Schulz in float16, the default", float32, {"orthogonalize": True, "ns_dtype": "auto"}, 1e-2),
        ("bfloat16 state", float32, {"orthogonalize": False, "state_dtype": "bfloat16"}, 2e-2),
        ("8-bit state", float32, {"orthogonalize": False, "state_dtype": "int8"}, 2e-1),
    ]
    if backend() == "torch":
        cases = [case for case in cases if case[2].get("state_dtype") != "int8"]
    for name, dtype, options, limit in cases:
        params = _parameters(shapes, dtype)
        oracles = [Oracle(theta, p, bool(options["orthogonalize"])) for p in params]
        optimizer = _optimizer(params, weights=theta, **options)
        worst = worst_element = 0.0
        for step in range(2):
            _set_gradients(params, step)
            before = [p.detach().clone() for p in params]
            optimizer.step()
            for p, old, exact in zip(params, before, oracles, strict=True):
                error = (old.double() - p.detach().double()).cpu() - exact.update(old, p.grad)
                worst, worst_element = largest(worst, rms(error)), largest(worst_element, float(error.abs().max()))
        lab.check(f"oracle, {name}: RMS error", worst, limit)
        if name == "float32":
            lab.check("oracle, float32: largest error", worst_element, 2e-5)
    # bfloat16 parameters are rounded to one of two neighbours of what the float32 rule gives
    params = _parameters(shapes, bfloat16)
    oracles = [Oracle(theta, p, False) for p in params]
    optimizer = _optimizer(params, weights=theta, orthogonalize=False, lr=1e-3)
    _set_gradients(params, 0)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    worst = 0.0
    for p, old, exact in zip(params, before, oracles, strict=True):
        target = old.cpu().double() - 1e-3 * exact.update(old, p.grad)
        error = (p.detach().cpu().double() - target).abs() / target.abs().clamp_min(1e-4)
        worst = largest(worst, float(error.max()))
    lab.check("oracle, bfloat16 parameters: largest error in units of the value", worst, 2.0**-7 * 1.01)


def _snapshot(optimizer: FusedCelo2) -> list[torch.Tensor]:
    return [
        value.detach().clone()
        for group in optimizer.param_groups
        for p in group["params"]
        for value in (p, *optimizer.state[p].values())
    ]


def _equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def repeats(lab: Lab) -> None:
    """Two runs agree to the bit; a gradient that is not finite changes no byte; a captured step is the eager one."""
    shapes: list[tuple[int, ...]] = [(96, 128), (70, 130), (64, 256), (9,)]
    if not lab.dry:
        shapes += [(768, 768)] * 3 + [(768, 64)] * 2
    runs = []
    for captured in (False, False, True) if CUDA else (False, False):
        params = _parameters(shapes)
        optimizer = _optimizer(params, lr=torch.tensor(1e-2, device=DEVICE), orthogonalize=True)
        for p in params:
            p.grad = torch.zeros_like(p)
        graph = torch.cuda.CUDAGraph() if captured else None
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            for p in params:
                p.grad.copy_(1e-3 * torch.randn(p.shape, generator=generator))
            if graph is not None and step == 2:
                with torch.cuda.graph(graph):
                    optimizer.step()
            if graph is not None and step >= 2:
                graph.replay()
            else:
                optimizer.step()
        runs.append(_snapshot(optimizer))
    lab.say("two runs are equal to the bit", passed=_equal(runs[0], runs[1]))
    params[0].grad.view(-1)[-1] = float("nan")
    before = _snapshot(optimizer)
    optimizer.step()
    same = _equal(before, _snapshot(optimizer))
    lab.say("a gradient that is not finite changes no byte", passed=same and optimizer.skipped_steps == 1)
    if CUDA:
        # the poisoned step above was made by the run that was captured, after its last replay
        lab.say("a captured step is the eager one to the bit", passed=_equal(runs[0], runs[2]))


def sharded(lab: Lab) -> None:
    """FSDP2 on one rank: the losses of the sharded kernels are those of the whole ones."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from celo2.pretrain.model import GPT, model_config
    from celo2.pretrain.optimizers import Optimizers
    from celo2.pretrain.recipes import recipe_for

    with socket.socket() as server:
        try:
            server.bind(("127.0.0.1", 0))
            server.listen()
            socket.create_connection(server.getsockname(), timeout=2).close()
        except OSError as error:
            lab.say("sharded kernels", reason=f"left out, processes cannot meet here: {error}")
            return
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("nccl" if CUDA else "gloo", store=store, rank=0, world_size=1)
        mesh = init_device_mesh(DEVICE.type, (1,))
        tokens = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(0)).to(DEVICE)
        for opt in ("celo2", "celo2-base"):
            runs = []
            for is_sharded in (False, True):
                model = GPT(model_config("nano")).to(DEVICE)
                model.init_weights(0)
                if is_sharded:
                    for block in model.blocks:
                        fully_shard(block, mesh=mesh)
                    fully_shard(model, mesh=mesh)
                optimizers = Optimizers(opt, recipe_for("nano", opt), model)
                optimizers.set_lr(0.3)
                losses = []
                for _ in range(4):
                    loss = model(tokens[:, :-1], tokens[:, 1:])
                    optimizers.zero_grad()
                    loss.backward()
                    optimizers.step()
                    losses.append(float(loss.detach()))
                runs.append(losses)
            plan = optimizers.members[0].planner.kernels
            kernels = plan is not None and plan.backend is not None and bool(plan.backend.shards)
            difference = largest(*(abs(a - b) for a, b in zip(*runs, strict=True)))
            lab.check(f"sharded {opt} on one rank: largest difference of a loss", difference, 2e-3, kernels=kernels)
            if CUDA:
                lab.say(f"sharded {opt} goes through the kernels", passed=kernels)
        dist.destroy_process_group()


def correct(lab: Lab) -> None:
    """All of them at once, each in a process of its own: a fault of the device in one leaves the others alone."""
    parts = {}
    for part in (golden, oracle, repeats, sharded):
        program = [sys.executable, str(ROOT / "bench" / "gpu_sections.py"), part.__name__, "--section", lab.section]
        program += ["--out", str(lab.out), "--seconds", f"{lab.left:.1f}", *(["--dry"] if lab.dry else [])]
        parts[part.__name__] = subprocess.Popen(program, stdin=subprocess.DEVNULL)
    for name, process in parts.items():
        try:
            status = process.wait(max(0.0, lab.left - 1))
        except subprocess.TimeoutExpired:
            process.kill()
            lab.say(name, passed=False, error="it took too long")
            continue
        if status:
            lab.say(name, passed=False, error=f"it ended with status {status}; its last lines are in log.txt")


def small_step(lab: Lab) -> None:
    """A few small steps of every kind, for compute-sanitizer."""
    lab.section = "sanitizer"
    for options in (
        {"orthogonalize": False},
        {"orthogonalize": True, "state_dtype": "bfloat16"},
        {"orthogonalize": False, "state_dtype": "int8"},
    ):
        if backend() == "torch" and options.get("state_dtype") == "int8":
            continue
        params = _parameters([(192, 256), (70, 130), (128, 64), (33,)])
        optimizer = _optimizer(params, lr=1e-3, **options)
        for step in range(2):
            _set_gradients(params, step)
            optimizer.step()
        finite = all(bool(p.isfinite().all()) for p in params)
        lab.say(f"small steps, {options}", passed=finite)
