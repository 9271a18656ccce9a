"""`bench/vision.py` as a process: its records, exact resume, signals, norms, folders of images, every refusal."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from celo2.pretrain.runlog import METRICS, read_metrics

pytestmark = pytest.mark.needs("timm", "torchvision")

SCRIPT = Path(__file__).parents[2] / "bench" / "vision.py"
SMALL = ["--batch", "16", "--log-every", "4", "--eval-every", "100", "--threads", "1"]
# the program finds its siblings beside it
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    options = {"env": ENVIRONMENT, "timeout": 120} | options
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def trained(out: Path, *arguments: object) -> str:
    """What a run that ends well prints."""
    done = run(*arguments, "--out-dir", out)
    assert done.returncode == 0, done.stderr
    return done.stdout


def records(out: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(out / METRICS) if record["kind"] == kind]


def numbers(out: Path) -> list[tuple[object, ...]]:
    """What must not depend on interruptions: every loss, norm, rate and accuracy, to the last bit."""
    timed = {"step_ms", "optimizer_ms", "images_per_s"}
    kinds = ("train", "val", "norms")
    return [
        tuple(value for key, value in record.items() if key not in timed)
        for record in read_metrics(out / METRICS)
        if record["kind"] in kinds
    ]


def saved(out: Path, step: int) -> dict[str, Any]:
    """The tensors of a checkpoint."""
    file = out / f"{step}.pt"
    dcp_to_torch_save(out / f"step-{step:08d}", file)
    return torch.load(file)


def same(one: Any, two: Any) -> bool:
    """Whether two nested dictionaries hold the same tensors, to the bit."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return torch.equal(one, two) if torch.is_tensor(one) else one == two


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps of two micro-batches, its middle saved as well."""
    out = tmp_path_factory.mktemp("whole") / "run"
    printed = trained(out, *SMALL, "--steps", 8, "--micro-batch", 8, "--save-every", 4)
    (out / "printed.txt").write_text(printed)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ImageNet: three classes, images of noise."""
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for name in ("ant", "bee", "cat"):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{index}.png")
    return root


# a whole run


def test_a_run_prints_and_leaves_what_it_promises(whole: Path) -> None:
    printed = (whole / "printed.txt").read_text()
    for text in (
        "a test of the path, not of the paper's claim",
        "parameters: 202,186 (196,608 by celo2, 5,578 by adamw)",
        "16 images: 1 x 2 x 8",
        "12 x [16, 64]",
        "4 x [64, 16]",
        "step 4/8 | loss ",
        "step 8/8 | validation loss ",
    ):
        assert text in printed, text
    kinds = [(record["kind"], record["step"]) for record in read_metrics(whole / METRICS)]
    assert kinds[:3] == [("run", 0), ("norms", 0), ("val", 0)] and kinds[-2:] == [("val", 8), ("final", 8)]
    assert [step for kind, step in kinds if kind == "train"] == list(range(1, 9))
    assert [step for kind, step in kinds if kind == "norms"] == [0, 4, 8]
    for record in records(whole, "train"):
        assert {"step", "loss", "lr", "grad_norm", "step_ms"} <= set(record) and not record["skipped"]
    # before the first step a classifier of ten classes knows nothing
    first, last = records(whole, "val")
    assert first["loss"] == pytest.approx(math.log(10), abs=0.1) and first["accuracy"] < 0.2
    (final,) = records(whole, "final")
    assert (final["loss"], final["accuracy"]) == (last["loss"], last["accuracy"]) and final["train_seconds"] > 0


def test_the_norms_are_those_of_the_weights(whole: Path) -> None:
    weights = {name: value.double() for name, value in saved(whole, 8)["model"].items()}
    matrices = [value for name, value in weights.items() if name.startswith("blocks.") and value.ndim == 2]
    tables = [weights[name] for name in ("pos_embed", "patch_embed.proj.weight", "head.weight")]
    assert len(matrices) == 16

    def norm(tensors: list[torch.Tensor]) -> float:
        return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))

    last = records(whole, "norms")[-1]
    everything = norm(list(weights.values()))
    assert last["all"] == pytest.approx(everything, rel=1e-5)
    assert last["matrices"] == pytest.approx(norm(matrices), rel=1e-5)
    assert last["embeddings_head"] == pytest.approx(norm(tables), rel=1e-5)
    rest = everything**2 - norm(matrices) ** 2 - norm(tables) ** 2
    assert last["vectors"] == pytest.approx(math.sqrt(rest), rel=1e-5)


def test_it_learns(tmp_path: Path) -> None:
    trained(tmp_path / "run", "--steps", 50, "--batch", 64, "--eval-every", 100, "--threads", 1)
    first, last = records(tmp_path / "run", "val")
    assert last["loss"] < first["loss"] - 0.25 and last["accuracy"] > 2 * first["accuracy"], (first, last)


# interruptions


def test_it_goes_on_to_the_bit_where_a_kill_left_it(tmp_path: Path, whole: Path) -> None:
    arguments = [*SMALL, "--steps", 8, "--micro-batch", 8, "--save-every", 4, "--resume", "auto"]
    out = tmp_path / "run"
    out.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments), "--out-dir", str(out)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
    )
    wait_for(lambda: (out / "step-00000004" / "DONE").exists(), process)
    process.kill()
    process.wait()
    assert "resumed at step 4 of 8" in trained(out, *arguments)
    assert numbers(out) == numbers(whole)
    assert same(saved(out, 8), saved(whole, 8))


def wait_for(seen: Any, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if seen():
            return
        time.sleep(0.002)
    pytest.fail(f"the run ended too early, with {process.poll()}")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_save_and_stop_and_a_hangup_goes_on(
    tmp_path: Path, folder: Path, number: signal.Signals, status: int
) -> None:
    # with workers, of whose own handlers nothing may be seen
    arguments = ["--data", folder, "--model", "vit_nano_patch2_8", "--image-size", 8, "--steps", 100_000, "--batch", 4]
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments), "--workers", "1", "--threads", "1", "--out-dir", str(out)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: records(out, "train")[2:], process)
    if number == signal.SIGTERM:
        os.killpg(process.pid, signal.SIGHUP)
        wait_for(lambda: list(out.glob("step-*/DONE")), process)
    os.killpg(process.pid, number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    last = records(out, "train")[-1]["step"]
    assert f"{number.name}: step {last} of 100000 is saved in {out}; go on with --resume auto" in printed
    assert (out / f"step-{last:08d}" / "DONE").exists()
    assert ("SIGHUP: step " in printed) == (number == signal.SIGTERM)
    told = "SIGINT: saves and stops after this step; a second one leaves at once\n"
    assert errors == (told if number == signal.SIGINT else "")


def test_steps_that_are_not_finite_are_skipped_and_end_the_run(tmp_path: Path) -> None:
    done = run(*SMALL, "--opt", "adamw", "--lr", 1e30, "--steps", 30, "--out-dir", tmp_path / "run")
    assert done.returncode == 1 and done.stderr.startswith(
        "error: 20 steps in a row had a loss or gradient that is not"
    )
    skipped = [record["skipped"] for record in records(tmp_path / "run", "train")]
    assert skipped[-20:] == [True] * 20 and not skipped[0]
    assert all(value.isfinite().all() for value in saved(tmp_path / "run", len(skipped))["model"].values())


# images from a folder


def test_a_folder_of_images_trains_and_goes_on_to_the_bit(tmp_path: Path, folder: Path) -> None:
    arguments = ["--data", folder, "--model", "test_resnet", "--image-size", 32, "--batch", 4, "--steps", 3]
    arguments += ["--log-every", 1, "--threads", 1, "--reprob", 0.5, "--cutmix", 1.0, "--save-every", 2]
    out = tmp_path / "run"
    printed = trained(out, *arguments, "--workers", 0)
    assert "3 classes" in printed and "18 to train on, 0.67 epochs; 9 held out" in printed
    assert "policy rand-m10-n2" in printed and "mixup 0.2, cutmix 1, smoothing 0" in printed
    before, tensors = numbers(out), saved(out, 3)
    # running means are part of the network
    assert any("running_mean" in name for name in tensors["buffers"])
    shutil.rmtree(out / "step-00000003")
    # the same images and draws by two workers
    assert "resumed at step 2 of 3" in trained(out, *arguments, "--workers", 2, "--resume", "auto")
    assert numbers(out) == before and same(saved(out, 3), tensors)


def test_mistakes_are_a_line(tmp_path: Path, folder: Path, whole: Path) -> None:
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "val").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train").symlink_to(folder / "train")
    (tmp_path / "other" / "val" / "dog").mkdir(parents=True)
    (tmp_path / "other" / "val" / "dog" / "0.png").symlink_to(folder / "val" / "ant" / "0.png")
    program = """
import contextlib, io, json, sys
sys.path.insert(0, sys.argv[1])
import vision
found = []
for arguments in json.loads(sys.argv[2]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        found.append([vision.main(arguments), errors.getvalue()])
print(json.dumps(found))
"""
    tiny = ["--data", str(folder), "--model", "vit_tiny_patch16_224", "--image-size", "32", "--workers", "0"]
    expected = {
        ("--data", str(tmp_path / "none")): "none: no such folder; give one with train/ and val/",
        ("--data", str(folder / "train")): "has no folder train/",
        ("--data", str(tmp_path / "empty")): "train/ has no images in folders of classes",
        ("--data", str(tmp_path / "other")): "3 classes to train on and 1 to validate on",
        ("--model", "vit_smal_patch16_224"): "did you mean vit_small_patch16_224",
        ("--model", "vit_tiny_patch16_224"): "is not made for 8 x 8 pixels, 1 channels",
        ("--data", str(folder), "--small"): "--small has images of its own",
        ("--reprob", "0.5"): "--reprob belongs to --data",
        (*tiny, "--reprob", "2"): "--reprob 2.0: must be within 0..1",
        (*tiny, "--aa", "nonsense"): "--aa nonsense: timm knows no such policy",
        ("--smoothing", "1"): "--smoothing 1.0: must be within [0, 1)",
        ("--mixup", "1", "--batch", "3"): "mixup and cutmix take pairs",
        ("--batch", "8", "--micro-batch", "3"): "--micro-batch 3 does not divide a rank's 8 images",
        ("--lr", "0"): "lr=0.0 must be finite and > 0",
        ("--opt", "adamw", "--weights", "celo2"): "has no weights",
        ("--out-dir", str(SCRIPT)): "is a file: give a folder",
        (*SMALL, "--steps", "8", "--out-dir", str(whole)): "holds a run: go on with --resume auto, or give another",
        (*SMALL, "--steps", "8", "--out-dir", str(whole), "--resume", "auto", "--lr", "0.5"): (
            "tuning.lr is 0.001 there and 0.5 here"
        ),
    }
    command = [sys.executable, "-c", program, str(SCRIPT.parent), json.dumps(list(expected))]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for (arguments, text), (status, errors) in zip(expected.items(), json.loads(done.stdout), strict=True):
        assert status == 1 and errors.startswith("error: ") and errors.count("\n") == 1, (arguments, errors)
        assert text in errors, (arguments, errors)


def test_a_timm_that_does_not_load_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("import a_package_that_is_not_here\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run("--out-dir", tmp_path / "run", env=ENVIRONMENT | {"PYTHONPATH": path})
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "a_package_that_is_not_here" in done.stderr and done.stderr.endswith("pip install 'celo2[vision]'\n")


# several processes


@pytest.mark.dist
def test_two_processes_take_the_steps_of_one(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    command += [*SMALL, "--steps", "8", "--out-dir", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "2 ranks by ddp" in done.stdout and "16 images: 2 x 1 x 8" in done.stdout
    for kind, key in (
        ("train", "loss"),
        ("train", "grad_norm"),
        ("val", "loss"),
        ("val", "accuracy"),
        ("norms", "all"),
    ):
        found, alone = ([record[key] for record in records(folder, kind)] for folder in (out, whole))
        assert found == pytest.approx(alone, rel=2e-3), (kind, key)
