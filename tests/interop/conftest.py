"""The real trainers: their versions in the header, and their programs run once a session."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CLIENTS = ("torch", "transformers", "accelerate", "lightning", "timm", "peft", "torchtitan")


def pytest_report_header() -> list[str]:
    """Name the versions that were tested."""
    return [f"{name} {importlib.metadata.version(name)}" for name in CLIENTS]


def run_ranks(program: Path, ranks: int, *arguments: object, **environment: str) -> Any:
    """Run a program on some processes that meet through torchrun; what rank 0 prints last, as JSON."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(program), *map(str, arguments)]
    variables = {**os.environ, **environment}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=variables, check=False)
    if result.returncode:
        pytest.fail(f"{ranks} ranks: {result.stderr[-4000:]}", pytrace=False)
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def run_client(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Any]:
    """Run a program of this folder on some processes; what rank 0 reports, kept for the tests that ask again."""
    reports: dict[tuple[str, int], Any] = {}

    def run(program: str, ranks: int) -> Any:
        key = (program, ranks)
        if key not in reports:
            folder = tmp_path_factory.mktemp(program)
            # accelerate and the Trainer would look for a network, Lightning for a cluster
            environment = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"}
            reports[key] = run_ranks(Path(__file__).with_name(f"{program}.py"), ranks, folder, **environment)
        return reports[key]

    return run
