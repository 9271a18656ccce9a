"""Shared fixtures: golden files and random thetas."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# tiny tensors: a second thread only waits. Set before torch is imported, and inherited by the processes of the tests
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch

# kernels are interpreted where no GPU runs them; read when they are imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from celo2 import Theta
from celo2.theta import GROUP_COLUMNS

# the tests' processes get hangups also where nohup started the tests
signal.signal(signal.SIGHUP, signal.SIG_DFL)

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here; of the tests on several processes, those on other than two are slow."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if item.get_closest_marker("dist") and parameters.get("ranks", 2) != 2:
            item.add_marker(pytest.mark.slow)
    for item in items:
        for marker in item.iter_markers("needs"):
            for package in marker.args:
                if importlib.util.find_spec(package) is None:
                    item.add_marker(pytest.mark.skip(reason=f"needs {package}"))
    kernels = [item for item in items if item.get_closest_marker("kernels") or "sharded_kernels" in item.nodeid]
    # a checkout that is not laid out as it installs has no kernels
    is_there = all(importlib.util.find_spec(name) for name in ("triton", "celo2.kernels"))
    if kernels and not torch.cuda.is_available() and is_there:
        from celo2.backends.parts import interpreter_fault

        fault = interpreter_fault()
        for item in kernels if fault is not None else ():
            item.add_marker(pytest.mark.skip(reason=fault))


@pytest.fixture
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz") as file:
            return dict(file)

    return load


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., Any]:
    """Run a program on some processes that meet through torchrun; what rank 0 prints last, as JSON."""

    def run(program: Path, ranks: int, *arguments: object, **environment: str) -> Any:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += [str(program), *map(str, arguments)]
        variables = {**os.environ, **environment}
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=variables, check=False)
        if result.returncode:
            pytest.fail(f"{ranks} ranks: {result.stderr[-4000:]}", pytrace=False)
        return json.loads(result.stdout.strip().splitlines()[-1])

    return run


class Reports(dict[int, Any]):
    """What a program found on some numbers of ranks, run when first asked for; on two before any other."""

    def __init__(self, run: Callable[[int], Any]) -> None:
        super().__init__()
        self._run = run

    def __missing__(self, ranks: int) -> Any:
        if ranks != 2:
            self[2]  # the others resume from its checkpoints
        self[ranks] = self._run(ranks)
        return self[ranks]


@pytest.fixture(scope="session")
def reports_of() -> type[Reports]:
    return Reports


@pytest.fixture
def golden_folder() -> Path:
    return GOLDEN


@pytest.fixture
def random_theta() -> Callable[..., Theta]:
    """A dense theta: every column and every unit counts, unlike in the closed forms."""

    def make(seed: int = 0, hidden: int = 8, hidden2: int = 8, card: dict[str, str] | None = None) -> Theta:
        rng = np.random.default_rng(seed)
        shapes = {f"w0__{i}": (rows, hidden) for i, rows in enumerate(GROUP_COLUMNS)}
        shapes |= {"b0": (hidden,), "w1": (hidden, hidden2), "b1": (hidden2,), "w2": (hidden2, 3), "b2": (3,)}
        return Theta.from_arrays({name: 0.4 * rng.standard_normal(shape) for name, shape in shapes.items()}, card)

    return make


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
