"""The mean of late thetas of several runs, as a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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


@pytest.fixture
def card() -> dict[str, str]:
    card = {"recipe": "celo2-lm", "variant": "celo2", "orthogonalize": "true", "data": "embedded", "seed": "0"}
    return card | {"outer_steps": "1000000", "inner_steps": "1000", "seconds": "60"}


def test_the_mean_of_the_last_thetas_of_two_runs(tmp_path, random_theta, card):
    # the last in number, not in the order of the names
    steps = (50, 999_950, 1_000_000)
    first = {step: random_theta(seed=step) for step in steps}
    second = {step: random_theta(seed=step + 1) for step in steps}
    runs = leave_run(tmp_path / "a", first, card), leave_run(tmp_path / "b", second, card | {"seed": "1"})
    out = tmp_path / "mean.safetensors"
    result = average(*runs, "--last", 2, "--out", out)
    assert result.returncode == 0, result.stderr
    mean = Theta.load(out)
    for name, array in mean.arrays.items():
        expected = np.mean([run[step].arrays[name] for run in (first, second) for step in steps[1:]], axis=0)
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-7)
    assert mean.card["seed"] == "0, 1" and mean.card["inner_steps"] == "2000" and mean.card["seconds"] == "120"
    assert mean.card["outer_steps"] == "mean of the thetas after 999950, 1000000 of 1000000"
    assert mean.orthogonalize


def test_bad_input_is_one_line(tmp_path, random_theta, card):
    good = leave_run(tmp_path / "good", {50: random_theta()}, card)
    other = leave_run(tmp_path / "other", {50: random_theta()}, card | {"recipe": "celo2-warm"})
    bare = leave_run(tmp_path / "bare", {50: random_theta()}, card)
    (bare / "theta-0000050.safetensors").unlink()
    out = tmp_path / "out.safetensors"
    for runs, message in (
        ([good, other], "the runs differ in recipe: celo2-lm, celo2-warm"),
        ([good, bare], "has no theta-*.safetensors"),
        ([tmp_path / "missing"], "missing"),
    ):
        result = average(*runs, "--out", out)
        assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr
        assert not out.exists()
