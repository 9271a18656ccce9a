"""Choosing a theta as a process: what cannot be chosen from is refused in a line, and so is a missing compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from celo2.theta import Theta


def select(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "celo2.meta.select", *map(str, arguments)]
    variables = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=variables)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--no-compile",), "run has no theta-*.safetensors, which celo2.meta.train writes at --save-every"),
        ((), "no C++ compiler is here ('/no/compiler'), which torch.compile needs: install one, or give --no-compile"),
    ],
)
def test_refusals_are_one_line(tmp_path: Path, random_theta, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "run").mkdir()
    Theta.from_arrays(random_theta().arrays, {"variant": "celo2"}).save(tmp_path / "run" / "theta.safetensors")
    result = select(tmp_path, "run", *arguments, CXX="/no/compiler")
    assert result.returncode == 2 and result.stderr == f"error: {message}\n"
    # before anything is written
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_steps_must_be_positive(tmp_path: Path) -> None:
    result = select(tmp_path, "run", "--train-steps", "0")
    assert result.returncode == 2 and result.stderr.endswith("argument --train-steps: 0: must be at least 1\n")
