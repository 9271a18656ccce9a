"""Values of flags, with real processes where a bad one could end them: refused in one line that names the flag."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from celo2.pretrain.options import MAX_THREADS, parse_arguments

TRAIN, META = "celo2.pretrain.train_gpt", "celo2.meta.train"


def run(program: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=folder)


@pytest.mark.parametrize(
    ("program", "flag", "value", "message"),
    [
        (TRAIN, "--seed", str(2**64), "must be -9223372036854775808 to 18446744073709551615, which 64 bits hold"),
        (TRAIN, "--seed", "1e3", "must be a whole number"),
        (TRAIN, "--weights", "", "is empty; give a value, or leave the flag out for its default"),
        (TRAIN, "--out-dir", "", "is empty"),
        (TRAIN, "--data", "", "is empty"),
        (TRAIN, "--init-from", " ", "is empty"),
        (TRAIN, "--extend", "0", "must be at least 1"),
        (META, "--seed", str(2**64), "must be 0 to 18446744073709551615, which 64 bits hold"),
        (META, "--seed", "-1", "must be 0 to"),
        (META, "--threads", "1000000", f"must be 1 to {MAX_THREADS} on these {os.cpu_count()} cores"),
        (META, "--out-dir", "", "is empty"),
        (META, "--data", "", "is empty"),
        ("celo2.meta.select", "--threads", "1000000", "must be 1 to"),
        ("celo2.meta.evaluate", "--out", "", "is empty"),
        ("celo2.pretrain.prepare_data", "--out", "", "is empty"),
    ],
)
def test_a_bad_value_names_its_flag(program: str, flag: str, value: str, message: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(program).main([flag, value])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and f"error: argument {flag}: " in last and message in last


def test_a_million_threads_are_refused_and_do_not_end_the_process(tmp_path: Path) -> None:
    done = run(META, "--threads", "1000000", folder=tmp_path)
    assert done.returncode == 2 and "error: argument --threads: 1000000: must be 1 to" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_ends_of_the_range_are_seeds() -> None:
    for seed in (-(2**63), 2**64 - 1):
        assert parse_arguments(["--seed", str(seed)]).seed == seed


@pytest.mark.needs("matplotlib", "tqdm")
def test_the_ends_of_the_range_train(tmp_path: Path) -> None:
    options = ["--size", "nano", "--steps", "1", "--batch-tokens", "256", "--val-tokens", "256", "--opt", "adamw"]
    for seed in (-(2**63), 2**64 - 1):
        done = run(TRAIN, *options, "--seed", str(seed), "--out-dir", str(seed), folder=tmp_path)
        assert done.returncode == 0, done.stderr
