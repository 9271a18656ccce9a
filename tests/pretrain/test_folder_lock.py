"""One run a folder, with real processes: the second is refused by name, and a dead one is in nobody's way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from celo2.pretrain import train_gpt
from celo2.pretrain.checkpoint import Checkpoints
from celo2.pretrain.folder_lock import LOCK, locked
from celo2.pretrain.parallel import World
from celo2.pretrain.prepare_data import prepare_embedded
from celo2.pretrain.runlog import METRICS, read_metrics

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
HOLD = """
import sys, time, torch
from pathlib import Path
from celo2.pretrain.folder_lock import locked
from celo2.pretrain.parallel import World
with locked(Path(sys.argv[1]), World(0, 1, 0, 1, torch.device("cpu"))):
    child = 0
    if len(sys.argv) > 2:
        import os
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            # outlives its parent, as a worker may
            os.write(writer, b"here")
            time.sleep(300)
        os.read(reader, 4)
    print(child, flush=True)
    time.sleep(300)
"""


def hold(folder: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *more], stdout=subprocess.PIPE, text=True)


def test_the_second_is_refused_with_the_first_one_s_pid_and_host(tmp_path: Path) -> None:
    process = hold(tmp_path / "run")
    assert process.stdout is not None and process.stdout.readline() == "0\n"
    try:
        with pytest.raises(ValueError, match="is in use by process") as refused, locked(tmp_path / "run", ALONE):
            pass
        assert f"process {process.pid} on {socket.gethostname()} since" in str(refused.value)
        assert "wait for it or stop it, or give another --out-dir" in str(refused.value)
    finally:
        process.kill()
        process.wait()
    # what it was killed with is in nobody's way
    assert (tmp_path / "run" / LOCK).exists()
    with locked(tmp_path / "run", ALONE):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_child_does_not_keep_the_lock_of_a_dead_process(tmp_path: Path) -> None:
    process = hold(tmp_path, "with a child")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        os.kill(child, 0)
        with locked(tmp_path, ALONE):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_file_that_was_left_or_is_damaged(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("{")
    with locked(tmp_path, ALONE):
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"), locked(tmp_path, ALONE):
            pass
        (tmp_path / LOCK).write_text("{")
        with pytest.raises(ValueError, match="in use by another process"), locked(tmp_path, ALONE):
            pass
    with locked(tmp_path, ALONE):
        pass


def test_a_file_system_without_locks_and_a_folder_that_is_not_writable(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write .*file: .*; give another --out-dir"):
        ExitStack().enter_context(locked(tmp_path / "file", ALONE))

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="has no locks .*: start one run there"), locked(tmp_path, ALONE):
        pass


@pytest.mark.needs("matplotlib", "tqdm")
def test_two_trainers_on_one_folder(tmp_path: Path) -> None:
    data = prepare_embedded("bytes", tmp_path / "data")
    out = tmp_path / "run"
    options = ["--size", "nano", "--opt", "adamw", "--batch-tokens", "512", "--val-tokens", "256", "--steps", "300"]
    command = [sys.executable, train_gpt.__file__, *options, "--data", str(data), "--out-dir", str(out)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while first.poll() is None and len(read_metrics(out / METRICS)) < 4:
        time.sleep(0.01)
    # what a write under way looks like to another run
    (out / ".report.md.0123abcd.tmp").write_text("half")
    second = subprocess.run([*command, "--resume", "auto"], capture_output=True, text=True, timeout=100, check=False)
    assert second.returncode == 1
    assert f"error: {out} is in use by process {first.pid} on {socket.gethostname()}" in second.stderr
    assert second.stderr.count("\n") == 1
    assert (out / ".report.md.0123abcd.tmp").exists()
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 0, errors
    state = Checkpoints(out).latest()
    assert state is not None
    # the next one goes on, and cleans up what nobody writes
    again = subprocess.run(
        [*command, "--resume", "auto", "--dry-run"], capture_output=True, text=True, timeout=100, check=False
    )
    assert again.returncode == 0 and (out / ".report.md.0123abcd.tmp").exists()
    third = subprocess.Popen([*command, "--resume", "auto"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while third.poll() is None and read_metrics(out / METRICS)[-1]["step"] <= state.step:
        time.sleep(0.01)
    third.send_signal(signal.SIGTERM)
    text, errors = third.communicate(timeout=60)
    assert third.returncode == 0 and f"resumed at step {state.step}" in text, errors
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
