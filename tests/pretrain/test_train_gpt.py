"""The trainer as a program: what it prints and leaves, exact resume, and every refusal with its message."""

import fcntl
import json
import math
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from celo2 import Theta, load_weights
from celo2.pretrain import train_gpt
from celo2.pretrain.checkpoint import Checkpoints
from celo2.pretrain.evaluation import evaluate
from celo2.pretrain.interruption import Interruption
from celo2.pretrain.model import GPT, model_config
from celo2.pretrain.parallel import World
from celo2.pretrain.prepare_data import prepare_embedded
from celo2.pretrain.recipes import recipe_for
from celo2.pretrain.runlog import METRICS, read_metrics
from celo2.pretrain.train_gpt import main

pytestmark = pytest.mark.needs("matplotlib", "tqdm", "tiktoken")

SCRIPT = Path(train_gpt.__file__)
SMALL = ["--size", "nano", "--batch-tokens", "512", "--val-tokens", "1024", "--sample-tokens", "8", "--eval-every", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepare_embedded("bytes", tmp_path_factory.mktemp("data") / "wikipedia-bytes")


def command(data: Path, out: Path, *options: str) -> list[str]:
    return [*SMALL, "--data", str(data), "--out-dir", str(out), *options]


def run(arguments: list[str], **options: Any) -> subprocess.CompletedProcess:
    program = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(program, capture_output=True, text=True, check=False, **options)


def numbers(out: Path) -> list[tuple[object, ...]]:
    """What must not depend on interruptions: every loss, norm and rate, to the last bit."""
    keys = ("kind", "step", "loss", "loss_z", "bits_per_byte", "grad_norm", "grad_norm_z", "lr", "skipped")
    return [tuple(r.get(key) for key in keys) for r in read_metrics(out / METRICS) if r["kind"] in ("train", "val")]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its path."""
    file = checkpoint.with_suffix(".pt")
    dcp_to_torch_save(checkpoint, file)
    found: dict[str, torch.Tensor] = {}

    def walk(value: object, path: str) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                walk(entry, f"{path}/{key}")
        elif torch.is_tensor(value):
            found[path] = value

    walk(torch.load(file), "")
    return found


def wait_for(out: Path, process: subprocess.Popen, seen: Callable[[dict[str, Any]], bool]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(seen(record) for record in read_metrics(out / METRICS)):
            return
        time.sleep(0.002)
    pytest.fail(f"the run ended too early, with {process.poll()}: {process.communicate()}")


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    wait_for(out, process, lambda record: record["step"] >= step)


def wait_for_kind(out: Path, kind: str, process: subprocess.Popen) -> None:
    wait_for(out, process, lambda record: record["kind"] == kind)


# a whole run


def test_a_run_prints_and_leaves_what_it_promises(tmp_path, data) -> None:
    out = tmp_path / "run"
    done = run(command(data, out, "--opt", "celo2", "--steps", "6", "--save-every", "4", "--prompt", "Albert"))
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert "parameters: 853,248 (786,432 by celo2, 66,816 by adamw)" in text
    assert "optimizer:  celo2, theta celo2-lm@" in text
    assert "12 x [32, 128]" in text
    assert "512 tokens: 2 sequences of 256, 1 micro-batches" in text
    pattern = (
        r"step {}/6 \| loss \d\.\d{{4}} \([+-]\d+\.\d\dz\) \| \d\.\d{{3}} bpb \| "
        r"norm \d+\.\d{{4}} \([+-]\d+\.\d\dz\) \| "
        r"lr \d\.\de[+-]\d\d \| \d+ ms \(opt \d+\.\d\) \| n/a MFU \| [\d.]+k? tok/s \| eta "
    )
    for step in range(1, 7):
        assert re.search(pattern.format(step), text), step
    assert re.search(r"step 0/6 \| validation loss 5\.[4-7]\d+ \| [78]\.\d+ bpb", text)
    assert "sample:\nAlbert" in text and "validation loss: " in text and "celo2-lm@" in text.split("sample:")[1]
    # a progress bar is for terminals
    assert done.stderr == ""
    records = read_metrics(out / METRICS)
    kinds = [(r["kind"], r["step"]) for r in records]
    assert kinds[:2] == [("run", 0), ("val", 0)] and kinds[-2:] == [("val", 6), ("final", 6)]
    assert [step for kind, step in kinds if kind == "train"] == [1, 2, 3, 4, 5, 6]
    assert [step for kind, step in kinds if kind == "val"] == [0, 4, 6]
    assert {"python", "torch", "celo2", "git"} <= set(records[0]["versions"])
    train = [r for r in records if r["kind"] == "train"]
    # one byte a token, but for the end-of-text tokens
    assert train[0]["bits_per_byte"] == pytest.approx(train[0]["loss"] / math.log(2), rel=0.01)
    assert 0 < train[5]["lr"] < 1e-4 and train[0]["lr"] == recipe_for("nano", "celo2").lr
    assert all(0.05 < r["memory_gib"] < 64 and r["mfu"] is None for r in train)
    assert all(r["optimizer_share"] == pytest.approx(r["optimizer_ms"] / r["step_ms"]) for r in train)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"{records[-1]['loss']:.4f} nats a token" in (out / "report.md").read_text()
    assert Checkpoints(out).latest().step == 6


def test_a_finished_run_is_shown_again_and_not_trained_again(tmp_path, data) -> None:
    out = tmp_path / "run"
    arguments = command(data, out, "--steps", "3", "--resume", "auto")
    first = run(arguments)
    before = numbers(out)
    again = run(arguments)
    assert (first.returncode, again.returncode) == (0, 0), again.stderr
    assert "resumed at step 3 of 3" in again.stdout and "step 3/3" not in again.stdout
    assert first.stdout.split("sample:")[1] == again.stdout.split("sample:")[1]
    assert numbers(out) == before


def test_a_terminal_gets_a_progress_bar(tmp_path, data) -> None:
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    program = [sys.executable, str(SCRIPT), *command(data, tmp_path, "--steps", "3")]
    done = subprocess.run(program, stdout=subprocess.DEVNULL, stderr=terminal, check=False)
    os.close(terminal)
    assert done.returncode == 0 and b"0/3 [00:00<?, ?step/s]" in os.read(ours, 65536)
    os.close(ours)


def test_torchrun_is_the_same_program(tmp_path, data) -> None:
    assert run(command(data, tmp_path / "plain", "--steps", "3")).returncode == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(SCRIPT)]
    arguments = [*launcher, *command(data, tmp_path / "torchrun", "--steps", "3")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert numbers(tmp_path / "torchrun") == numbers(tmp_path / "plain")


@pytest.mark.parametrize("opt", ["adamw", "muon", "celo2-base"])
def test_other_optimizers_train(tmp_path, data, opt: str) -> None:
    assert main(command(data, tmp_path, "--opt", opt, "--steps", "8", "--batch-tokens", "256")) == 0
    losses = [r["loss"] for r in read_metrics(tmp_path / METRICS) if r["kind"] == "val"]
    assert losses[-1] < losses[0] - 0.5


def test_gpt2_tokens_and_the_modern_architecture(tmp_path, capsys) -> None:
    data = prepare_embedded("gpt2", tmp_path / "data")
    options = ["--size", "30m", "--batch-tokens", "512", "--val-tokens", "512", "--steps", "1", "--sample-tokens", "2"]
    assert main([*options, "--data", str(data), "--out-dir", str(tmp_path / "out")]) == 0
    train = next(r for r in read_metrics(tmp_path / "out" / METRICS) if r["kind"] == "train")
    # a GPT-2 token of English is 3 to 6 bytes
    assert 1 / 6 < train["bits_per_byte"] / (train["loss"] / math.log(2)) < 1 / 3
    assert "30m, modern: 6 layers, 3 x 128 heads" in capsys.readouterr().out


def test_accumulation_does_not_change_the_numbers(tmp_path, data) -> None:
    for micro in ("1", "4"):
        out = tmp_path / micro
        options = ["--steps", "3", "--batch-tokens", "1024", "--micro-batch", micro, "--seed", "5"]
        assert main(command(data, out, *options)) == 0
    for one, four in zip(numbers(tmp_path / "1"), numbers(tmp_path / "4"), strict=True):
        assert one[2] == pytest.approx(four[2], rel=1e-5)
        if one[0] == "train":
            assert one[5] == pytest.approx(four[5], rel=1e-4)
            assert one[4] == pytest.approx(four[4], rel=1e-5)


# resume


@pytest.mark.parametrize("opt", ["celo2", "adamw"])
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(tmp_path, data, opt: str) -> None:
    options = ["--opt", opt, "--steps", "14", "--save-every", "3", "--keep", "5", "--resume", "auto"]
    assert run(command(data, tmp_path / "whole", *options)).returncode == 0
    arguments = [sys.executable, str(SCRIPT), *command(data, tmp_path / "killed", *options)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path / "killed", 8, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < Checkpoints(tmp_path / "killed").latest().step < 14
    resumed = run(command(data, tmp_path / "killed", *options))
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"resumed at step (3|6|9|12) of 14", resumed.stdout)
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    whole, killed = (tensors(tmp_path / name / "step-00000014") for name in ("whole", "killed"))
    assert len(whole) > 100 and whole.keys() == killed.keys()
    assert [name for name, value in whole.items() if not torch.equal(value, killed[name])] == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(tmp_path, data, number: int, status: int) -> None:
    options = ["--steps", "9", "--save-every", "100", "--resume", "auto"]
    arguments = [sys.executable, str(SCRIPT), *command(data, tmp_path / "out", *options, "--steps", "500")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path / "out", 2, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    step = Checkpoints(tmp_path / "out").latest().step
    name = signal.Signals(number).name
    assert f"{name}: step {step} of 500 is saved in" in output and "go on with --resume auto" in output
    assert max(r["step"] for r in read_metrics(tmp_path / "out" / METRICS) if r["kind"] == "train") == step


# the program, with a backward pass that says that it has begun and does not end
ENDLESS = """
import sys, time, torch
from celo2.pretrain.train_gpt import main

def backward(loss):
    print("backward", file=sys.stderr, flush=True)
    time.sleep(600)

torch.Tensor.backward = backward
sys.exit(main(sys.argv[1:]))
"""


def test_a_second_interrupt_leaves_at_once(tmp_path, data) -> None:
    arguments = [sys.executable, "-c", ENDLESS, *command(data, tmp_path / "out", "--steps", "3", "--opt", "adamw")]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for awaited in ("backward", "SIGINT: saves and stops after this step"):
        seen = []
        while not seen or (seen[-1] and awaited not in seen[-1]):
            seen.append(process.stderr.readline())
        assert seen[-1], seen
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert not list((tmp_path / "out").glob("step-*")) and "Traceback" not in errors


def test_a_signal_during_validation_ends_it(tmp_path, data) -> None:
    options = ["--steps", "3", "--val-tokens", "100000", "--micro-batch", "1"]
    arguments = [sys.executable, str(SCRIPT), *command(data, tmp_path, *options)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_kind(tmp_path, "run", process)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "SIGTERM: before the first step, nothing to save; go on with --resume auto" in output
    assert [r["kind"] for r in read_metrics(tmp_path / METRICS)] == ["run"]


def test_an_incomplete_checkpoint_is_passed_over_and_said(tmp_path, data, capsys) -> None:
    arguments = command(data, tmp_path, "--steps", "6", "--save-every", "2", "--keep", "9", "--resume", "auto")
    assert main(arguments) == 0
    before = numbers(tmp_path)
    (tmp_path / "step-00000006" / "DONE").unlink()
    (tmp_path / ".step-00000008.0123abcd.tmp").mkdir()
    capsys.readouterr()
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "step-00000006 is not usable (it has no DONE file: it is incomplete): going back" in text
    assert "resumed at step 4 of 6" in text
    assert numbers(tmp_path) == before
    assert not list(tmp_path.glob(".step*"))
    for path in tmp_path.glob("step-*/DONE"):
        path.unlink()
    # nothing is thrown away: four folders, of which one was set aside when its step was saved again
    folders = sorted(path.name for path in tmp_path.glob("step-*"))
    assert len(folders) == 4 and sum(name.endswith(".bad") for name in folders) == 1
    assert main(arguments) == 1
    assert "has 3 checkpoints and none is usable: step-00000006 is not usable" in capsys.readouterr().err
    assert numbers(tmp_path) == before and sorted(path.name for path in tmp_path.glob("step-*")) == folders


def test_a_checkpoint_of_another_run_is_refused(tmp_path, data, capsys) -> None:
    assert main(command(data, tmp_path, "--steps", "2")) == 0
    before = (tmp_path / METRICS).read_bytes()
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in data.glob("*.bin"):
        # other text of the same length
        (changed / path.name).write_bytes(path.read_bytes()[:5000] + b"a\0" * ((path.stat().st_size - 5000) // 2))
    for options, message in (
        (["--opt", "adamw"], "optimizer is 'celo2' there and 'adamw' here"),
        (["--arch", "modern"], "model.arch is 'gpt2' there and 'modern' here"),
        (["--seed", "7"], "seed is 1337 there and 7 here"),
        (["--weights", "adam"], "theta is"),
        (["--lr", "0.5"], ": recipe.lr is 0.001 there and 0.5 here; give"),
        (["--val-tokens", "2048"], ": recipe.val_tokens is 1024 there and 2048 here; give"),
        (["--dtype", "bfloat16"], "dtype is 'float32' there and 'bfloat16' here"),
        (["--data", str(changed)], "shards.wikipedia_train_000001.bin is"),
    ):
        assert main(command(data, tmp_path, "--steps", "2", "--resume", "auto", *options)) == 1
        error = capsys.readouterr().err
        assert "is a checkpoint of another run: " in error and message in error and "another --out-dir" in error
    assert (tmp_path / METRICS).read_bytes() == before


def test_the_micro_batch_may_change(tmp_path, data, capsys) -> None:
    options = ["--save-every", "2", "--keep", "5", "--resume", "auto"]
    assert main(command(data, tmp_path, "--steps", "4", *options)) == 0
    before = numbers(tmp_path)
    shutil.rmtree(tmp_path / "step-00000004")
    capsys.readouterr()
    assert main(command(data, tmp_path, "--steps", "4", "--micro-batch", "1", *options)) == 0
    assert "micro_batch is 2 there and 1 here: the run goes on, no longer to the bit" in capsys.readouterr().out
    assert [entry[2] for entry in numbers(tmp_path)] == pytest.approx([entry[2] for entry in before], rel=1e-4)


def test_another_setting_is_noted(tmp_path, data, capsys) -> None:
    options = ["--opt", "adamw", "--save-every", "1", "--resume", "auto"]
    assert main(command(data, tmp_path, "--steps", "2", *options)) == 0
    shutil.rmtree(tmp_path / "step-00000002")
    done = tmp_path / "step-00000001" / "DONE"
    text = done.read_text()
    assert f'"torch": "{torch.__version__}"' in text and '"comm_dtype": null' in text
    done.write_text(text.replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"').replace('"AMD', '"another'))
    capsys.readouterr()
    changes = ["--loss-chunks", "2", "--activation-checkpointing"]
    assert main(command(data, tmp_path, "--steps", "2", *options, *changes)) == 0
    printed = capsys.readouterr().out
    there = {"torch is '1.0' there", "loss_chunks is 1 there", "activation_checkpointing is False there"}
    for line in there:
        assert re.search(f"resume: +{line} and .* here: the run goes on, no longer to the bit", printed), line
    # of a checkpoint from before there were settings nothing is said
    shutil.rmtree(tmp_path / "step-00000002")
    state = json.loads(text)
    del state["identity"]["setting"]
    done.write_text(json.dumps(state))
    assert main(command(data, tmp_path, "--steps", "2", *options)) == 0
    assert "no longer to the bit" not in capsys.readouterr().out


def test_compiled_blocks_and_eager_ones_are_told_apart(tmp_path, data, capsys, monkeypatch) -> None:
    options = ["--opt", "adamw", "--steps", "1", "--resume", "auto"]
    assert main(command(data, tmp_path, *options)) == 0
    # compiling takes a minute
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    capsys.readouterr()
    assert main(command(data, tmp_path, *options, "--compile")) == 0
    printed = capsys.readouterr().out
    assert "compile is False there and True here: the run goes on, no longer to the bit" in printed
    assert "compile:    each kind of block when it is first used, a minute or more" in printed


def test_attention_within_documents_is_another_run(tmp_path, data, capsys) -> None:
    options = ["--opt", "adamw", "--steps", "2", "--save-every", "1", "--resume", "auto"]
    assert main(command(data, tmp_path / "masked", *options, "--mask-documents")) == 0
    assert "vocabulary 257, attention within documents" in capsys.readouterr().out
    assert Checkpoints(tmp_path / "masked").latest().identity["mask_documents"] is True
    whole = numbers(tmp_path / "masked")
    assert main(command(data, tmp_path / "masked", *options)) == 1
    assert "mask_documents is True there and None here; give the same options" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "masked" / "step-00000002")
    assert main(command(data, tmp_path / "masked", *options, "--mask-documents")) == 0
    assert numbers(tmp_path / "masked") == whole
    # checkpoints from before it was an option have no word of it, and go on
    assert main(command(data, tmp_path / "plain", *options, "--no-compile")) == 0
    assert "mask_documents" not in Checkpoints(tmp_path / "plain").latest().identity


# more of a run


@pytest.mark.parametrize("opt", ["celo2", "muon"])
def test_an_extended_run_is_one_that_knew_of_it_from_the_start(tmp_path, data, capsys, opt: str) -> None:
    options = ["--opt", opt, "--save-every", "100", "--resume", "auto", "--keep", "9"]
    assert main(command(data, tmp_path / "later", "--steps", "4", *options)) == 0
    capsys.readouterr()
    assert main(command(data, tmp_path / "later", "--steps", "4", "--extend", "3", *options)) == 0
    printed = capsys.readouterr().out
    assert "resumed at step 4 of 7" in printed and "; then 3 steps, warm-up" in printed and "step 7/7" in printed
    assert main(command(data, tmp_path / "known", "--steps", "4", "--extend", "3", *options)) == 0
    rows = {name: numbers(tmp_path / name) for name in ("later", "known")}
    # the end of the first part was validated as well
    assert [row for row in rows["later"] if row[0] == "train"] == [row for row in rows["known"] if row[0] == "train"]
    rates = [row[7] for row in rows["later"] if row[0] == "train"]
    assert rates[4] > rates[3] and rates[6] < rates[5]
    later, known = (tensors(tmp_path / name / "step-00000007") for name in ("later", "known"))
    assert [name for name, value in later.items() if not torch.equal(value, known[name])] == []
    assert "7 of 512 tokens" in (tmp_path / "later" / "report.md").read_text()
    # what was begun stays
    for more in ([], ["--extend", "2"]):
        capsys.readouterr()
        assert main(command(data, tmp_path / "later", "--steps", "4", *options, *more)) == 1
        assert "step 7 of this run is within --extend 3: give that" in capsys.readouterr().err
    assert main(command(data, tmp_path / "later", "--steps", "4", "--extend", "3", "1", *options)) == 0
    assert Checkpoints(tmp_path / "later").latest().identity["extensions"] == [3, 1]


def test_first_weights_of_another_run(tmp_path, data, capsys) -> None:
    assert main(command(data, tmp_path / "first", "--opt", "adamw", "--steps", "3", "--save-every", "2")) == 0
    source = Checkpoints(tmp_path / "first").latest()
    options = ["--steps", "2", "--seed", "5", "--eval-every", "1", "--resume", "auto"]
    capsys.readouterr()
    # another optimizer and seed, and steps of its own
    assert main(command(data, tmp_path / "second", *options, "--init-from", str(tmp_path / "first"))) == 0
    assert f"weights:    began as those of run {source.run_id}, step 3" in capsys.readouterr().out
    losses = {r["step"]: r["loss"] for r in read_metrics(tmp_path / "second" / METRICS) if r["kind"] == "val"}
    ended = [r["loss"] for r in read_metrics(tmp_path / "first" / METRICS) if r["kind"] == "val"][-1]
    assert losses[0] == ended and len(losses) == 3
    # one of its checkpoints
    chosen = tmp_path / "first" / "step-00000002"
    assert main(command(data, tmp_path / "third", *options, "--init-from", str(chosen))) == 0
    assert f"began as those of run {source.run_id}, step 2" in capsys.readouterr().out
    # a run that goes on does not need them again
    shutil.rmtree(tmp_path / "first")
    for more in ([], ["--init-from", str(tmp_path / "first")]):
        capsys.readouterr()
        assert main(command(data, tmp_path / "second", *options, *more)) == 0
        printed = capsys.readouterr().out
        assert "resumed at step 2 of 2" in printed and f"began as those of run {source.run_id}, step 3" in printed


def test_first_weights_that_do_not_fit(tmp_path, data, capsys) -> None:
    assert main(command(data, tmp_path / "first", "--opt", "adamw", "--steps", "1")) == 0
    (tmp_path / "empty").mkdir()
    for source, more, message in (
        ("first", ["--arch", "modern"], "is of another model: arch is 'gpt2' there and 'modern' here"),
        ("empty", [], "empty: holds no complete checkpoint; give the --out-dir of a run, or one of its step-*"),
        ("none", [], "none: holds no complete checkpoint"),
        ("first/step-00000009", [], "step-00000009: holds no complete checkpoint"),
    ):
        capsys.readouterr()
        arguments = command(data, tmp_path / "second", "--steps", "1", "--init-from", str(tmp_path / source), *more)
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: --init-from ") and message in error and error.count("\n") == 1
    damaged = next((tmp_path / "first" / "step-00000001").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert main(command(data, tmp_path / "second", "--steps", "1", "--init-from", str(tmp_path / "first"))) == 1
    assert "step-00000001 is not usable: __0_0.distcp is damaged" in capsys.readouterr().err


# what is shown at the end


def test_names_that_are_no_formula_and_no_utf_8(tmp_path, data) -> None:
    """A theta called like a formula, a folder whose name is not UTF-8, and an output that knows ASCII alone."""
    theta = tmp_path / "cost$_{v1$.safetensors"
    arrays = load_weights("momentum").arrays
    Theta.from_arrays(arrays).save(theta)
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/donn\xe9es|"))
    folder.symlink_to(data)
    out = tmp_path / "d\u00e9j\u00e0"
    arguments = command(folder, out, "--steps", "2", "--weights", str(theta), "--prompt", "caf\udce9")
    done = run(arguments, env={**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "cost$_{v1$" in report and "donn\ufffdes\\|" in report


def test_what_cannot_be_shown_does_not_fail_the_run(tmp_path, data, monkeypatch, capsys) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no fonts\nmore")

    monkeypatch.setattr("celo2.pretrain.summary.draw_curve", refuse)
    monkeypatch.setattr("celo2.pretrain.summary.write_report", refuse)
    monkeypatch.setattr(GPT, "generate", refuse)
    assert main(command(data, tmp_path, "--steps", "1")) == 0
    captured = capsys.readouterr()
    warnings = [f"warning: no {what}: RuntimeError: no fonts" for what in ("picture", "report")]
    assert captured.err.splitlines() == ["warning: no sample: no fonts", *warnings]
    assert "validation loss: " in captured.out
    assert read_metrics(tmp_path / METRICS)[-1]["kind"] == "final"
    monkeypatch.undo()
    # and is there once it can
    assert main(command(data, tmp_path, "--steps", "1", "--resume", "auto")) == 0
    assert (tmp_path / "loss.png").exists() and (tmp_path / "report.md").exists()


def test_a_run_without_checkpoints_keeps_its_old_log(tmp_path, data) -> None:
    arguments = command(data, tmp_path, "--steps", "2", "--resume", "auto")
    assert main(arguments) == 0
    before = (tmp_path / METRICS).read_bytes()
    shutil.rmtree(tmp_path / "step-00000002")
    assert main(arguments) == 0
    assert (tmp_path / f"{METRICS}.old").read_bytes() == before


def test_the_last_validation_is_of_the_last_step(tmp_path, data, monkeypatch) -> None:
    arguments = command(data, tmp_path, "--steps", "5", "--eval-every", "100", "--max-skips", "3")
    poison(monkeypatch, {2, 3, 4})
    assert main(arguments) == 1
    monkeypatch.undo()
    assert main([*arguments, "--resume", "auto"]) == 0
    assert [(r["kind"], r["step"]) for r in read_metrics(tmp_path / METRICS)][-2:] == [("val", 5), ("final", 5)]


@pytest.mark.parametrize("opt", ["celo2", "adamw", "muon"])
def test_a_run_that_skipped_every_step_can_go_on(tmp_path, data, monkeypatch, opt: str) -> None:
    poison(monkeypatch, set(range(99)))
    arguments = command(data, tmp_path, "--opt", opt, "--steps", "6", "--max-skips", "3")
    assert main(arguments) == 1
    monkeypatch.undo()
    assert main([*arguments, "--resume", "auto"]) == 0
    skipped = [r["skipped"] for r in read_metrics(tmp_path / METRICS) if r["kind"] == "train"]
    assert skipped == [True] * 3 + [False] * 3


def test_an_older_run_is_not_overwritten(tmp_path, data, capsys) -> None:
    assert main(command(data, tmp_path, "--steps", "1")) == 0
    before = (tmp_path / METRICS).read_bytes()
    assert main(command(data, tmp_path, "--steps", "1")) == 1
    assert "holds a run: go on with --resume auto, or give another --out-dir" in capsys.readouterr().err
    assert (tmp_path / METRICS).read_bytes() == before


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, data) -> None:
    code = (
        "import resource, runpy, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    arguments = command(data, tmp_path, "--steps", "4", "--save-every", "2")
    done = subprocess.run(
        [sys.executable, "-c", code, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "warning: " in done.stdout and "step-00000002: OSError: [Errno 27] File too large" in done.stdout
    assert not list(tmp_path.glob(".step*"))
    assert "step 4/4 | loss" in done.stdout
    assert "error: " in done.stderr and "step-00000004" in done.stderr and "free space" in done.stderr
    assert not list(tmp_path.glob("*step-*"))
    assert run([*arguments, "--resume", "auto"]).returncode == 0


# validation


def test_validation_is_weighted_by_tokens_and_bytes(monkeypatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    model = GPT(model_config("nano"))
    model.init_weights(0)
    tokens_BT = torch.randint(256, (5, 33), generator=torch.Generator().manual_seed(0))
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    token_bytes = np.arange(257) % 5
    # two batches of other sizes
    batches = [(inputs_BT[:4], targets_BT[:4]), (inputs_BT[4:], targets_BT[4:])]
    world = World(0, 1, 0, 1, torch.device("cpu"))
    interruption = Interruption(world)
    # targets that do not count, as a rank without a batch has them
    padding = (inputs_BT[:1], torch.full_like(targets_BT[:1], -100))
    found = evaluate(model, [*batches, padding], token_bytes, "float32", world, interruption)
    nats = torch.nn.functional.cross_entropy(
        model(inputs_BT).flatten(0, 1), targets_BT.flatten(), reduction="sum"
    ).item()
    text_bytes = int(token_bytes[targets_BT.numpy()].sum())
    assert found == pytest.approx((nats / 160, nats / math.log(2) / text_bytes), rel=1e-5)
    assert model.training
    interruption._note(signal.SIGTERM, None)
    assert evaluate(model, batches, token_bytes, "float32", world, interruption) is None
    assert interruption.name == "SIGTERM"


# values that are not finite


def poison(monkeypatch, bad_calls: set[int]) -> None:
    """Make the loss of these training forward passes, counted from 0, infinite."""
    real, calls = GPT.forward, iter(range(10**6))

    def forward(self: GPT, tokens: torch.Tensor, targets: torch.Tensor | None = None, reduction: str = "mean"):
        loss = real(self, tokens, targets, reduction)
        if targets is not None and reduction == "mean" and next(calls) in bad_calls:
            return loss * math.inf
        return loss

    monkeypatch.setattr(GPT, "forward", forward)


def test_a_loss_that_is_not_finite_skips_its_step(tmp_path, data, monkeypatch, capsys) -> None:
    poison(monkeypatch, {1, 2, 4})
    assert main(command(data, tmp_path, "--steps", "6", "--max-skips", "3")) == 0
    train = [r for r in read_metrics(tmp_path / METRICS) if r["kind"] == "train"]
    assert [r["skipped"] for r in train] == [False, True, True, False, True, False]
    assert train[1]["loss"] is None and train[5]["loss"] < train[0]["loss"]
    assert "SKIPPED: not finite" in capsys.readouterr().out
    assert Checkpoints(tmp_path).latest().skipped == 3
    assert "3 skipped" in (tmp_path / "report.md").read_text()


def test_too_many_in_a_row_end_the_run_with_a_checkpoint(tmp_path, data, monkeypatch, capsys) -> None:
    poison(monkeypatch, set(range(2, 100)))
    assert main(command(data, tmp_path, "--steps", "9", "--max-skips", "3")) == 1
    assert "3 steps in a row had a loss or gradient that is not finite; step 5 is saved" in capsys.readouterr().err
    assert Checkpoints(tmp_path).latest().step == 5
    monkeypatch.undo()
    assert main(command(data, tmp_path, "--steps", "9", "--max-skips", "3", "--resume", "auto")) == 0
    skipped = [r["skipped"] for r in read_metrics(tmp_path / METRICS) if r["kind"] == "train"]
    assert skipped == [False] * 2 + [True] * 3 + [False] * 4


# refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "huge"], "unknown size 'huge': choose one of nano, 30m, small, medium, large, gpt2-xl, xl"),
        (["--opt", "sgd"], "unknown optimizer 'sgd': choose one of celo2, celo2-base, adamw, muon"),
        (["--recipe", "mine"], "unknown recipe 'mine': choose one of nano-adamw"),
        (["--recipe", "small-muon"], "recipe 'small-muon' is for --opt muon, not celo2"),
        (["--batch-tokens", "4194304"], "lower the batch, or give --steps"),
        (["--max-grad-norm", "-1"], "or None for no clip (--max-grad-norm 0)"),
        (["--device", "meta"], "--device meta: not usable here (a meta device does not train); use auto, cpu, cuda"),
        (["--lr", "-1"], "lr=-1.0 must be finite and > 0"),
        (["--lr", "nan"], "lr=nan must be finite and > 0"),
        (["--weight-decay", "-0.1"], "weight_decay=-0.1 must be finite and >= 0"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--batch-tokens", "300"], "batch_tokens=300 is not a multiple of the context, 256"),
        (["--micro-batch", "3"], "--micro-batch 3 does not divide the batch of 2 sequences"),
        (["--weights", "nowhere/theta.state"], "no such file"),
        (["--opt", "adamw", "--weights", "momentum"], "--weights momentum belongs to --opt celo2"),
        (["--device", "abacus"], "--device abacus: not usable here"),
        (["--arch", "modern", "--bias"], "bias=True"),
        (["--val-tokens", "10"], "val_tokens=10 is less than one window of 256"),
        (["--keep", "0"], "keep at least one checkpoint"),
        (["--zero1"], "--zero1 belongs to --parallel ddp, this run is one process"),
        (["--size", "30m"], "holds vocabulary id 256, this model reads 0 ('gpt2')"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, data, capsys, options: list[str], message: str) -> None:
    if "30m" in options:
        options = [*options, "--batch-tokens", "1024"]
    assert main(command(data, tmp_path / "out", *options)) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_options_under_their_names_before(tmp_path, data, capsys) -> None:
    assert main(command(data, tmp_path, "--split-step", "--wire-dtype", "float32")) == 1
    assert capsys.readouterr().err.splitlines() == [
        "warning: --split-step is --zero1 now",
        "warning: --wire-dtype is --comm-dtype now",
        "error: --zero1 belongs to --parallel ddp, this run is one process",
    ]


def test_an_environment_that_is_no_torchrun(tmp_path, data, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="no number"):
        World.start()
    monkeypatch.delenv("WORLD_SIZE")
    assert main(command(data, tmp_path, "--shards", "2")) == 1
    assert "--shards 2 belongs to --parallel hsdp" in capsys.readouterr().err


def test_missing_and_damaged_data(tmp_path, data, capsys) -> None:
    assert main(command(tmp_path / "none", tmp_path / "out")) == 1
    assert "no such data folder; make it with `python -m celo2.pretrain.prepare_data" in capsys.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in data.glob("*.bin"):
        (broken / path.name).write_bytes(path.read_bytes()[:-2])
    assert main(command(broken, tmp_path / "out")) == 1
    assert "truncated: the header says" in capsys.readouterr().err


def test_bad_numbers_of_the_command_line(capsys) -> None:
    for option in ("--save-every", "--eval-every", "--log-every", "--micro-batch", "--max-skips"):
        with pytest.raises(SystemExit):
            main([option, "0"])
        assert f"{option} 0: must be at least 1" in capsys.readouterr().err


def test_dry_run_of_gpt3_xl_prints_everything_and_leaves_nothing(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--size", "xl", "--opt", "celo2", "--bias", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "parameters: 1,315,723,264 (" in text and "blocks.*.mlp.up.weight x24" in text
    assert "48 x [128, 2048]" in text
    assert "1,048,576 tokens: 8 sequences of 2048, 64 micro-batches" in text
    # 16 bytes a parameter of the hidden matrices, 8 of the rest, and the factor vectors
    assert "4.902 GiB parameters" in text and re.search(r"(18|19)\.\d+ GiB optimizer state", text)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_plans_for_many_gpus(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["--size", "xl", "--opt", "celo2", "--dry-run", "--world-size", "8"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "plan:       xl (gpt2), celo2, 8 x H100 SXM, fsdp, 8 ranks" in text
    assert re.search(r"celo2: all-reduce +2 ", text) and re.search(r"celo2: all-to-all +2 ", text)
    assert main([*command, "--gpu", "abacus"]) == 1
    assert "--gpu abacus" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--world-size", "8"])
    assert "give --dry-run with it" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_recipe_brings_its_architecture(tmp_path, data, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    nano = ["--size", "nano", "--opt", "muon", "--recipe", "speedrun-124m-muon", "--dry-run", *command(data, tmp_path)]
    for arch, flags in (("speedrun", []), ("gpt2", ["--arch", "gpt2"])):
        assert main([*nano, *flags]) == 0
        assert f"nano, {arch}: 4 layers" in capsys.readouterr().out
    planned = ["--size", "small", "--opt", "celo2", "--recipe", "gpt2-124m-2.5b-celo2", "--dry-run", "--world-size"]
    assert main([*planned, "8"]) == 0
    assert "small (modern), celo2" in capsys.readouterr().out


def test_state_of_the_run_is_json(tmp_path, data) -> None:
    assert main(command(data, tmp_path, "--steps", "1")) == 0
    done = json.loads((tmp_path / "step-00000001" / "DONE").read_text())
    assert done["identity"]["recipe"]["tokens"] == 512 and done["identity"]["model"]["head_dim"] == 32
