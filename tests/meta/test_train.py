"""The command line of meta-training: what a run leaves, how it goes on, what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from celo2 import load_weights
from celo2.meta import train
from celo2.meta.outer_trainer import CURVE
from celo2.theta import Theta

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
        patch.setattr(train.Interruption, "__init__", lambda self: setattr(self, "signal", signal.SIGTERM))
        assert command(tmp_path / "run", "--outer-steps", "2", "--resume", "auto") == 143
    assert "stopped at outer step 0" in capsys.readouterr().out
    (tmp_path / "run" / "seconds.json").write_text("{")  # damaged: costs the wall time, not the run
    assert command(tmp_path / "run", "--outer-steps", "2", "--resume", "auto") == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_resumes_to_the_bit(data, tmp_path, number):
    (tmp_path / "run.py").write_text(PATCHED)
    out = tmp_path / "killed"
    command = [sys.executable, str(tmp_path / "run.py"), "--data", str(data), "--no-compile", "--device", "cpu"]
    command += ["--outer-steps", "16", "--save-every", "2", "--log-every", "1", "--resume", "auto", "--out-dir"]
    process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number)
    assert not (out / "theta.safetensors").exists()
    for folder in (out, tmp_path / "whole"):
        done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert Theta.load(out / "theta.safetensors") == Theta.load(tmp_path / "whole" / "theta.safetensors")
