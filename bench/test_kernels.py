"""The kernels: on a GPU step times beside fused AdamW, Muon and PyTorch; elsewhere what the compiled code says.

On a GPU a round steps every optimizer once, timed by events, so that a ratio compares two measurements a moment apart.
Without one `python -m celo2.kernels.report` stands in: instructions, registers, bytes and a prediction.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from celo2 import FusedCelo2, Theta
from celo2.tables import format_table

HAS_GPU = torch.cuda.is_available()
# hidden matrices of one block, and how many blocks
MODELS = {
    "GPT-2 124M": (12, [(768, 768)] * 4 + [(3072, 768), (768, 3072)]),
    "GPT-3 XL": (24, [(2048, 2048)] * 4 + [(8192, 2048), (2048, 8192)]),
}
BASELINE = "AdamW(fused=True)"
ROUNDS = 20


def parameters(model: str) -> list[torch.nn.Parameter]:
    blocks, shapes = MODELS[model]
    params = [torch.nn.Parameter(0.02 * torch.randn(shape, device="cuda")) for _ in range(blocks) for shape in shapes]
    for p in params:
        p.grad = 1e-4 * torch.randn_like(p)
    return params


def kernels_are_correct(theta: Theta) -> None:
    """The gate: on the GPU two steps agree with PyTorch's, or nothing is timed."""
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        p = torch.nn.Parameter(0.02 * torch.randn(768, 3072, device="cuda"))
        optimizer = FusedCelo2([p], lr=1e-2, weights=theta, orthogonalize=False, backend=backend)
        for _ in range(2):
            p.grad = 1e-4 * torch.randn_like(p)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@pytest.mark.skipif(not HAS_GPU, reason="measures a GPU")
@pytest.mark.parametrize("model", MODELS)
def test_step_time_on_a_gpu(model: str, theta: Theta, benchmark: BenchmarkFixture, report: list[str]) -> None:
    from celo2.kernels.report import DTYPES, GPUS, phase_bytes

    kernels_are_correct(theta)
    options = {
        "FusedCelo2": lambda: FusedCelo2(parameters(model), lr=1e-4, weights=theta, orthogonalize=False),
        "FusedCelo2, bfloat16 state": lambda: FusedCelo2(
            parameters(model), lr=1e-4, weights=theta, orthogonalize=False, state_dtype="bfloat16"
        ),
        "FusedCelo2, Newton-Schulz": lambda: FusedCelo2(parameters(model), lr=1e-4, weights=theta, orthogonalize=True),
        "FusedCelo2, PyTorch": lambda: FusedCelo2(
            parameters(model), lr=1e-4, weights=theta, orthogonalize=False, backend="torch"
        ),
        "Muon": lambda: torch.optim.Muon(parameters(model), lr=1e-4),
        BASELINE: lambda: torch.optim.AdamW(parameters(model), lr=1e-4, fused=True),
    }
    # one at a time in memory: a round of each, again and again, would hold six copies of the model
    times: dict[str, list[float]] = {}
    size = sum(p.numel() for p in parameters(model))
    for name, make in options.items():
        pair = {name: make(), BASELINE: options[BASELINE]()}
        rounds: dict[str, list[float]] = {key: [] for key in pair}
        for index in range(ROUNDS + 3):
            for key, optimizer in pair.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                optimizer.step()
                end.record()
                torch.cuda.synchronize()
                if index >= 3:
                    rounds[key].append(start.elapsed_time(end))
        times[name] = rounds[name]
        times[f"{name} / baseline"] = [a / b for a, b in zip(rounds[name], rounds[BASELINE], strict=True)]
        del pair
        torch.cuda.empty_cache()
    benchmark.pedantic(lambda: None, rounds=1)
    gpu = next((gpu for gpu in GPUS if gpu.name.split()[0] in torch.cuda.get_device_name()), None)
    rows = []
    for name in options:
        median = statistics.median(times[name])
        ratio = statistics.median(times[f"{name} / baseline"])
        moved = {"FusedCelo2": "float32", "FusedCelo2, bfloat16 state": "bfloat16-state-wide"}.get(name)
        bandwidth = "-"
        if moved is not None:
            rate = sum(phase_bytes(phase, DTYPES[moved]) for phase in range(1, 5)) * size / median * 1e3
            bandwidth = f"{rate / 1e12:.2f} TB/s" + (f", {rate / gpu.bandwidth:.0%} of the data sheet" if gpu else "")
        benchmark.extra_info[name] = {"ms": median, "ratio_to_fused_adamw": ratio}
        rows.append((name, f"{median:.3f}", f"{median / size * 1e9:.1f}", f"{ratio:.2f}", bandwidth))
    report.append(f"{model}, {size / 1e6:.0f}M float32 parameters on {torch.cuda.get_device_name()}, {ROUNDS} rounds")
    header = ("optimizer", "ms a step", "ps a parameter", "times fused AdamW", "bandwidth")
    report.extend(format_table(header, rows).splitlines())


@pytest.mark.skipif(HAS_GPU, reason="a GPU measures instead of predicting")
def test_what_the_compiled_code_says(benchmark: BenchmarkFixture, report: list[str]) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "celo2.kernels.report", "--target", "sm_90"]

    def run() -> str:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    text = benchmark.pedantic(run, rounds=1)
    assert "phase 3" in text and "predicted for H100 SXM" in text
    report.extend(line for line in text.splitlines() if "phase" in line or "a step" in line or "B a parameter" in line)
    report.extend(line for line in text.splitlines() if "predicted" in line or "model" in line)
