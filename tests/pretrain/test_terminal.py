"""A run whose terminal goes away, as a process: it goes on to its end and leaves everything."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from celo2.pretrain.prepare_data import prepare_embedded
from celo2.pretrain.runlog import METRICS, read_metrics
from celo2.pretrain.terminal import Unfailing, unfailing_streams

pytestmark = pytest.mark.needs("matplotlib", "tqdm")
PROGRAM = Path(__file__).parents[2] / "pretrain" / "train_gpt.py"
STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_embedded("bytes", tmp_path_factory.mktemp("data"))


def command(data: Path, out: Path) -> list[str]:
    options = ["--steps", STEPS, "--batch-tokens", 512, "--val-tokens", 256, "--log-every", 1, "--data", data]
    return [sys.executable, str(PROGRAM), "--size", "nano", "--opt", "adamw", *map(str, options), "--out-dir", str(out)]


def check(out: Path, steps: int = STEPS) -> None:
    records = read_metrics(out / METRICS)
    assert [record["step"] for record in records if record["kind"] == "train"][-1] == steps
    assert (out / "report.md").exists() and (out / "loss.png").exists()
    assert (out / f"step-{steps:08d}" / "DONE").exists()


@pytest.mark.parametrize("redirection", ["| head -n 3", ">&- 2>&-", "> /dev/full", "2> /dev/full"])
def test_a_stream_that_fails_does_not_end_the_run(redirection: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shell = f"set -o pipefail; {' '.join(command(data, out))} {redirection}; echo status $? >&9"
    reader, writer = os.pipe()
    try:
        subprocess.run(
            ["bash", "-c", f"exec 9>&{writer}; {shell}"],
            pass_fds=[writer],
            capture_output=True,
            timeout=120,
            check=False,
        )
        os.close(writer)
        status = os.read(reader, 100).decode().strip()
    finally:
        os.close(reader)
    assert status == "status 0"
    check(out)


def test_a_terminal_that_is_gone_does_not_end_the_run(data: Path, tmp_path: Path) -> None:
    """A pseudo-terminal whose other end is closed after the first step; its SIGHUP is ignored, as under nohup."""
    out = tmp_path / "run"
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh", *command(data, out)], stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    shown = b""
    while b"step 1/" not in shown:
        shown += os.read(main, 1000)
    os.close(main)
    assert process.wait(120) == 0
    check(out)


def test_a_terminal_that_is_closed_saves_and_the_run_goes_on(data: Path, tmp_path: Path) -> None:
    """The run leads the session of a terminal, which ends with a SIGHUP to it."""
    out = tmp_path / "run"
    arguments = [*command(data, out), "--steps", "40", "--save-every", "1000", "--keep", "9"]
    pid, main = pty.fork()
    if pid == 0:
        os.execv(arguments[0], arguments)
    shown = b""
    while b"step 3/40" not in shown:
        shown += os.read(main, 1000)
    os.close(main)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    check(out, 40)
    first, last = sorted(path.name for path in out.glob("step-*"))
    assert 3 <= int(first.removeprefix("step-")) < 40 and last == "step-00000040"


@pytest.mark.parametrize(("launcher", "goes_on"), [({}, True), ({"TORCHELASTIC_RUN_ID": "1"}, False)])
def test_a_hangup_saves(launcher: dict[str, str], goes_on: bool, data: Path, tmp_path: Path) -> None:
    """Of a run whose output goes to a file; torchrun passes it on and then kills its processes, so there it stops."""
    out, steps = tmp_path / "run", 120
    arguments = [*command(data, out), "--steps", str(steps), "--save-every", "1000", "--keep", "9"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log, env={**os.environ, **launcher})
        while process.poll() is None and len(read_metrics(out / METRICS)) < 5:
            time.sleep(0.01)
        process.send_signal(signal.SIGHUP)
        assert process.wait(200) == 0
    text = (tmp_path / "log").read_text()
    first = int(min(path.name for path in out.glob("step-*")).removeprefix("step-"))
    assert 3 <= first < steps
    if goes_on:
        assert f"SIGHUP: step {first} of {steps} is saved in {out}; the run goes on" in text
        check(out, steps)
    else:
        assert f"SIGHUP: step {first} of {steps} is saved in {out}; go on with --resume auto" in text


def test_streams_go_quiet_and_come_back(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    stream = Unfailing(Broken())
    assert stream.write("one") == 3 and stream.quiet
    stream.flush()
    stream.writelines(["two"])
    assert not stream.isatty()
    before = sys.stdout
    monkeypatch.setattr(sys, "stderr", None)
    with unfailing_streams():
        print("here")
        print("nowhere", file=sys.stderr)
    assert sys.stdout is before and sys.stderr is None
    assert capsys.readouterr().out == "here\n"
