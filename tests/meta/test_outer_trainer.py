"""The outer loop: AdamW on theta, durability, and the same gradient on any number of ranks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from celo2.meta.learned_rule import flatten
from celo2.meta.outer_trainer import CURVE, OuterTrainer, initial_theta
from celo2.reference import MatrixState, matrix_update
from celo2.theta import Theta


def trainer(recipe, image_sets, seed=0):
    return OuterTrainer(recipe, image_sets, seed=seed, compiled=False)


def everything(run):
    return (
        run.truncated_step.state_dict()
        | run.estimator.state_dict()
        | {
            "theta": flatten(run.theta),
            "curve": run.curve,
            **{f"adamw/{k}": v.numpy() for k, v in run._adamw.state[run._parameter].items()},
        }
    )


def assert_equal(one, two):
    first, second = everything(one), everything(two)
    assert first.keys() == second.keys() and one.outer_step == two.outer_step
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_theta_starts_as_the_paper_says():
    theta = initial_theta(0)
    first = np.concatenate([initial_theta(seed).arrays["w0__3"].ravel() for seed in range(100)])
    assert theta.num_parameters == 347 and first.std() * np.sqrt(30) == pytest.approx(0.88, rel=0.03)
    assert theta.arrays["w1"].std() * np.sqrt(8) == pytest.approx(0.88, rel=0.3)
    assert not any(theta.arrays[name].any() for name in ("b0", "b1", "b2"))
    assert initial_theta(0) == theta != initial_theta(1)


@pytest.mark.parametrize("variant", ["celo2", "celo2-base"])
def test_theta_says_how_it_is_used(image_sets, small_recipe, tmp_path, variant):
    run = trainer(small_recipe(variant=variant), image_sets)
    run.save(tmp_path)
    for theta in (run.theta, Theta.load(tmp_path / "theta-0000000.safetensors")):
        assert theta.variant == variant and theta.orthogonalize == (variant == "celo2")


@pytest.mark.parametrize("start", ["muon", "adam"])
def test_theta_may_start_at_an_expert(start):
    arrays = initial_theta(0, start).tensors(torch.float64, torch.device("cpu"))
    assert initial_theta(0, start) != initial_theta(1, start)
    p = torch.randn(32, 64, dtype=torch.float64)
    state, m, v = MatrixState.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)
    for _ in range(60):
        g = torch.randn_like(p)
        update, state = matrix_update(arrays, p, g, state, orthogonalize=False)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
    expert = (0.9 * m + 0.1 * g) / (1.0 if start == "muon" else (v + 1e-8).sqrt())
    cosine = (update * expert).sum() / update.norm() / expert.norm()
    assert 0.99 < cosine < 0.99999  # the random rest is there, and small


def test_outer_step_is_adamw(image_sets, small_recipe):
    run, shadow = (trainer(small_recipe(outer_clip_norm=None), image_sets) for _ in range(2))
    m = v = np.zeros(347)
    theta = flatten(run.theta).astype(np.float64)
    for t in range(1, 4):
        gradient, _ = shadow.gradient()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        lr = run.recipe.lr(t - 1)
        theta = theta - lr * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + 1e-4 * theta)
        figures = run.step()
        assert figures["lr"] == lr and figures["gradient_norm"] == pytest.approx(np.linalg.norm(gradient))
        np.testing.assert_allclose(flatten(run.theta), theta, rtol=2e-5, atol=1e-6)
        shadow.outer_step += 1
        shadow._parameter.data.copy_(torch.from_numpy(flatten(run.theta)))


def test_outer_clip_scales_the_gradient(image_sets, small_recipe):
    run = trainer(small_recipe(outer_clip_norm=1e-3), image_sets)
    figures = run.step()
    moment = run._adamw.state[run._parameter]["exp_avg"].numpy()
    assert figures["gradient_norm"] > 1e-3 and np.linalg.norm(moment) == pytest.approx(1e-4, rel=1e-4)


EXPERT = {"expert": "muon", "direction_weight": 0.5, "direction_floor": 0.5, "resume_probability": 0.6}
DRAWN = EXPERT | {"batch_range": (0.1, 1.0), "inner_lr_range": (0.5, 2.0)}
# with images alone, and with a transformer beside them
RESUMABLE = [("image_sets", {}), ("image_sets", EXPERT), ("mixed_sets", DRAWN)]


@pytest.mark.parametrize(("sets", "changes"), RESUMABLE)
def test_resume_in_the_middle_of_a_window_equals_no_interruption(request, small_recipe, tmp_path, sets, changes):
    recipe, data_sets = small_recipe(**changes), request.getfixturevalue(sets)
    whole, cut = trainer(recipe, data_sets), trainer(recipe, data_sets)
    for _ in range(7):
        whole.step()
    for _ in range(4):
        cut.step()
    cut.save(tmp_path)
    cut.step()
    # the sixth outer step dies at its third slot
    step = cut.truncated_step
    optimizer = step.optimizer if sets == "image_sets" else step.steps[-1].optimizer
    real, calls = optimizer.step, []

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    optimizer.step = dies
    with pytest.raises(KeyboardInterrupt):
        cut.step()
    again = trainer(recipe, data_sets)
    assert again.resume(tmp_path) == tmp_path / "checkpoint-0000004.safetensors"
    for _ in range(3):
        again.step()
    assert_equal(again, whole)
    assert whole.curve.shape == (7, len(CURVE))


def test_damaged_checkpoints(image_sets, small_recipe, tmp_path):
    run = trainer(small_recipe(), image_sets)
    assert run.resume(tmp_path) is None
    for _ in range(3):
        run.step()
        run.save(tmp_path)
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-0000002.safetensors", "checkpoint-0000003.safetensors"]
    assert len(list(tmp_path.glob("theta-*"))) == 3
    newest = tmp_path / kept[1]
    whole = newest.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"{}"):
        newest.write_bytes(damaged)
        again = trainer(small_recipe(), image_sets)
        with pytest.warns(UserWarning, match="skipped: .*checkpoint-0000003.safetensors is not a readable checkpoint"):
            assert again.resume(tmp_path) == tmp_path / kept[0]
        assert again.outer_step == 2
    (tmp_path / kept[0]).write_bytes(b"x")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"no checkpoint in .* is readable \(2 damaged\)"):
        trainer(small_recipe(), image_sets).resume(tmp_path)


def test_a_checkpoint_of_another_run_is_refused(image_sets, small_recipe, tmp_path):
    run = trainer(small_recipe(), image_sets)
    run.step()
    run.save(tmp_path)
    others = {
        "outer_lr": trainer(small_recipe(outer_lr=1e-4), image_sets),
        "seed": trainer(small_recipe(), image_sets, seed=1),
        "data": trainer(small_recipe(), image_sets[::-1]),
    }
    for name, other in others.items():
        before = flatten(other.theta)
        with pytest.raises(ValueError, match=f"belongs to another run: {name} differ"):
            other.resume(tmp_path)
        np.testing.assert_array_equal(flatten(other.theta), before)


def test_a_run_may_start_from_a_theta(image_sets, small_recipe, random_theta, tmp_path):
    theta = random_theta()
    run = OuterTrainer(small_recipe(), image_sets, compiled=False, start=theta)
    assert run.theta == theta
    run.step()
    assert run.theta != theta
    path = run.save(tmp_path)
    again = OuterTrainer(small_recipe(), image_sets, compiled=False, start=theta)
    again.load(path)
    assert again.theta == run.theta
    for start in (None, random_theta(1)):
        with pytest.raises(ValueError, match="belongs to another run: start differ"):
            OuterTrainer(small_recipe(), image_sets, compiled=False, start=start).load(path)
    with pytest.raises(ValueError, match="hidden units, the recipe 8"):
        OuterTrainer(small_recipe(), image_sets, compiled=False, start=random_theta(hidden=5))


def test_a_full_disk_leaves_the_last_checkpoint(image_sets, small_recipe, tmp_path, monkeypatch):
    run = trainer(small_recipe(), image_sets)
    run.step()
    run.save(tmp_path)
    saved = trainer(small_recipe(), image_sets)
    saved.resume(tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    run.step()
    with monkeypatch.context() as patch:
        patch.setattr("celo2.files.os.fsync", full)
        with pytest.raises(OSError, match="cannot write .*checkpoint-0000002.safetensors: No space left"):
            run.save(tmp_path)
    again = trainer(small_recipe(), image_sets)
    again.resume(tmp_path)
    assert_equal(again, saved)
    assert not [path for path in os.listdir(tmp_path) if path.endswith(".tmp")]


RANK = """
import json, os, sys
from pathlib import Path
import numpy as np, torch, torch.distributed as dist
torch.set_num_threads(1)
from dataclasses import replace
from celo2.meta.images import ImageSet
from celo2.meta.outer_trainer import OuterTrainer
from celo2.meta.recipes import get_recipe
from celo2.meta.transformer import ByteWindows
folder = Path(sys.argv[1])
if int(sys.argv[2]) > 1:
    dist.init_process_group("gloo")
arrays = np.load(folder / "sets.npz")
sets = [ImageSet(f"stripes{i}", arrays[f"images{i}"], arrays[f"labels{i}"]) for i in range(2)]
sets += [ByteWindows("counting", arrays["windows"])] if "windows" in arrays else []
fields = json.loads((folder / "recipe.json").read_text())
fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
trainer = OuterTrainer(replace(get_recipe("celo2-short"), **fields), sets, compiled=False)
for _ in range(5):
    trainer.step()
trainer.save(folder)
gradient, figures = trainer.gradient()
if trainer.rank == 0:
    np.savez(folder / f"gradient{sys.argv[2]}.npz", gradient=gradient, loss=figures["meta_loss"])
if dist.is_initialized():
    dist.barrier()
    # gloo's threads may abort when they are torn down
    sys.stdout.flush()
    os._exit(0)
"""


def run_ranks(folder: Path, ranks: int) -> None:
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(folder / "rank.py"), str(folder), str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("sets", "changes"), RESUMABLE)
def test_one_and_two_ranks_give_the_same_gradient(request, image_sets, small_recipe, tmp_path, sets, changes):
    arrays = {f"images{i}": s.images for i, s in enumerate(image_sets)}
    arrays |= {f"labels{i}": s.labels for i, s in enumerate(image_sets)}
    data_sets = request.getfixturevalue(sets)
    if len(data_sets) > 2:
        arrays["windows"] = data_sets[2].windows
    recipe = small_recipe(**changes)
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        np.savez(folder / "sets.npz", **arrays)
        (folder / "recipe.json").write_text(json.dumps(recipe.identity))
        (folder / "rank.py").write_text(RANK)
        run_ranks(folder, ranks)
    one, two = (np.load(tmp_path / str(ranks) / f"gradient{ranks}.npz") for ranks in (1, 2))
    # sums of float64 in another order; the trajectories themselves agree to the bit
    np.testing.assert_allclose(two["gradient"], one["gradient"], rtol=1e-6, atol=1e-9 * np.abs(one["gradient"]).max())
    assert two["loss"] == pytest.approx(float(one["loss"]), rel=1e-12)
    # a run of two ranks goes on with one
    alone, continued = trainer(recipe, data_sets), trainer(recipe, data_sets)
    alone.resume(tmp_path / "1")
    continued.resume(tmp_path / "2")
    for _ in range(2):
        a, b = alone.step(), continued.step()
        assert b["meta_loss"] == pytest.approx(a["meta_loss"], rel=1e-5)


def test_particles_must_divide_over_the_ranks(image_sets, small_recipe, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="4 particles do not split over 3 ranks"):
        trainer(small_recipe(), image_sets)
