"""The launch scripts: two machines that meet through torchrun, and a job under a Slurm made of two shell scripts."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from celo2.pretrain import train_gpt
from celo2.pretrain.checkpoint import Checkpoints
from celo2.pretrain.prepare_data import prepare_embedded
from celo2.pretrain.runlog import METRICS, read_metrics

pytestmark = [pytest.mark.dist, pytest.mark.needs("matplotlib", "tqdm", "tiktoken")]
LAUNCH = Path(train_gpt.__file__).parent / "launch"
SMALL = ["--size", "nano", "--batch-tokens", "512", "--val-tokens", "512", "--sample-tokens", "4", "--steps", "3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepare_embedded("bytes", tmp_path_factory.mktemp("data") / "wikipedia-bytes")


@pytest.fixture
def free_port() -> int:
    """A free port that the Slurm script can come to, below 40000."""
    for port in range(23000 + os.getpid() % 9000, 40000):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)):
                return port
    raise RuntimeError("no free port")


def torchrun() -> str:
    return str(Path(sys.executable).with_name("torchrun"))


def test_two_machines_meet_where_they_are_called(data, tmp_path, free_port) -> None:
    """From another folder, by relative paths and a link to the script; a closed terminal makes no difference."""
    variables = {"HEAD": "localhost", "NODES": "2", "GPUS": "1", "PORT": str(free_port), "TORCHRUN": torchrun()}
    variables |= {"RESTARTS": "0", "OMP_NUM_THREADS": "1"}
    here = tmp_path / "elsewhere"
    here.mkdir()
    (here / "train.sh").symlink_to(LAUNCH / "torchrun.sh")
    command = ["./train.sh", *SMALL, "--steps", "30", "--data", os.path.relpath(data, here), "--out-dir", "../out"]
    machines = [
        subprocess.Popen(
            command,
            cwd=here,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **variables},
        )
        for _ in range(2)
    ]
    while machines[0].poll() is None and len(read_metrics(tmp_path / "out" / METRICS)) < 4:
        time.sleep(0.01)
    for machine in machines:
        machine.send_signal(signal.SIGHUP)
    results = [machine.communicate(timeout=200) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], results
    assert sum("parallel:   fsdp, 2 ranks" in out for out, _ in results) == 1
    assert Checkpoints(tmp_path / "out").latest().step == 30
    assert sorted(path.name for path in here.iterdir()) == ["train.sh"]


def test_a_signal_to_the_script_reaches_the_ranks(data, tmp_path, free_port) -> None:
    out = tmp_path / "out"
    variables = {"GPUS": "1", "PORT": str(free_port), "TORCHRUN": torchrun(), "OMP_NUM_THREADS": "1"}
    command = [str(LAUNCH / "torchrun.sh"), *SMALL, "--data", str(data), "--out-dir", str(out), "--steps", "400"]
    agent = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **variables}
    )
    while agent.poll() is None and len(read_metrics(out / METRICS)) < 4:
        time.sleep(0.01)
    agent.send_signal(signal.SIGUSR1)
    text, errors = agent.communicate(timeout=100)
    assert f"SIGUSR1: step {Checkpoints(out).latest().step} of 400 is saved" in text, errors


def test_ranks_start_again_after_one_was_killed(data, tmp_path, free_port) -> None:
    out = tmp_path / "out"
    variables = {"GPUS": "2", "PORT": str(free_port), "TORCHRUN": torchrun(), "RESTARTS": "1", "OMP_NUM_THREADS": "1"}
    command = [str(LAUNCH / "torchrun.sh"), *SMALL, "--data", str(data), "--out-dir", str(out)]
    command += ["--steps", "40", "--save-every", "2"]
    agent = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **variables}
    )
    while agent.poll() is None and not (out / "step-00000002").exists():
        time.sleep(0.01)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    ranks = [pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(ranks[0]), signal.SIGKILL)
    text, errors = agent.communicate(timeout=200)
    assert agent.returncode == 0, errors
    resumed = re.search(r"resumed at step (\d+) of 40", text)
    assert resumed is not None and int(resumed[1]) >= 2
    assert Checkpoints(out).latest().step == 40
    steps = [record["step"] for record in read_metrics(out / METRICS) if record["kind"] == "train"]
    assert steps == [*range(1, 41)]


SRUN = """#!/usr/bin/env bash
# two tasks on one machine, which is what the job asked for
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks+=($!)
done
echo "${tasks[@]}" > "$RECORD/tasks"
for task in "${tasks[@]}"; do wait "$task" || exit $?; done
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$RECORD/scontrol"
if [[ $1 == show ]]; then echo localhost; fi
"""


def slurm(folder: Path, port: int) -> dict[str, str]:
    """Environment of a job of two tasks, with the commands of Slurm that the script calls."""
    (folder / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    variables = {"SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node0"}
    variables |= {"SLURM_JOB_ID": str(port - 20000), "SLURM_SUBMIT_DIR": str(folder), "RECORD": str(folder)}
    variables |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable}
    return {**os.environ, **variables, "SLURM_CPUS_PER_TASK": "1"}


def test_a_slurm_job_is_requeued_until_the_run_is_done(data, tmp_path, free_port) -> None:
    out = tmp_path / "out"
    # Slurm runs a copy, in the folder of the caller
    script = shutil.copy(LAUNCH / "slurm.sh", tmp_path / "slurm_script")
    paths = ["--data", os.path.relpath(data, tmp_path), "--out-dir", "out"]
    command = [str(script), *SMALL, *paths, "--save-every", "1000", "--steps", "60"]
    environment = slurm(tmp_path, free_port)
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    )
    while job.poll() is None and not any(record["kind"] == "train" for record in read_metrics(out / METRICS)):
        time.sleep(0.01)
    for task in (tmp_path / "tasks").read_text().split():
        os.kill(int(task), signal.SIGUSR1)
    text, errors = job.communicate(timeout=100)
    assert job.returncode == 0, errors
    step = Checkpoints(out).latest().step
    assert f"SIGUSR1: step {step} of 60 is saved" in text
    assert f"requeue {environment['SLURM_JOB_ID']}" in (tmp_path / "scontrol").read_text()
    (tmp_path / "scontrol").write_text("")
    again = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=200, check=False, cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr
    assert f"resumed at step {step} of 60" in again.stdout
    assert "requeue" not in (tmp_path / "scontrol").read_text()
