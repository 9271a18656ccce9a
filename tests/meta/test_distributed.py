"""Two ranks as a program: a signal to one stops both at one step, and one rank goes on from their checkpoint."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from celo2.meta.images import load_image_sets
from celo2.meta.outer_trainer import CURVE, OuterTrainer

# rank 1 sends itself a signal after the third outer step
PROGRAM = """
import os, signal, sys
from dataclasses import replace
from celo2.meta import train
fields = dict(particles=2, window=5, length_range=(8, 16), initial_iterations=16, outer_steps=8, outer_warmup=2)
small = replace(train.get_recipe("celo2-elo"), **fields)
train.get_recipe = lambda name: small
real = train.OuterTrainer.step
def step(trainer):
    figures = real(trainer)
    if trainer.rank == 1 and trainer.outer_step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return figures
train.OuterTrainer.step = step
sys.exit(train.main(sys.argv[1:]))
"""


def curve(folder):
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


@pytest.mark.needs("matplotlib", "tqdm", "skimage")
def test_a_signal_to_one_of_two_ranks_stops_both_and_one_rank_goes_on(tmp_path, image_sets, small_recipe):
    # one task over both ranks: the scale of its imitation is a sum over ranks
    image_sets = image_sets[:1]
    arrays = {f"{s.name}_images": (s.images.reshape(-1, 8, 8) * 65535).astype(np.uint16) for s in image_sets}
    np.savez(tmp_path / "images.npz", **arrays, **{f"{s.name}_labels": s.labels for s in image_sets})
    (tmp_path / "run.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "run.py"), "--data", str(tmp_path / "images.npz"), "--no-compile"]
    command += ["--device", "cpu", "--resume", "auto", "--out-dir"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        options = {"env": os.environ | place, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen([*command, str(tmp_path / "two")], **options))
    outputs = [process.communicate(timeout=120) for process in ranks]
    # rank 0 got no signal: it stops because rank 1 did
    assert ranks[0].returncode in (0, 143) and ranks[1].returncode == 143, outputs
    assert "2 rank(s)" in outputs[0][0] and "stopped at outer step 3" in outputs[0][0] and outputs[1][0] == ""
    assert [line["outer_step"] for line in curve(tmp_path / "two")] == [1, 2, 3]
    recipe = small_recipe("celo2-elo", outer_steps=8)
    runs = [OuterTrainer(recipe, load_image_sets(str(tmp_path / "images.npz")), compiled=False) for _ in range(2)]
    assert runs[0].resume(tmp_path / "two") == tmp_path / "two" / "checkpoint-0000003.safetensors"
    for run in runs:
        while run.outer_step < 8:
            run.step()
    two, one = ([dict(zip(CURVE, row, strict=True)) for row in run.curve] for run in runs)
    for ours, theirs in zip(two, one, strict=True):
        # ranks add the same float64 numbers in another order; theta rounds the sum to float32
        for key, tolerance in {"meta_loss": 1e-4, "imitation": 1e-4, "gradient_norm": 1e-3, "horizon": 1e-12}.items():
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance), key


def test_figures_count_every_particle(image_sets, small_recipe):
    trainer = OuterTrainer(small_recipe(inner_clip_norm=None, length_range=(30, 40)), image_sets, compiled=False)
    # one sign of one particle diverges for a whole window: five losses
    trainer.truncated_step.iteration[:], trainer.truncated_step.length[:] = [0, 1, 2, 3], 30
    trainer.truncated_step.state["hidden_weight"][2] = float("nan")
    figures = trainer.step()
    assert figures["non_finite"] == 5 and figures["horizon"] == np.mean([5, 6, 7, 8])
    assert trainer.curve[0, 5] == 5 and np.isfinite(trainer.curve).all()
    assert np.isfinite(trainer._parameter.detach().numpy()).all()


FAKE = """
import sys
import numpy as np
import torch.distributed as dist
from celo2.meta.images import load_image_sets
from celo2.meta.outer_trainer import OuterTrainer
from celo2.meta.recipes import get_recipe
from dataclasses import replace
rank = int(sys.argv[1])
store = dist.FileStore(sys.argv[2], 2)
# as NCCL's group on GPUs: it does not add up what lies on the host
dist.init_process_group("fake", rank=rank, world_size=2, store=store)
group = dist.new_group(backend="gloo")
fields = dict(particles=2, window=5, length_range=(8, 16), initial_iterations=16, outer_steps=8, outer_warmup=2)
recipe = replace(get_recipe("celo2-elo"), **fields)
trainer = OuterTrainer(recipe, load_image_sets(sys.argv[3])[:1], compiled=False, group=group)
for _ in range(2):
    trainer.step()
from pathlib import Path
trainer.save(Path(sys.argv[4]))
"""


def test_sums_of_ranks_go_over_the_group_of_the_host(tmp_path, image_sets, small_recipe):
    image_sets = image_sets[:1]
    arrays = {f"{s.name}_images": (s.images.reshape(-1, 8, 8) * 65535).astype(np.uint16) for s in image_sets}
    np.savez(tmp_path / "images.npz", **arrays, **{f"{s.name}_labels": s.labels for s in image_sets})
    (tmp_path / "run.py").write_text(FAKE)
    command = [sys.executable, str(tmp_path / "run.py")]
    rest = [str(tmp_path / "store"), str(tmp_path / "images.npz"), str(tmp_path)]
    ranks = [subprocess.Popen([*command, rank, *rest], stderr=subprocess.PIPE, text=True) for rank in "01"]
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    recipe = small_recipe("celo2-elo", outer_steps=8)
    two, one = (OuterTrainer(recipe, load_image_sets(str(tmp_path / "images.npz")), compiled=False) for _ in range(2))
    assert two.resume(tmp_path) is not None
    for _ in range(2):
        one.step()
    np.testing.assert_allclose(two.curve, one.curve, rtol=1e-3)
