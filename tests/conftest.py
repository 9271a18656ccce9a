"""Shared fixtures: golden files and random thetas."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
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
from scenarios.interpreter import patch_once
from scenarios.pool import RankFailure, RankPool

# the tests' processes get hangups and Ctrl-C also where nohup or a shell's background started the tests
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

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
    kernels = [item for item in items if item.get_closest_marker("kernels")]
    if kernels and not torch.cuda.is_available():
        patch_once()
        reason = no_interpreter()
        for item in kernels if reason is not None else ():
            item.add_marker(pytest.mark.skip(reason=reason))


def no_interpreter() -> str | None:
    """Why kernels cannot be interpreted here."""
    # a checkout that is not laid out as it installs has no kernels
    if not all(importlib.util.find_spec(name) for name in ("triton", "celo2.kernels")):
        return "needs triton, and celo2 installed"
    from celo2.backends.parts import interpreter_fault

    return interpreter_fault()


@pytest.fixture(scope="session")
def interpreter() -> None:
    """For tests whose processes interpret kernels."""
    if (reason := no_interpreter()) is not None:
        pytest.skip(reason)


@pytest.fixture
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz") as file:
            return dict(file)

    return load


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Run a scenario on some processes, which stay for the next one: what it returns on rank 0."""
    pools: dict[int, RankPool] = {}

    def run(ranks: int, scenario: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if ranks not in pools or not pools[ranks].alive:
            pools[ranks] = RankPool(ranks, tmp_path_factory.mktemp("store") / "store")
        try:
            return pools[ranks].run(scenario, *arguments, **options)
        except RankFailure as failure:
            pytest.fail(str(failure), pytrace=False)

    yield run
    for pool in pools.values():
        pool.close()


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
