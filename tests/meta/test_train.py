"""The command line of meta-training: what a run leaves, how it goes on, what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from celo2 import load_weights
from celo2.meta import train
from celo2.meta.outer_trainer import CURVE
from celo2.pretrain.folder_lock import locked
from celo2.pretrain.parallel import World
from celo2.theta import Theta
from scenarios.regions import processes_with

pytestmark = pytest.mark.needs("matplotlib", "tqdm", "skimage")

PATCHED = """
import sys
from dataclasses import replace
from celo2.meta import train
small = replace(train.get_recipe("celo2-short"), particles=2, window=5, length_range=(8, 16), initial_iterations=16)
train.get_recipe = lambda name: small
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture
def data(tmp_path, image_sets) -> Path:
    arrays = {}
    for image_set in image_sets:
        arrays[f"{image_set.name}_images"] = (image_set.images.reshape(-1, 8, 8) * 65535).astype(np.uint16)
        arrays[f"{image_set.name}_labels"] = image_set.labels.astype(np.uint8)
    np.savez(tmp_path / "images.npz", **arrays)
    return tmp_path / "images.npz"


@pytest.fixture
def command(data, small_recipe, monkeypatch):
    monkeypatch.setattr(train, "get_recipe", lambda name: small_recipe())

    def run(out, *more):
        options = ["--data", str(data), "--out-dir", str(out), "--no-compile", "--device", "cpu", "--log-every", "2"]
        return train.main([*options, *more])

    return run


def test_a_run_leaves_a_theta_with_its_card(command, tmp_path, capsys):
    assert command(tmp_path / "run", "--outer-steps", "6", "--save-every", "3") == 0
    printed = capsys.readouterr().out
    assert "4 pairs of 2 tasks: stripes0, stripes1" in printed and "40 inner steps each" in printed
    assert "outer 6/6 | meta-loss 2." in printed and "inner steps/s" in printed
    theta = Theta.load(tmp_path / "run" / "theta.safetensors")
    assert load_weights(tmp_path / "run" / "theta.safetensors") == theta
    assert theta.variant == "celo2" and theta.orthogonalize
    card = {"outer_steps": "6", "inner_steps": "240", "seed": "0", "recipe": "celo2-short", "ranks": "1"}
    assert card.items() <= dict(theta.card).items()
    assert {"data_sha256", "seconds", "machine", "git", "torch", "meta_loss", "recipe_fields"} <= set(theta.card)
    lines = [json.loads(line) for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert [line["outer_step"] for line in lines] == [1, 2, 3, 4, 5, 6] and set(CURVE) < set(lines[0])
    assert (tmp_path / "run" / "curve.png").stat().st_size > 1000
    assert (tmp_path / "run" / "theta-0000006.safetensors").is_file()


def test_a_run_goes_on_only_when_asked(command, tmp_path, capsys):
    assert command(tmp_path / "whole", "--outer-steps", "6") == 0
    assert command(tmp_path / "run", "--outer-steps", "6", "--save-every", "2") == 0
    assert command(tmp_path / "run", "--outer-steps", "6") == 2
    assert "holds a run: continue it with --resume auto" in capsys.readouterr().err
    # as if killed after the fourth step
    (tmp_path / "run" / "checkpoint-0000006.safetensors").unlink()
    (tmp_path / "run" / "theta.safetensors").unlink()
    assert command(tmp_path / "run", "--outer-steps", "6", "--resume", "auto") == 0
    assert "outer steps 4/6" in capsys.readouterr().out
    one, two = (Theta.load(tmp_path / run / "theta.safetensors") for run in ("whole", "run"))
    assert one == two
    assert len((tmp_path / "run" / "curve.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere.npz"], "nowhere.npz: no such image file"),
        (["--device", "abacus"], "--device abacus: not usable here"),
        (["--start", "celo3"], "celo3"),
    ],
)
def test_mistakes_of_the_user(command, tmp_path, capsys, options, message):
    assert command(tmp_path / "run", *options) == 2
    assert message in capsys.readouterr().err


def test_no_compiler(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert train.main(["--data", str(data), "--out-dir", str(tmp_path / "run"), "--device", "cpu"]) == 2
    assert "no C++ compiler is here" in capsys.readouterr().err


def test_unknown_recipe_and_bad_numbers(tmp_path, capsys):
    assert train.main(["--recipe", "celo3", "--out-dir", str(tmp_path)]) == 2
    assert "recipe 'celo3': allowed: celo2, celo2-base" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--outer-steps", "0"])
    assert "--outer-steps 0: must be at least 1" in capsys.readouterr().err


def test_a_signal_before_the_first_step_leaves_nothing_in_the_way(command, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        note = train.Interruption.__init__

        def interrupted(self, world):
            note(self, world)
            self._note(signal.SIGTERM, None)

        patch.setattr(train.Interruption, "__init__", interrupted)
        assert command(tmp_path / "run", "--outer-steps", "2", "--resume", "auto") == 143
    assert "stopped at outer step 0" in capsys.readouterr().out
    (tmp_path / "run" / "seconds.json").write_text("{")  # damaged: costs the wall time, not the run
    assert command(tmp_path / "run", "--outer-steps", "2", "--resume", "auto") == 0


def test_a_killed_run_resumes_to_the_bit(data, tmp_path):
    (tmp_path / "run.py").write_text(PATCHED)
    out = tmp_path / "killed"
    command = [sys.executable, str(tmp_path / "run.py"), "--data", str(data), "--no-compile", "--device", "cpu"]
    command += ["--outer-steps", "16", "--save-every", "2", "--log-every", "1", "--resume", "auto", "--out-dir"]
    # asked to stop once, then killed
    for number in (signal.SIGTERM, signal.SIGKILL):
        before = set(out.glob("checkpoint-*"))
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while not set(out.glob("checkpoint-*")) - before and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, number)
        process.communicate(timeout=60)
        assert process.returncode == (128 + number if number == signal.SIGTERM else -number)
        assert not (out / "theta.safetensors").exists()
    for folder in (out, tmp_path / "whole"):
        done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert Theta.load(out / "theta.safetensors") == Theta.load(tmp_path / "whole" / "theta.safetensors")


@pytest.fixture
def start(data, tmp_path):
    """Start the program, compiling with an empty cache in two processes, and wait until it says so."""
    processes = []
    two = "import celo2.meta.outer_trainer\ncelo2.meta.outer_trainer.processes_for = lambda device: 2\n"

    def begin(*launcher):
        (tmp_path / "run.py").write_text(two + PATCHED)
        (tmp_path / "tmp").mkdir()
        command = [sys.executable, *launcher, str(tmp_path / "run.py"), "--data", str(data), "--device", "cpu"]
        command += ["--outer-steps", "2", "--save-every", "1000", "--out-dir", str(tmp_path / "run")]
        places = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp")}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, env=os.environ | places, start_new_session=True, **pipes)
        processes.append(process)
        while (line := process.stdout.readline()) and not line.startswith("compiling 1"):
            pass
        assert line, process.communicate()
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def left_by(process, tmp_path):
    """What the program printed before it ended, which takes seconds; nothing else is left of it."""
    printed, errors = process.communicate(timeout=25)
    assert "Traceback" not in errors, errors
    deadline = time.monotonic() + 5
    while (others := processes_with(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not others, [Path(f"/proc/{other}/cmdline").read_text() for other in others]
    assert not list((tmp_path / "run").glob("*")) and not (tmp_path / "run" / ".lock").exists()
    # the compiler's caches alone
    assert not [name for name in os.listdir(tmp_path / "tmp") if not name.startswith("torchinductor_")]
    return printed, errors


def until_a_compiler_runs(tmp_path):
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        for process in processes_with(str(tmp_path)):
            with contextlib.suppress(OSError):
                if "cc1plus" in Path(f"/proc/{process}/cmdline").read_text():
                    return
        time.sleep(0.02)
    pytest.fail("no compiler was seen")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_compilation_ends_it(start, tmp_path, number):
    """As it begins, in the C++ compiler, and while two processes compile."""
    process = start()
    if number == signal.SIGTERM:
        until_a_compiler_runs(tmp_path)
    elif number == signal.SIGINT:
        deadline = time.monotonic() + 100
        while not any((tmp_path / "tmp").glob("celo2-regions-*/*")) or len(processes_with(str(tmp_path))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(3)
    process.send_signal(number)
    printed, errors = left_by(process, tmp_path)
    assert process.returncode == 128 + number, errors
    name = signal.Signals(number).name
    assert f"{name} while it compiled: stops at outer step 0, checkpoints are as they were" in printed


def test_a_second_interrupt_leaves_at_once_and_a_hangup_does_not_stop(start, tmp_path):
    process = start()
    process.send_signal(signal.SIGHUP)
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=25)
    assert process.returncode in (128 + signal.SIGINT, -signal.SIGINT)


@pytest.mark.dist
@pytest.mark.parametrize("to", ["torchrun", "rank 0", "rank 1"])
def test_a_signal_during_the_compilation_of_two_ranks(start, tmp_path, to):
    """Rank 0 compiles and rank 1 waits for it."""
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    until_a_compiler_runs(tmp_path)
    ranks = {}
    for other in processes_with(str(tmp_path)):
        variables = Path(f"/proc/{other}/environ").read_bytes().split(b"\0")
        if b"run.py" in Path(f"/proc/{other}/cmdline").read_bytes():
            ranks |= {int(v.removeprefix(b"RANK=")): other for v in variables if v.startswith(b"RANK=")}
    assert sorted(ranks) == [0, 1]
    os.kill(process.pid if to == "torchrun" else ranks[int(to[-1])], signal.SIGTERM)
    printed, errors = process.communicate(timeout=40)
    assert process.returncode != 0
    assert "SIGTERM while it compiled: stops at outer step 0" in printed or to == "rank 1", errors
    # the launcher has a traceback of its own
    assert f'File "{tmp_path}' not in errors, errors
    assert not processes_with(str(tmp_path)) and not list((tmp_path / "run").glob("*"))


def test_a_hangup_saves_and_the_run_goes_on(data, tmp_path):
    """In the second outer step, from within."""
    program = PATCHED.replace(
        "sys.exit(",
        """real = train.OuterTrainer.gradient
def gradient(trainer):
    if trainer.outer_step == 1:
        os.kill(os.getpid(), signal.SIGHUP)
    return real(trainer)
train.OuterTrainer.gradient = gradient
sys.exit(""",
    )
    (tmp_path / "run.py").write_text(f"import os, signal\n{program}")
    out = tmp_path / "run"
    command = [sys.executable, str(tmp_path / "run.py"), "--data", str(data), "--device", "cpu", "--no-compile"]
    command += ["--outer-steps", "4", "--save-every", "1000", "--out-dir", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    names = [f"checkpoint-000000{step}.safetensors" for step in (2, 4)]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == names
    assert (out / "theta.safetensors").is_file()


def test_what_a_user_s_names_and_a_broken_plot_cost(command, data, tmp_path, monkeypatch, capsys):
    """A file whose name is not UTF-8 goes into the card; a picture that cannot be drawn is a line."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9$_{v1$"))
    folder.mkdir()
    (folder / "images.npz").symlink_to(data)

    def refuse(*_):
        raise RuntimeError("no fonts")

    with monkeypatch.context() as patch:
        patch.setattr(train, "draw_curve", refuse)
        assert command(folder / "run", "--outer-steps", "1", "--data", str(folder / "images.npz")) == 0
    assert "warning: no picture: RuntimeError: no fonts" in capsys.readouterr().err
    theta = Theta.load(folder / "run" / "theta.safetensors")
    assert theta.card["data"].endswith("/caf\ufffd$_{v1$/images.npz")
    train.draw_curve(np.ones((3, len(CURVE))), tmp_path / "curve.png", "cost$_{v1$")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_one_run_a_folder_and_no_rest_of_a_killed_one(command, tmp_path, capsys):
    out = tmp_path / "run"
    with locked(out, World(0, 1, 0, 1, torch.device("cpu"))):
        (out / ".curve.jsonl.0123abcd.tmp").write_text("half")
        assert command(out, "--outer-steps", "1") == 2
        assert f"error: {out} is in use by process {os.getpid()} on" in capsys.readouterr().err
        assert (out / ".curve.jsonl.0123abcd.tmp").exists()
    (out / ".mine.tmp").write_text("of somebody else")
    assert command(out, "--outer-steps", "1") == 0
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == [".mine.tmp"]


def test_another_setting_is_noted(command, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert command(out, "--outer-steps", "2") == 0
    assert command(out, "--outer-steps", "2", "--resume", "auto") == 0
    assert "no longer to the bit" not in capsys.readouterr().out
    setting = train.OuterTrainer.setting
    monkeypatch.setattr(train.OuterTrainer, "setting", lambda self: {**setting(self), "compiled": True, "ranks": 2})
    assert command(out, "--outer-steps", "2", "--resume", "auto") == 0
    printed = capsys.readouterr().out
    for text in ("compiled is False there and True here", "ranks is 1 there and 2 here"):
        assert f"resume: {text}: the run goes on, no longer to the bit" in printed


def test_no_memory_is_a_line_with_a_cure(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.OuterTrainer, "step", lambda self: torch.empty(1 << 60))
    assert command(tmp_path / "run", "--outer-steps", "2") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory on the CPU") and "share the particles" in error
    assert error.count("\n") == 1
