"""Step time of FusedCelo2 against fused AdamW on the CPU, in nanoseconds per parameter.

A round steps every optimizer once, so that a ratio compares two measurements a moment apart. Nothing here asserts on
time; `--benchmark-json PATH` keeps the numbers (in `extra_info`).
"""

from __future__ import annotations

import itertools
import statistics
import time

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.optim import AdamW, Optimizer

from celo2 import FusedCelo2, Theta
from celo2.reference import MatrixState, matrix_update
from celo2.tables import format_table

# one GPT-2 124M block: query, key, value and output projections, then the two of the MLP
SHAPES = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
ROUNDS = 11
TOLERANCE = 3e-5
BASELINE = "AdamW(fused=True)"


def parameters(shapes: list[tuple[int, int]]) -> list[torch.nn.Parameter]:
    """Return float32 matrices with gradients, of the sizes seen in training a language model."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = 1e-4 * torch.randn(p.shape)
    return params


@pytest.fixture
def celo2_is_correct(theta: Theta) -> None:
    """The gate: two steps of FusedCelo2 agree with the float64 oracle, or nothing is timed."""
    for orthogonalize, backend in itertools.product((False, True), ("torch", "compiled")):
        # several blocks, and wide: five float32 Newton-Schulz iterations on a square matrix are off by more than 3e-5
        (p,) = parameters([(96, 2304)])
        optimizer = FusedCelo2([p], lr=1.0, weights=theta, orthogonalize=orthogonalize, backend=backend)
        state = MatrixState.zeros_like(p.detach().double())
        for _ in range(2):
            before = p.detach().double()
            expected, state = matrix_update(
                theta.tensors(torch.float64, p.device), before, p.grad.double(), state, orthogonalize=orthogonalize
            )
            optimizer.step()
            torch.testing.assert_close(before - p.detach(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.usefixtures("celo2_is_correct")
def test_step_time(theta: Theta, benchmark: BenchmarkFixture, report: list[str]) -> None:
    optimizers: dict[str, Optimizer] = {
        **{
            f"FusedCelo2, {backend}{', Newton-Schulz' * orthogonalize}": FusedCelo2(
                parameters(SHAPES), lr=1e-4, weights=theta, orthogonalize=orthogonalize, backend=backend
            )
            for orthogonalize, backend in itertools.product((False, True), ("torch", "compiled"))
        },
        BASELINE: AdamW(parameters(SHAPES), lr=1e-4, fused=True),
    }
    size = sum(rows * columns for rows, columns in SHAPES)
    rounds: list[dict[str, float]] = []

    def step_each() -> None:
        times = {}
        for name, optimizer in optimizers.items():
            start = time.perf_counter_ns()
            optimizer.step()
            times[name] = (time.perf_counter_ns() - start) / size
        rounds.append(times)

    step_each()  # warm-up: scratch memory and threads are made in the first step
    rounds.clear()
    benchmark.pedantic(step_each, rounds=ROUNDS)

    rows: list[tuple[str, ...]] = []
    for name in optimizers:
        median = statistics.median(times[name] for times in rounds)
        ratio = statistics.median(times[name] / times[BASELINE] for times in rounds)
        fastest = min(times[name] for times in rounds)
        benchmark.extra_info[name] = {
            "ns_per_parameter": median,
            "fastest_ns_per_parameter": fastest,
            "ratio_to_fused_adamw": ratio,
        }
        rows.append((name, f"{median:.2f}", f"{fastest:.2f}", f"{ratio:.1f}"))
    report.append(f"{size / 1e6:.1f}M float32 parameters in {len(SHAPES)} matrices, median of {len(rounds)} rounds")
    report.extend(
        format_table(("optimizer", "ns per parameter", "fastest round", "times fused AdamW"), rows).splitlines()
    )
