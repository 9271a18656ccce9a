"""Time to find out that a plan of the kernels still holds, for 288 parameters: the look of every step, and in full.

Nothing here asserts on time; `--benchmark-json PATH` keeps the numbers (in `extra_info`).
"""

from __future__ import annotations

import statistics
import time

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from celo2 import FusedCelo2
from celo2.kernel_plans import Signature, Watch
from celo2.tables import format_table

PARAMETERS = 288
ROUNDS = 200


def test_plan_lookup(benchmark: BenchmarkFixture, report: list[str]) -> None:
    params = [torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(PARAMETERS)]
    for p in params:
        p.grad = torch.zeros_like(p)
    groups = [{"params": params[::2], "rule": "celo2"}, {"params": params[1::2], "rule": "celo2"}]
    optimizer = FusedCelo2(groups, weights="momentum")
    optimizer.planner.follow_groups()
    watch = Watch(optimizer.param_groups, optimizer.state)
    assert watch.unchanged()
    times: dict[str, list[float]] = {"look": [], "signature": []}

    def both() -> None:
        start = time.perf_counter()
        watch.unchanged()
        middle = time.perf_counter()
        Signature.of(optimizer.param_groups, optimizer.state, zero1=False)
        times["look"].append(middle - start)
        times["signature"].append(time.perf_counter() - middle)

    benchmark.pedantic(both, rounds=ROUNDS, warmup_rounds=5)
    rows = []
    for name, found in times.items():
        median = 1e6 * statistics.median(found)
        benchmark.extra_info[name] = median
        rows.append((name, f"{median:.0f}"))
    report.append(f"a plan of the kernels for {PARAMETERS} parameters, median of {ROUNDS} rounds")
    report.append(format_table(("how it is found to hold", "us"), rows))
