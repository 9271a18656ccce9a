"""Checkpoints: exact, whole or not counted, never at the cost of an older one."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from celo2.pretrain import checkpoint as checkpoint_module
from celo2.pretrain.checkpoint import DONE, Checkpoints, RunState
from celo2.pretrain.model import GPT, GPTConfig
from celo2.pretrain.optimizers import Optimizers
from celo2.pretrain.recipes import OPTS, Tuning, recipe_for

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG = GPTConfig("gpt2", n_layer=2, n_head=2, head_dim=8, context=16, vocab_size=31)
IDENTITY = {"model": dataclasses.asdict(CONFIG), "seed": 1}


def build(opt: str = "celo2", seed: int = 0) -> tuple[GPT, Optimizers]:
    model = GPT(CONFIG)
    model.init_weights(seed)
    weights = str(GOLDEN / "velo_small.theta.state") if opt == "velo" else None
    return model, Optimizers(opt, recipe_for("nano", opt), model, weights, num_steps=10)


def steps(model: GPT, optimizers: Optimizers, numbers: range) -> list[float]:
    losses = []
    for number in numbers:
        optimizers.set_lr(1 / (1 + number))
        tokens_BT = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(number))
        optimizers.zero_grad()
        loss = model(tokens_BT[:, :-1], tokens_BT[:, 1:])
        loss.backward()
        optimizers.step(loss.detach())
        losses.append(loss.item())
    return losses


def state_at(step: int, **changes: object) -> RunState:
    return dataclasses.replace(RunState(step, 0, "run", IDENTITY), **changes)


@pytest.mark.parametrize("opt", OPTS)
def test_a_loaded_run_continues_to_the_bit(tmp_path, opt: str) -> None:
    model, optimizers = build(opt)
    steps(model, optimizers, range(3))
    torch.rand(5)
    Checkpoints(tmp_path).save(model, optimizers, state_at(3, skipped=2))
    draws = torch.rand(5)
    other, others = build(opt, seed=9)
    state, notes = Checkpoints(tmp_path).load(other, others, IDENTITY)
    assert (state, notes) == (state_at(3, skipped=2), [])
    assert torch.equal(torch.rand(5), draws)
    assert steps(model, optimizers, range(3, 7)) == steps(other, others, range(3, 7))
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_an_empty_folder_has_none(tmp_path) -> None:
    assert Checkpoints(tmp_path / "none").load(*build(), IDENTITY) == (None, [])
    assert Checkpoints(tmp_path).latest() is None


@pytest.mark.parametrize("opt", OPTS)
def test_a_checkpoint_before_the_first_step(tmp_path, opt: str) -> None:
    model, optimizers = build(opt)
    Checkpoints(tmp_path).save(model, optimizers, state_at(0))
    other, others = build(opt, seed=9)
    assert Checkpoints(tmp_path).load(other, others, IDENTITY) == (state_at(0), [])
    assert steps(model, optimizers, range(3)) == steps(other, others, range(3))


def test_keeps_the_newest_and_every_nth(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4)
    model, optimizers = build()
    for step in range(1, 8):
        checkpoints.save(model, optimizers, state_at(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (4, 6, 7)]
    assert checkpoints.latest() == state_at(7)
    for bad in ({"keep": 0}, {"keep_every": 0}):
        with pytest.raises(ValueError, match="keep at least one"):
            Checkpoints(tmp_path, **bad)


def damage(path: Path, how: str) -> None:
    data = next(path.glob("*.distcp"))
    done = path / DONE
    if how == "no DONE":
        done.unlink()
    elif how == "DONE cut":
        done.write_bytes(done.read_bytes()[:50])
    elif how == "data cut":
        data.write_bytes(data.read_bytes()[:-100])
    elif how == "data missing":
        data.unlink()
    elif how == "bit flipped":
        raw = bytearray(data.read_bytes())
        raw[len(raw) // 2] ^= 4
        data.write_bytes(raw)
    elif how == "metadata foreign":
        size = (path / ".metadata").stat().st_size
        (path / ".metadata").write_bytes(b"x" * size)


@pytest.mark.parametrize(
    ("how", "note"),
    [
        ("no DONE", "it has no DONE file: it is incomplete"),
        ("bit flipped", "__0_0.distcp is damaged: its checksum differs"),
        ("DONE cut", "its DONE file is damaged"),
        ("data cut", "bytes instead of"),
        ("data missing", "is missing"),
        ("metadata foreign", ".metadata is damaged: its checksum differs"),
    ],
)
def test_an_unusable_checkpoint_is_passed_over_and_named(tmp_path, how: str, note: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    model, optimizers = build()
    for step in (1, 2):
        steps(model, optimizers, range(step, step + 1))
        checkpoints.save(model, optimizers, state_at(step))
        if step == 1:
            expected = [p.detach().clone() for p in model.parameters()]
    damage(tmp_path / "step-00000002", how)
    other, others = build(seed=9)
    state, notes = checkpoints.load(other, others, IDENTITY)
    assert state == state_at(1)
    assert len(notes) == 1 and "step-00000002" in notes[0] and note in notes[0]
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), expected, strict=True))
    # saved again where the unusable one stands
    checkpoints.save(model, optimizers, state_at(2))
    assert checkpoints.load(other, others, IDENTITY) == (state_at(2), [])
    assert len(list(tmp_path.glob("step-00000002.*.bad"))) == 1


def test_checkpoints_of_which_none_is_usable_are_not_forgotten(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(*build(), state_at(1))
    damage(tmp_path / "step-00000001", "data cut")
    with pytest.raises(ValueError, match="has 1 checkpoints and none is usable: step-00000001 .*; move them away"):
        checkpoints.load(*build(), IDENTITY)


@pytest.mark.parametrize("opt", OPTS)
def test_a_checkpoint_from_before_the_padding_is_refused(tmp_path, monkeypatch, opt: str) -> None:
    monkeypatch.setattr(sys.modules[__name__], "CONFIG", dataclasses.replace(CONFIG, vocab_size=383))
    with monkeypatch.context() as before:
        before.setattr(GPTConfig, "padded_vocab_size", property(lambda config: config.vocab_size))
        model, optimizers = build(opt)
        steps(model, optimizers, range(1))
        Checkpoints(tmp_path).save(model, optimizers, state_at(1))
    other, others = build(opt, seed=9)
    expected = [parameter.detach().clone() for parameter in other.parameters()]
    with pytest.raises(ValueError, match=r"before the vocabulary was padded: .*383.*384.*; give another --out-dir"):
        Checkpoints(tmp_path).load(other, others, IDENTITY)
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), expected, strict=True))


def test_a_disk_that_does_not_read_is_no_damage(tmp_path, monkeypatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(*build(), state_at(step))

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint_module, "load_distributed", broken)
    with pytest.raises(OSError, match="step-00000002 is whole but cannot be read: OSError: .* Input/output error"):
        checkpoints.load(*build(), IDENTITY)


def test_another_run_is_refused_with_what_differs(tmp_path) -> None:
    Checkpoints(tmp_path).save(*build(), state_at(1))
    with pytest.raises(
        ValueError, match=r"step-00000001 is a checkpoint of another run: seed is 1 there and 2 here; give"
    ):
        Checkpoints(tmp_path).load(*build(), {**IDENTITY, "seed": 2})
    state, notes = Checkpoints(tmp_path).load(*build(), {**IDENTITY, "seed": 2}, may_differ=("seed",))
    assert state == state_at(1) and notes == ["seed is 1 there and 2 here: the run goes on, no longer to the bit"]
    nested = {**IDENTITY, "model": {**IDENTITY["model"], "n_layer": 3}}
    with pytest.raises(ValueError, match=r"another run: model\.n_layer is 2 there and 3 here; give"):
        Checkpoints(tmp_path).load(*build(), nested)


SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_checkpoint import *
"""

FULL_DISK = """
import resource
model, optimizers = build()
checkpoints = Checkpoints(Path(sys.argv[1]))
checkpoints.save(model, optimizers, state_at(1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    checkpoints.save(model, optimizers, state_at(2))
except OSError as error:
    print(error)
"""

# a process for each flush, forked from one that has imported everything
KILLED = """
def save_twice(folder, number):
    model, optimizers = build()
    checkpoints = Checkpoints(folder)
    checkpoints.save(model, optimizers, state_at(1))
    real, calls = os.fsync, []
    def fsync(handle):
        calls.append(handle)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(handle)
    os.fsync = fsync
    checkpoints.save(model, optimizers, state_at(2))
    os._exit(len(calls))

def status(number):
    child = os.fork()
    if child == 0:
        try:
            save_twice(Path(sys.argv[1]) / str(number), number)
        finally:
            os._exit(100)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

flushes = status(0)
assert all(status(number) == -signal.SIGKILL for number in range(1, flushes + 1))
print(flushes)
"""


def run_script(code: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", SCRIPT + code, str(folder), here, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("limit", [0, 4096, 60_000])
def test_a_full_disk_loses_nothing(tmp_path, limit: int) -> None:
    done = run_script(FULL_DISK, tmp_path, limit)
    assert done.returncode == 0, done.stderr
    assert "cannot save the checkpoint" in done.stdout and "File too large" in done.stdout
    assert "free space or choose another --out-dir" in done.stdout
    assert "last complete checkpoint is step-00000001" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert Checkpoints(tmp_path).load(*build(), IDENTITY) == (state_at(1), [])


def test_killed_at_any_flush_leaves_a_usable_checkpoint(tmp_path) -> None:
    done = run_script(KILLED, tmp_path)
    assert done.returncode == 0, done.stderr
    flushes = int(done.stdout)
    assert 4 <= flushes < 100
    for number in range(1, flushes + 1):
        folder = tmp_path / str(number)
        checkpoints = Checkpoints(folder)
        checkpoints.remove_temporary()
        state, _ = checkpoints.load(*build(), IDENTITY)
        # the last flush comes after the rename
        assert state == state_at(2 if number == flushes else 1)
        assert not list(folder.glob(".*"))


def test_errors_of_a_rank_are_told_in_one_line(tmp_path, monkeypatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_distributed", broken)
    with pytest.raises(OSError, match="No space left on device; free space") as caught:
        Checkpoints(tmp_path).save(*build(), state_at(1))
    assert "\n" not in str(caught.value) and "(the last complete checkpoint is none)" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_done_is_readable_json(tmp_path) -> None:
    path = Checkpoints(tmp_path).save(*build(), state_at(5))
    done = json.loads((path / DONE).read_text())
    assert done["step"] == 5 and done["run_id"] == "run" and set(done["files"]) == {".metadata", "__0_0.distcp"}


def test_the_background_writes_what_was_there_when_it_was_asked(tmp_path, monkeypatch) -> None:
    model, optimizers = build()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    go_on, real = threading.Event(), checkpoint_module.save_distributed

    def late(*arguments, **options):
        assert go_on.wait(60)
        return real(*arguments, **options)

    monkeypatch.setattr(checkpoint_module, "save_distributed", late)
    checkpoints = Checkpoints(tmp_path, background=True)
    checkpoints.save(model, optimizers, state_at(1))
    # the training goes on while nothing is written yet
    assert checkpoints.latest() is None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
        for member in optimizers.members:
            for state in member.state.values():
                for value in state.values():
                    value.add_(1.0)
    go_on.set()
    checkpoints.wait()
    other, others = build()
    assert Checkpoints(tmp_path).load(other, others, IDENTITY) == (state_at(1), [])
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), before, strict=True))
    assert all(not value.any() for m in others.members for state in m.state.values() for value in state.values())


def test_running_means_are_part_of_a_checkpoint(tmp_path) -> None:
    def network() -> tuple[torch.nn.Module, Optimizers]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
        return model, Optimizers("adamw", Tuning(lr=1e-3), model)

    model, optimizers = network()
    model(torch.randn(8, 4))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(model, optimizers, RunState(1, 0, "run", {}))
    other, others = network()
    assert not torch.equal(other[1].running_mean, model[1].running_mean)
    checkpoints.load(other, others, {})
    for name, buffer in model.named_buffers():
        assert torch.equal(other.get_buffer(name), buffer), name
