"""Sweeps: grids, points as processes, records that last, and the comparisons of the report."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from celo2.pretrain.intervals import margin, mean, paired_difference
from celo2.pretrain.sweep_points import PROGRAM, Point, make_points, parse_grid
from celo2.pretrain.sweep_report import Findings, Metric, Run

PROGRAM_FILE = str(Path(__file__).with_name("sweep_program.py"))
SWEEP = [sys.executable, "-m", "celo2.pretrain.sweep"]


def run_sweep(out: Path, *arguments: str, program: tuple[str, ...] = (), timeout: float = 120) -> Any:
    command = [*SWEEP, "--out", str(out), *arguments, "--", PROGRAM_FILE, *program]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def records(out: Path) -> dict[str, Any]:
    found = [json.loads(path.read_text()) for path in out.glob("points/*/record.json")]
    return {" ".join(f"{key}={value}" for key, value in record["settings"].items()): record for record in found}


def test_grids_are_products() -> None:
    assert parse_grid("opt=celo2,muon lr=1e-5..1e-3:3 seed=0") == [
        {"opt": opt, "lr": lr, "seed": "0"} for opt in ("celo2", "muon") for lr in ("1e-05", "0.0001", "0.001")
    ]
    # numbers have one spelling, options too
    assert parse_grid("weight_decay=1e-1,.1,0.10 x=a") == [{"weight-decay": "0.1", "x": "a"}]
    rates = [float(settings["lr"]) for settings in parse_grid("lr=1e-5..1e-3:7")]
    assert rates == [1e-5, 2.15e-5, 4.64e-5, 1e-4, 2.15e-4, 4.64e-4, 1e-3]
    assert parse_grid("weights='a file.safetensors'") == [{"weights": "a file.safetensors"}]
    assert parse_grid("path=../thetas/x.state") == [{"path": "../thetas/x.state"}]


@pytest.mark.parametrize(
    ("grid", "problem"),
    [
        ("", "no setting"),
        ("opt", "'opt' is no setting"),
        ("lr=", "empty value"),
        ("lr=1,,2", "empty value"),
        ("lr=0..1:3", "no range"),
        ("lr=1..x:3", "no range"),
        ("lr=1 lr=2", "twice"),
        ("out-dir=x", "the sweep's own"),
    ],
)
def test_bad_grids_are_shown(grid: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_grid(grid)


def test_a_point_is_the_same_in_every_grid() -> None:
    one = make_points(["opt=celo2 lr=1e-3,1e-2 seed=0"], PROGRAM, ["--steps", "3"])
    other = make_points(["seed=0 lr=0.001..0.001:1 opt=celo2", "opt=celo2 lr=1e-3 seed=0"], PROGRAM, ["--steps", "3"])
    assert len(other) == 1 and other[0].id[-8:] == one[0].id[-8:]
    longer = make_points(["opt=celo2 lr=1e-3 seed=0"], PROGRAM, ["--steps", "4"])
    assert longer[0].id != one[0].id


def test_intervals_by_value() -> None:
    assert math.isinf(mean([2.0]).half_width) and f"{mean([2.0]):.2f}" == "2.00"
    found = mean([1.0, 2.0, 3.0])
    # Student's t with two degrees of freedom: 4.303
    assert found.value == 2.0 and found.half_width == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert f"{found:+.1f}" == "+2.0 +- 2.5"
    difference = paired_difference({"1": 1.0, "2": 2.5, "9": 0.0}, {"1": 2.0, "2": 3.0, "3": 7.0})
    assert (difference.value, difference.count) == (-0.75, 2)


def test_margins_by_value() -> None:
    assert margin([3.27, 3.28, 3.26, 3.27]) == pytest.approx(0.02)
    assert margin([2.0], target=1.0) == -1.0


def test_a_sweep_end_to_end(tmp_path: Path) -> None:
    grid = ("--grid", "opt=celo2 lr=1e-4..1e-1:4 seed=0", "--grid", "opt=adamw lr=1e-3,4e-3 seed=0")
    best = ("--best", "seed=1,2,3", "--reference", "adamw", "--workers", "2", "--target", "2.1")
    result = run_sweep(tmp_path / "out", *grid, *best, program=("--fail-above", "0.05"))
    assert result.returncode == 0, result.stderr
    found = records(tmp_path / "out")
    assert len(found) == 6 + 6
    failed = found["opt=celo2 lr=0.1 seed=0"]
    assert failed["status"] == "failed" and failed["reason"] == "error: the loss is not finite" and failed["exit"] == 1
    assert found["opt=celo2 lr=0.001 seed=2"]["metrics"] == {"step": 100, "loss": pytest.approx(2.02)}
    # the best settings alone got more seeds
    assert {key for key in found if "seed=3" in key} == {"opt=celo2 lr=0.001 seed=3", "opt=adamw lr=0.004 seed=3"}
    # checkpoints stay where they may say why
    (kept,) = (tmp_path / "out").glob("points/*/run/step-*")
    assert "lr=0.1" in str(kept)

    report = (tmp_path / "out" / "report.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in report.splitlines() if line.startswith("|")}
    cells = [cell.strip() for cell in rows["celo2"].split("|")]
    # the table of the rates comes last under this name, so the comparison is looked up in the text
    comparison = next(line for line in report.splitlines() if line.startswith("| celo2 | 4 |"))
    assert "lr 0.001 | 2.0200 +- 0.0248 | -0.5000 +- 0.0000" in comparison
    assert f"celo2: margin to 2.1 {0.08 * math.sqrt(3):+.4f}" in report
    # straight lines from 4: to 2.5 + s / 100 where the reference takes 100 steps
    ratio = [(4 - 2.0 - 0.01 * s) / (4 - 2.5 - 0.01 * s) for s in (1, 2, 3)]
    assert f"{mean(ratio):.2f}x" in comparison
    assert cells[-2] == "failed (0.1)" and "error: the loss is not finite" in report
    for name in ("lr.png", "curves.png", "parallel.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in report
    lines = (tmp_path / "out" / "records.jsonl").read_text().splitlines()
    assert len(lines) == 12 and json.loads(lines[0])["curve"]["step"] == list(range(0, 101, 10))

    # a larger grid runs what is new; failed points stay as they are until they are asked for
    wider = ("--grid", "opt=celo2 lr=1e-4..1e-1:4 seed=0,5", *grid[2:])
    result = run_sweep(tmp_path / "out", *wider, *best, program=("--fail-above", "0.05"))
    assert result.returncode == 0 and "10 points" in result.stdout and "6 ended, 4 to do" in result.stdout
    starts = list((tmp_path / "out").glob("points/*/run/starts"))
    assert len(starts) == 16 and all(len(path.read_text().splitlines()) == 1 for path in starts)
    result = run_sweep(tmp_path / "out", *wider, *best, "--retry-failed", program=("--fail-above", "0.05"))
    assert "8 ended, 2 to do" in result.stdout
    result = run_sweep(tmp_path / "out", *wider, *best, "--list", program=("--fail-above", "0.05"))
    assert result.stdout.count("failed: error: the loss is not finite") == 2
    assert result.stdout.count("| loss ") == 14


def test_stopped_sweeps_go_on(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    command = [*SWEEP, "--out", str(tmp_path / "out"), "--grid", "opt=celo2 lr=1e-3,1e-2,1e-1", "--workers", "2"]
    command += ["--", PROGRAM_FILE, "--wait", str(gate)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("out/points/*/run/waiting"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    # a second one in the same folder is refused while this one runs
    other = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert other.returncode == 1 and other.stderr.startswith("error: ") and str(process.pid) in other.stderr
    # a closed terminal does not end it
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "SIGINT: what ran is saved; the same command goes on" in output
    assert len(list(tmp_path.glob("out/points/*/run/saved"))) == 2 and records(tmp_path / "out") == {}
    gate.touch()
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "0 ended, 3 to do" in result.stdout and len(records(tmp_path / "out")) == 3


def test_a_killed_sweep_keeps_what_is_done(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    command = [*SWEEP, "--out", str(tmp_path / "out"), "--grid", "opt=celo2 lr=1e-3,1e-2", "--workers", "1", "--"]
    done = subprocess.run([*command, PROGRAM_FILE], capture_output=True, text=True, timeout=60, check=True)
    assert "2 to do" in done.stdout
    waiting = [*command, PROGRAM_FILE, "--wait", str(gate)]
    process = subprocess.Popen(waiting, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (found := list(tmp_path.glob("out/points/*/run/waiting"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    gate.touch()
    # the orphan may end by itself: its numbers are made again all the same
    result = subprocess.run(waiting, capture_output=True, text=True, timeout=60, check=True)
    assert "0 ended, 2 to do" in result.stdout, found
    assert len(list(tmp_path.glob("out/points/*/record.json"))) == 4


def test_a_point_that_takes_too_long_has_failed(tmp_path: Path) -> None:
    limit = ("--limit-minutes", "0.02", "--workers", "1")
    result = run_sweep(tmp_path / "out", "--grid", "opt=celo2", *limit, program=("--wait", str(tmp_path / "never")))
    (record,) = records(tmp_path / "out").values()
    assert result.returncode == 0 and record["status"] == "failed" and record["reason"] == "it took more than 1 s"
    assert "No run" not in (tmp_path / "out" / "report.md").read_text()


def test_slurm_runs_the_same_points(tmp_path: Path) -> None:
    arguments = ("--grid", "opt=celo2,adamw", "--best", "seed=7")
    result = run_sweep(tmp_path / "out", *arguments, "--slurm", "--sbatch=--gres=gpu:8", program=("--steps", "50"))
    script = result.stdout
    assert "#SBATCH --array=0-1\n" in script and "#SBATCH --gres=gpu:8\n" in script
    assert not (tmp_path / "out").exists()
    # what bash runs for each task, one after the other
    path = tmp_path / "array.sh"
    path.write_text(script)
    for task in range(2):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task)}
        subprocess.run(["bash", str(path)], env=environment, check=True, timeout=60, capture_output=True)
    assert len(records(tmp_path / "out")) == 2
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "4"}
    late = subprocess.run(["bash", str(path)], env=environment, timeout=60, capture_output=True, text=True, check=False)
    assert late.returncode == 1 and "points 0 to 3" in late.stderr
    result = run_sweep(tmp_path / "out", *arguments, program=("--steps", "50"))
    assert "2 ended, 0 to do" in result.stdout and len(records(tmp_path / "out")) == 4


def test_processes_get_their_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run_sweep(tmp_path / "out", "--grid", "opt=celo2 seed=0,1,2,3", "--workers", "2", program=("--lr", "1"))
    seen = {path.read_text() for path in tmp_path.glob("out/points/*/run/starts")}
    assert {line.split()[0] for line in seen} <= {"4", "6"}
    assert {line.split()[1] for line in seen} == {str(max(1, (os.cpu_count() or 1) // 2))}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--grid", "lr=1..x:3"], "no range"),
        (["--grid", "opt=celo2", "--reference", "sgd"], "--reference sgd: no such method; choose one of celo2"),
        (["--grid", "opt=celo2", "--point", "7"], "points 0 to 0"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], problem: str) -> None:
    result = run_sweep(tmp_path / "out", *arguments)
    assert result.returncode == 1 and problem in result.stderr
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


def test_no_such_program(tmp_path: Path) -> None:
    command = [*SWEEP, "--out", str(tmp_path / "out"), "--grid", "opt=celo2", "--", "nowhere.py"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1 and result.stderr == "error: nowhere.py: no such program\n"


def _run(method: str, lr: str, seed: str, loss: float | None) -> Run:
    point = Point("p", (), (("opt", method), ("lr", lr), ("seed", seed)))
    record = {"status": "done", "metrics": {"loss": loss, "step": 10}, "curve": {"step": [0, 10], "loss": [9, loss]}}
    return Run(point, record)


def test_the_best_setting_must_end_on_every_seed() -> None:
    grid = [_run("a", "1", "0", 1.0), _run("a", "1", "1", None), _run("a", "2", "0", 3.0), _run("a", "2", "1", 2.0)]
    (method,) = Findings(grid, [], Metric(), ["opt"]).methods
    assert method.best == (("opt", "a"), ("lr", "2")) and method.value(method.best) == 2.5
    (lost,) = Findings(grid[1:2], [], Metric(), ["opt"]).methods
    assert lost.best is None and lost.values == {}
    upward = Findings(grid[2:] + [_run("a", "3", s, 9.0) for s in "01"], [], Metric(maximize=True), ["opt"])
    assert upward.methods[0].best == (("opt", "a"), ("lr", "3"))


def test_the_trainer_in_a_sweep(tmp_path: Path) -> None:
    fixed = "--size nano --steps 4 --batch-tokens 512 --val-tokens 512 --eval-every 2 --sample-tokens 0"
    grid = ["--grid", "opt=muon momentum=0.5,1.5 adam-lr=1e-3", "--workers", "1"]
    command = [*SWEEP, "--out", "out", *grid, "--", *fixed.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=240, capture_output=True)
    found = records(tmp_path / "out")
    good, bad = (found[f"opt=muon momentum={m} adam-lr=0.001"] for m in ("0.5", "1.5"))
    assert good["status"] == "done" and good["curve"]["step"] == [0, 2, 4] and good["metrics"]["loss"] < 6
    assert bad["status"] == "failed" and "momentum=1.5 must be within [0, 1)" in bad["reason"]
