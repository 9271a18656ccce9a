"""What `pytest bench/` prints at the end: the machine, and the lines that the benchmarks report."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from celo2 import Theta
from celo2.theta import GROUP_COLUMNS

_REPORT = pytest.StashKey[list[str]]()


def _cpu_name() -> str:
    """Return the model name of the first CPU on Linux, elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _machine() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {_cpu_name()} ({capability})"


@pytest.fixture
def theta() -> Theta:
    """A theta in which every column and every unit counts, unlike in the closed forms."""
    rng = np.random.default_rng(0)
    shapes = {f"w0__{i}": (columns, 8) for i, columns in enumerate(GROUP_COLUMNS)}
    shapes |= {"b0": (8,), "w1": (8, 8), "b1": (8,), "w2": (8, 3), "b2": (3,)}
    return Theta.from_arrays({name: 0.4 * rng.standard_normal(shape) for name, shape in shapes.items()})


@pytest.fixture
def report(pytestconfig: pytest.Config) -> list[str]:
    """Lines to print in the terminal summary, also under -q."""
    return pytestconfig.stash.setdefault(_REPORT, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(_REPORT, [])
    if lines:
        terminalreporter.section("benchmarks")
        for line in [_machine(), *lines]:
            terminalreporter.write_line(line)
