"""The mean of a run's late thetas, as a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from celo2.theta import Theta


def leave_run(folder: Path, thetas: dict[int, Theta], card: dict[str, str]) -> Path:
    """Write what a finished meta-training leaves of its thetas."""
    folder.mkdir()
    for step, theta in thetas.items():
        Theta.from_arrays(theta.arrays).save(folder / f"theta-{step:07d}.safetensors")
    last = thetas[max(thetas)]
    Theta.from_arrays(last.arrays, card).save(folder / "theta.safetensors")
    return folder


def average(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "celo2.meta.average", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


CARD = {"recipe": "celo2-lm", "variant": "celo2", "orthogonalize": "true", "outer_steps": "1000000", "seed": "3"}


def test_the_mean_of_the_last_thetas(tmp_path, random_theta):
    # the last in number, not in the order of the names
    thetas = {step: random_theta(seed=step) for step in (50, 999_950, 1_000_000)}
    run = leave_run(tmp_path / "run", thetas, CARD)
    result = average(run, "--last", 2)
    assert result.returncode == 0, result.stderr
    mean = Theta.load(run / "mean.safetensors")
    for name, array in mean.arrays.items():
        expected = (thetas[999_950].arrays[name] + thetas[1_000_000].arrays[name]) / 2
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6)
    assert mean.card["outer_steps"] == "1000000, mean of the thetas after 999950, 1000000"
    assert mean.card["seed"] == "3" and mean.orthogonalize


def test_bad_input_is_one_line(tmp_path, random_theta):
    bare = leave_run(tmp_path / "bare", {50: random_theta()}, CARD)
    (bare / "theta-0000050.safetensors").unlink()
    for run, message in ((bare, "has no theta-*.safetensors"), (tmp_path / "missing", "missing")):
        result = average(run, "--out", tmp_path / "out.safetensors")
        assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr
        assert not (tmp_path / "out.safetensors").exists()
