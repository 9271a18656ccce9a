"""The trainer on several processes (gloo): the numbers of one, signals agreed, checkpoints for any number of ranks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from celo2.pretrain import train_gpt
from celo2.pretrain.checkpoint import Checkpoints
from celo2.pretrain.prepare_data import prepare_embedded
from celo2.pretrain.runlog import METRICS, read_metrics

pytestmark = [pytest.mark.dist, pytest.mark.needs("matplotlib", "tqdm", "tiktoken")]
SCRIPT = Path(train_gpt.__file__)
FAULTY = Path(__file__).with_name("faulty_train.py")
# 12 sequences a step: shared out among 1, 2, 3 and 4 ranks
SMALL = [
    "--size",
    "nano",
    "--batch-tokens",
    "3072",
    "--val-tokens",
    "1280",
    "--sample-tokens",
    "8",
    "--eval-every",
    "4",
]
SMALL += ["--steps", "8", "--save-every", "4", "--comm-dtype", "float32"]
SMALL += ["--norms-every", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepare_embedded("bytes", tmp_path_factory.mktemp("data") / "wikipedia-bytes")


def command(ranks: int, data: Path, out: Path, *options: str, script: Path = SCRIPT) -> list[str]:
    program = [sys.executable]
    if ranks > 1:
        program += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*program, str(script), *SMALL, "--data", str(data), "--out-dir", str(out), *options]


def environment(**more: Any) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in more.items()}}


def run(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment(**more))
    print(done.stdout[-2000:], done.stderr[-2000:])
    return done


def losses(out: Path, kind: str = "train") -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(out / METRICS) if record["kind"] == kind}


def norms(out: Path) -> dict[tuple[int, str], float]:
    records = [record for record in read_metrics(out / METRICS) if record["kind"] == "norms"]
    return {(record["step"], key): record[key] for record in records for key in record if "/" in key}


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "alone"
    assert run(command(1, data, out)).returncode == 0
    return out


@pytest.fixture(scope="module")
def four(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "four"
    assert run(command(4, data, out)).returncode == 0
    return out


def assert_same_losses(out: Path, expected: Path, first: int = 1, tolerance: float = 2e-4) -> None:
    found, wanted = losses(out), losses(expected)
    assert [*found] == [*range(1, 9)] == [*wanted]
    for step in range(first, 9):
        assert found[step] == pytest.approx(wanted[step], abs=tolerance), step
    assert losses(out, "val") == pytest.approx(losses(expected, "val"), abs=tolerance)
    measured = norms(expected)
    assert {step for step, _ in measured} == {4, 8}
    assert norms(out) == pytest.approx(measured, rel=10 * tolerance)
    assert wanted[8] < wanted[1] - 1


# one process's numbers


def test_four_ranks_have_the_losses_of_one(alone, four) -> None:
    assert_same_losses(four, alone)
    # every rank's part, and nothing of it lies whole on one
    files = {path.name for path in (four / "step-00000008").iterdir()}
    assert files == {"DONE", ".metadata", *(f"__{rank}_0.distcp" for rank in range(4))}


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, ["--parallel", "ddp", "--micro-batch", "3"]),
        (3, ["--parallel", "ddp", "--zero1", "--micro-batch", "2", "--async-save"]),
        (4, ["--parallel", "hsdp", "--shards", "2", "--micro-batch", "1", "--async-save"]),
        (
            2,
            ["--micro-batch", "2", "--reduce", "every", "--activation-checkpointing", "--loss-chunks", "5"],
        ),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else str(value),
)
def test_every_layout_has_the_losses_of_one_process(data, alone, tmp_path, ranks: int, options: list[str]) -> None:
    done = run(command(ranks, data, tmp_path, *options))
    assert done.returncode == 0
    assert_same_losses(tmp_path, alone)
    # rank 0 alone prints
    assert done.stdout.count("step 8/8 | loss") == 1 and done.stdout.count("sample:") == 1
    assert Checkpoints(tmp_path).latest().step == 8


def test_adamw_is_sharded_too(data, tmp_path) -> None:
    for ranks in (1, 2):
        assert run(command(ranks, data, tmp_path / str(ranks), "--opt", "adamw")).returncode == 0
    assert_same_losses(tmp_path / "2", tmp_path / "1")


def test_bfloat16_has_nearly_the_losses_of_one_process(data, tmp_path) -> None:
    options = ["--dtype", "bfloat16", "--arch", "modern", "--opt", "adamw", "--lr", "1e-3", "--batch-tokens", "1024"]
    for ranks in (1, 2):
        assert run(command(ranks, data, tmp_path / str(ranks), *options)).returncode == 0
    # fully_shard rounds the residual stream too, which autocast does not
    assert_same_losses(tmp_path / "2", tmp_path / "1", tolerance=2e-2)
    assert losses(tmp_path / "2") != losses(tmp_path / "1")


# another world size


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_checkpoint_of_four_ranks_goes_on_with_fewer(data, four, tmp_path, ranks: int) -> None:
    out = tmp_path / "out"
    shutil.copytree(four, out)
    shutil.rmtree(out / "step-00000008")
    done = run(command(ranks, data, out, "--resume", "auto"))
    assert done.returncode == 0
    assert "resumed at step 4 of 8" in done.stdout and f"ranks is 4 there and {ranks} here" in done.stdout
    assert_same_losses(out, four)


def test_ranks_that_do_not_divide_the_batch(data, tmp_path) -> None:
    done = run(command(2, data, tmp_path, "--batch-tokens", "768"))
    assert done.returncode != 0
    assert "the batch of 3 sequences of 256 does not divide among 2 ranks" in done.stderr
    assert "--batch-tokens 1024" in done.stderr


# signals


def wait_for(out: Path, process: subprocess.Popen[str], seen: Callable[[dict[str, Any]], bool]) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if any(seen(record) for record in read_metrics(out / METRICS)):
            return
        time.sleep(0.002)
    pytest.fail(f"the run ended too early, with {process.poll()}: {process.communicate()}")


def start(command: list[str], **more: Any) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(**more), **pipes)


def workers(agent: subprocess.Popen[str]) -> list[int]:
    """Processes of the ranks, in order."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    found = {}
    for pid in map(int, children):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(v.removeprefix(b"RANK=")): pid for v in variables if v.startswith(b"RANK=")}
    return [found[rank] for rank in sorted(found)]


def assert_saved_once(out: Path, step: int) -> None:
    assert [path.name for path in sorted(out.glob("step-*"))] == [f"step-{step:08d}"]
    assert not list(out.glob(".step-*"))


LONG = ["--steps", "400", "--save-every", "400", "--eval-every", "400"]


def test_a_signal_to_one_rank_ends_all_and_one_process_goes_on(data, tmp_path) -> None:
    out = tmp_path / "out"
    process = start(command(2, data, out, *LONG))
    wait_for(out, process, lambda record: record["kind"] == "train" and record["step"] >= 3)
    os.kill(workers(process)[1], signal.SIGUSR1)
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    step = Checkpoints(out).latest().step
    assert f"SIGUSR1: step {step} of 400 is saved" in text and step >= 3
    assert_saved_once(out, step)
    process = start(command(1, data, out, *LONG, "--resume", "auto"))
    wait_for(out, process, lambda record: record["kind"] == "train" and record["step"] >= step + 2)
    process.terminate()
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"resumed at step {step} of 400" in text
    assert [*losses(out)][: step + 2] == [*range(1, step + 3)]


def test_a_hangup_of_one_rank_saves_and_all_go_on(data, tmp_path) -> None:
    # as launch/torchrun.sh starts them: torchrun does not end its ranks then
    program = command(2, data, tmp_path, *LONG, "--steps", "40")
    handled = "--signals-to-handle=SIGTERM,SIGINT"
    process = start([*program[:3], handled, *program[3:]])
    wait_for(tmp_path, process, lambda record: record["kind"] == "train" and record["step"] >= 3)
    os.kill(workers(process)[1], signal.SIGHUP)
    text, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    steps = sorted(int(path.name.removeprefix("step-")) for path in tmp_path.glob("step-*"))
    assert len(steps) == 2 and 3 <= steps[0] < 40 == steps[1]
    assert f"SIGHUP: step {steps[0]} of 40 is saved" in text and "step 40/40 | loss" in text


def test_two_runs_of_several_ranks_do_not_share_a_folder(data, tmp_path) -> None:
    process = start(command(2, data, tmp_path, *LONG))
    wait_for(tmp_path, process, lambda record: record["kind"] == "train")
    second = run(command(2, data, tmp_path, *LONG, "--resume", "auto"))
    assert second.returncode != 0
    # both ranks end, and by the message
    assert second.stderr.count("is in use by process") == 2
    process.terminate()
    assert "is saved" in process.communicate(timeout=60)[0]


def test_first_weights_for_another_number_of_ranks(data, four, tmp_path) -> None:
    done = run(command(2, data, tmp_path / "run", "--steps", "1", "--seed", "9", "--init-from", str(four)))
    assert done.returncode == 0
    first = losses(tmp_path / "run", "val")[0]
    assert first == pytest.approx(losses(four, "val")[8], abs=1e-5)


def test_another_wire_and_split_are_noted(data, tmp_path) -> None:
    options = ["--parallel", "ddp", "--steps", "1", "--resume", "auto"]
    assert run(command(2, data, tmp_path, *options)).returncode == 0
    done = run(command(2, data, tmp_path, *options, "--zero1", "--comm-dtype", "bfloat16"))
    assert done.returncode == 0
    for text in ("comm_dtype is 'float32' there and 'bfloat16' here", "zero1 is False there and True here"):
        assert f"resume:     {text}: the run goes on, no longer to the bit" in done.stdout


def test_sigterm_to_torchrun_saves(data, tmp_path) -> None:
    process = start(command(2, data, tmp_path, *LONG))
    wait_for(tmp_path, process, lambda record: record["kind"] == "train" and record["step"] >= 2)
    process.terminate()
    text, _ = process.communicate(timeout=60)
    step = Checkpoints(tmp_path).latest().step
    assert f"SIGTERM: step {step} of 400 is saved" in text
    assert_saved_once(tmp_path, step)


def test_a_signal_during_validation(data, tmp_path) -> None:
    out = tmp_path
    options = [*LONG[:4], "--eval-every", "2", "--val-tokens", "65536", "--micro-batch", "1"]
    process = start(command(2, data, out, *options))
    wait_for(out, process, lambda record: record["kind"] == "train" and record["step"] == 2)
    os.kill(workers(process)[1], signal.SIGTERM)
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "SIGTERM: step 2 of 400 is saved" in text
    assert_saved_once(out, 2)
    assert [*losses(out, "val")] == [0]


def test_a_signal_during_compilation(data, tmp_path) -> None:
    out = tmp_path / "out"
    # nothing is compiled yet
    process = start(command(2, data, out, *LONG, "--compile"), TORCHINDUCTOR_CACHE_DIR=tmp_path / "cache")
    # the first training step compiles what the validation before it did not need
    wait_for(out, process, lambda record: record["kind"] == "val")
    time.sleep(1)
    os.kill(workers(process)[0], signal.SIGTERM)
    text, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "SIGTERM: step 1 of 400 is saved" in text
    assert_saved_once(out, 1)


# faults of one rank


@pytest.mark.parametrize("mode", [[], ["--async-save"]], ids=["", "async"])
def test_a_rank_killed_while_it_saves_leaves_the_checkpoint_before(data, four, tmp_path, mode: list[str]) -> None:
    out = tmp_path / "out"
    fault = {"FAULT": "kill", "FAULT_RANK": 1, "FAULT_AT": 1}
    done = run(command(2, data, out, *mode, script=FAULTY), **fault)
    assert done.returncode != 0
    assert Checkpoints(out).latest().step == 4
    assert [path.name for path in out.glob("step-*")] == ["step-00000004"] and list(out.glob(".step-00000008.*.tmp"))
    done = run(command(2, data, out, *mode, "--resume", "auto"))
    assert done.returncode == 0 and "resumed at step 4" in done.stdout
    assert_same_losses(out, four)
    assert not list(out.glob(".step-*"))


@pytest.mark.parametrize("mode", [[], ["--async-save"]], ids=["", "async"])
def test_a_rank_that_cannot_write_costs_a_checkpoint_and_not_the_run(data, tmp_path, mode: list[str]) -> None:
    fault = {"FAULT": "disk", "FAULT_RANK": 1, "FAULT_AT": 0}
    done = run(command(2, data, tmp_path, *mode, script=FAULTY), **fault)
    assert done.returncode == 0
    assert "warning: cannot save the checkpoint" in done.stdout and "No space left on device" in done.stdout
    assert_saved_once(tmp_path, 8)


@pytest.mark.parametrize(("kind", "mode"), [("sync", []), ("remove", []), ("remove", ["--async-save"])])
def test_trouble_of_rank_0_alone_does_not_part_the_ranks(data, tmp_path, kind: str, mode: list[str]) -> None:
    fault = {"FAULT": kind, "FAULT_RANK": 0, "FAULT_AT": 0}
    done = run(command(2, data, tmp_path, *mode, "--keep", "1", script=FAULTY), **fault)
    assert done.returncode == 0
    assert "Directory not empty" in done.stdout + done.stderr
    assert Checkpoints(tmp_path).latest().step == 8
    assert len(list(tmp_path.glob("step-*"))) == 1


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all(data, tmp_path) -> None:
    fault = {"FAULT": "loss", "FAULT_RANK": 1, "FAULT_AT": 2}
    done = run(command(2, data, tmp_path, script=FAULTY), **fault)
    assert done.returncode == 0
    train = [record for record in read_metrics(tmp_path / METRICS) if record["kind"] == "train"]
    assert [record["skipped"] for record in train] == [step == 3 for step in range(1, 9)]
    assert train[2]["loss"] is None and train[7]["loss"] < train[0]["loss"] - 1
    assert Checkpoints(tmp_path).latest().skipped == 1
