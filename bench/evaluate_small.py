"""Every evaluation of the Celo2 paper at a size for two CPU cores, and the page `docs/evaluations.md` from its records.

    make evaluate-small
    python bench/evaluate_small.py --only page  # the page again

Sweeps go on where they were stopped (`celo2.pretrain.sweep`); their records and figures are copied to
`docs/evaluations/`. The page names, for each figure and table of the paper, the command at full size with its predicted
GPU hours, the command at this size, and what came out, good or bad.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from celo2 import VeLO
from celo2.files import write_atomic
from celo2.pretrain.device import PEAK_FLOPS, device_name
from celo2.pretrain.intervals import mean
from celo2.pretrain.model import GPT, model_config
from celo2.pretrain.recipes import recipe_for
from celo2.pretrain.runlog import METRICS, duration, iterate_metrics, versions
from celo2.pretrain.sweep import Sweep, parse_arguments
from celo2.pretrain.sweep_report import RECORDS, Findings, comparison_rows
from celo2.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path("runs/evaluations")
PAGE = Path("docs/evaluations.md")
GOLDEN = ROOT / "tests" / "golden"
VELO_FILES = ("velo_small", "velo_losses_rise_and_huge_gradients")
# of the difference of a parameter from the authors' code at any step, float32
VELO_TOLERANCE = 5e-7
ATARI_STEPS = 100_000
# part of a GPU's peak that training reaches: assumed
MFU = {"30m": 0.25, "small": 0.40, "xl": 0.45, "vit": 0.30}
FIGURES = ("lr.png", "curves.png", "parallel.png")


@dataclass(frozen=True)
class Evaluation:
    """A sweep of this page: its arguments, and what is said of it."""

    name: str
    title: str
    arguments: str
    """Of `celo2.pretrain.sweep`, without --out and --title."""
    about: str

    @property
    def command(self) -> list[str]:
        return ["--out", str(RUNS / self.name), "--title", self.title, *shlex.split(self.arguments)]


EVALUATIONS = (
    Evaluation(
        "language",
        "A byte-level GPT on Wikipedia",
        '--reference adamw --grid "opt=celo2 lr=3e-4..1e-2:7 adam-lr-mult=5,20 seed=0" '
        '--grid "opt=adamw lr=3e-4..3e-2:7 beta2=0.95,0.99 seed=0" '
        '--grid "opt=muon lr=2e-3..2e-1:7 momentum=0.9,0.95 seed=0" --best "seed=1,2,3" '
        "-- --size nano --steps 80 --batch-tokens 2048 --val-tokens 16384 --eval-every 20 --sample-tokens 0 "
        "--save-every 1000",
        "The harness's `nano` model, 0.85M parameters, 80 steps of 2,048 bytes; seven learning rates (Fig. 5) and a "
        "second option for each optimizer, as many runs each (Fig. 6). So short a run rewards little momentum: "
        "it tests the path and the learning rate's sensitivity, and says nothing of a long one.",
    ),
    Evaluation(
        "vision",
        "A small ViT on Fashion-MNIST",
        '--reference adamw --grid "opt=celo2 lr=2e-4..2e-2:7 seed=0" --grid "opt=adamw lr=2e-4..2e-2:7 seed=0" '
        '--grid "opt=muon lr=1e-3..1e-1:7 seed=0" --best "seed=1,2,3" -- bench/vision.py --steps 200',
        "`vit_nano_patch2_8` of timm's blocks on the embedded images of 8 x 8 pixels, 200 steps of 128; loss of the "
        "held-out tenth. A test of the path, not of the paper's claim on ImageNet.",
    ),
    Evaluation(
        "reinforcement-learning",
        "PPO on MinAtar Breakout",
        '--metric return --maximize --reference adamw --grid "opt=celo2 lr=1e-4..1e-2:5 seed=0" '
        '--grid "opt=adamw lr=1e-3..1e-1:5 seed=0" --grid "opt=muon lr=3e-3..3e-1:5 seed=0" --best "seed=1,2,3" '
        "-- bench/ppo.py --game MinAtar/Breakout-v1 --steps 100000 --log-every 10",
        "100,000 steps of MinAtar's Breakout, mean return over the last 100 games; five rates each, three other seeds "
        "at the best.",
    ),
    Evaluation(
        "ablations",
        "Ablations",
        '--by row --reference base --grid "row=base,hidden-4,hidden-16,no-augmentation '
        'lr=1.5e-4..5e-3:4 seed=0" --grid "row=newton-schulz,adamw lr=3e-4..1e-2:4 seed=0" '
        '--grid "row=no-output-rms lr=3e-4..1e-1:4 seed=0" --best "seed=1,2,3" -- bench/ablation.py --steps 100',
        "A GPT of 0.46M parameters, 100 steps of 1,024 bytes; thetas meta-trained for 1,000 outer steps of "
        "`celo2-base-short`, one seed, 1% of the paper's run (`bench/ablation.py --help` has the rows). `base` to "
        "`newton-schulz` to `adamw` are Fig. 4, with one theta; the others change the meta-training.",
    ),
)


def velo_difference(name: str) -> float:
    """The largest difference of a parameter at any step from the golden file of the authors' code."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    names = sorted(key.removeprefix("param0/") for key in arrays if key.startswith("param0/"))
    parameters = {key: torch.nn.Parameter(torch.from_numpy(arrays[f"param0/{key}"].copy())) for key in names}
    optimizer = VeLO(parameters.items(), int(arrays["num_steps"]), weights=GOLDEN / f"{name}.theta.state")
    largest = 0.0
    for step, loss in enumerate(arrays["loss"]):
        for key, parameter in parameters.items():
            parameter.grad = torch.from_numpy(np.array(arrays[f"grad/{key}"][step]))
        optimizer.step(loss=float(loss))
        for key, parameter in parameters.items():
            found = np.abs(parameter.detach().numpy().astype(np.float64) - arrays[f"param/{key}"][step])
            largest = max(largest, float(np.max(found)))
    return largest


def run_sweep(evaluation: Evaluation) -> None:
    """Run what is missing of a sweep; raises ValueError when it ends with an error."""
    command = [sys.executable, "-m", "celo2.pretrain.sweep", *evaluation.command]
    status = subprocess.run(command, check=False).returncode
    if status:
        raise ValueError(f"the sweep {evaluation.name} ended with status {status}: the same command goes on with it")


def atari_folder() -> Path:
    return RUNS / "space-invaders"


def start_atari() -> subprocess.Popen[bytes] | None:
    """Start a short run of the real Atari path, unless it has ended before; it takes minutes of one core."""
    if any(record["kind"] == "final" for record in iterate_metrics(atari_folder() / METRICS)):
        return None
    flags = ["--game", "ALE/SpaceInvaders-v5", "--opt", "celo2", "--steps", str(ATARI_STEPS)]
    flags += ["--random-episodes", "24", "--resume", "auto", "--out-dir", str(atari_folder())]
    atari_folder().mkdir(parents=True, exist_ok=True)
    with open(atari_folder() / "output.txt", "ab") as output:
        return subprocess.Popen([sys.executable, "bench/ppo.py", *flags, "--threads", "1"], stdout=output)


# the page


def _hours(flops: float, kind: str) -> float:
    """Predicted hours on an H100 at the assumed part of its peak."""
    peak = dict(PEAK_FLOPS)["H100"]
    return flops / (peak * MFU[kind]) / 3600


def language_hours(size: str, tokens: float) -> float:
    with torch.device("meta"):
        model = GPT(model_config(size, "modern", bias=False))
    return _hours(model.flops_per_token() * tokens, size)


def vit_hours(steps: int, batch: int) -> float:
    # ViT-S/16 at 224: 4.6 G multiply-adds an image forward (Dosovitskiy et al. 2020), three times that with backward
    return _hours(3 * 2 * 4.6e9 * steps * batch, "vit")


def paper_rows(found: dict[str, Findings], velo: dict[str, float], atari: dict[str, Any] | None) -> list[list[str]]:
    """A row for each figure and table of the paper: full size, predicted hours, this size, result."""

    def result(name: str) -> str:
        findings = found[name]
        methods = [m for m in findings.methods if m.values]
        order = sorted(methods, key=lambda m: mean(list(m.values.values())).value, reverse=findings.metric.maximize)
        return "; ".join(f"{m.name} {mean(list(m.values.values())):.3f}" for m in order) or "not run"

    small = {e.name: f"`{e.name}` of `make evaluate-small`" for e in EVALUATIONS}
    gpt2, xl = language_hours("small", 2.47e9), language_hours("xl", 10e9)
    lm30 = language_hours("30m", recipe_for("30m", "celo2").tokens)
    vit = vit_hours(50_000, 512)
    sweep = "`python -m celo2.pretrain.sweep --out OUT "
    seven = '--grid "opt=celo2 lr=1e-5..1e-3:7 weight-decay=0,0.1,10"'
    games = "Asterix, Freeway, SpaceInvaders"
    largest = max(velo.values(), default=float("nan"))
    reached = "-" if atari is None else f"SpaceInvaders, {atari['step']:,} steps: return {atari['return']:.0f} +- "
    reached += "" if atari is None else f"{atari['return_se']:.0f} (random {atari['random_return']:.0f})"
    return [
        [
            "LM-30M; Tab. 1, 2; Fig. 5, 6",
            f"{sweep}{seven} -- --size 30m --data data/fineweb-edu`",
            f"{lm30:.1f} a run, {21 * lm30:.0f} for 21",
            small["language"],
            result("language"),
        ],
        [
            "GPT-2, 2.5B tokens; Fig. 7",
            f"{sweep}{seven} -- --size small --arch modern --steps 4712 --batch-tokens 524288 "
            "--data data/fineweb-edu`",
            f"{gpt2:.1f} a run, {21 * gpt2:.0f} for 21",
            small["language"],
            "as above",
        ],
        [
            "GPT-3 XL, 10B tokens",
            "`torchrun --nproc-per-node 8 pretrain/train_gpt.py --size xl --opt celo2 --data data/fineweb-edu`",
            f"{xl:.0f} a run",
            "`python pretrain/train_gpt.py --size xl --opt celo2 --dry-run --world-size 8`",
            "planned, not run",
        ],
        [
            "ImageNet ViT; Fig. 2 (norms)",
            f'{sweep}--grid "opt=celo2 lr=1e-5..1e-3:7" -- bench/vision.py --data IMAGENET '
            "--model vit_small_patch16_224`",
            f"{vit:.1f} a run, {7 * vit:.0f} for 7, if the loader keeps up",
            small["vision"],
            result("vision"),
        ],
        [
            f"Atari; Fig. 3 ({games})",
            f'{sweep}--metric return --maximize --grid "game=ALE/Asterix-v5,ALE/Freeway-v5,ALE/SpaceInvaders-v5 '
            'opt=celo2,adamw seed=1,2,3" --by game,opt -- bench/ppo.py`',
            "about 1 a run: the games take 4,000 to 8,000 steps a second",
            small["reinforcement-learning"],
            f"{result('reinforcement-learning')}; {reached}",
        ],
        [
            "Fig. 4; Tab. 1 (ablations)",
            "`python -m celo2.meta.train --recipe celo2-base --ablate NAME`, then the first row with its theta",
            "4.5 a theta (the paper's figure)",
            small["ablations"],
            result("ablations"),
        ],
        [
            "VeLO, everywhere",
            "`--opt velo --weights amoudgl/velo-4000` in the rows above; no rate to sweep",
            "a run of the row",
            "golden files of the authors' code",
            f"largest difference {largest:.1e} (at most {VELO_TOLERANCE:.0e}); its published weights are not in this "
            "repository, so no run of it is here",
        ],
    ]  # fmt: skip


def random_policy(findings: Findings) -> list[str]:
    """Whether each method's return is above the random policy's by more than three standard errors, as lines."""
    lines = []
    for method in findings.methods:
        for run in method.compared:
            numbers = run.record["metrics"]
            if "random_return" not in numbers:
                continue
            error = float(np.hypot(numbers["return_se"], numbers["random_se"]))
            above = (numbers["return"] - numbers["random_return"]) / error
            lines.append(
                [method.name, run.seed, f"{numbers['return']:.2f} +- {numbers['return_se']:.2f}",
                 f"{numbers['random_return']:.2f} +- {numbers['random_se']:.2f}", f"{above:.0f}"]
            )  # fmt: skip
    header = ("optimizer", "seed", "last 100 games, and standard error", "random policy", "standard errors apart")
    return markdown_table(header, lines) if lines else []


def write_page(velo: dict[str, float]) -> None:
    """Write the page from the records there are, and copy records and figures beside it."""
    folder = PAGE.with_suffix("")
    found: dict[str, Findings] = {}
    seconds: dict[str, float] = {}
    for evaluation in EVALUATIONS:
        found[evaluation.name] = findings = Sweep(parse_arguments(evaluation.command)).findings()
        seconds[evaluation.name] = sum(run.record["seconds"] for run in findings.all)
        target = folder / evaluation.name
        target.mkdir(parents=True, exist_ok=True)
        for name in FIGURES:
            if (source := RUNS / evaluation.name / name).is_file():
                shutil.copyfile(source, target / name)
        lines = [json.dumps({key: run.record[key] for key in ("settings", "status", "metrics", "seconds")
                             } | {"reason": run.record.get("reason")}) + "\n" for run in findings.all]  # fmt: skip
        write_atomic(target / RECORDS, [line.encode() for line in lines])
    atari = next((r for r in iterate_metrics(atari_folder() / METRICS) if r["kind"] == "final"), None)
    about = ", ".join(f"{name} {version}" for name, version in versions().items() if name != "git")
    lines = [
        "# The paper's evaluations",
        "",
        "Written by `make evaluate-small` (`bench/evaluate_small.py`), nothing by hand; its records are in "
        "`docs/evaluations/`.",
        f"Made on {device_name(torch.device('cpu')).split(',')[0]}, {os.cpu_count()} cores, with {about}.",
        "",
        "GPU hours are predicted, not measured: FLOPs over the bfloat16 peak of an H100 at an assumed utilisation "
        f"({', '.join(f'{key} {value:.0%}' for key, value in MFU.items())}). Settings that the paper does not give "
        "are chosen by us: batch sizes, seeds, the grids of the baselines, the ViT's size and augmentation, PPO's "
        "numbers (CleanRL's). 'Here' is the small version on a CPU: it tests the path, not the paper's claims.",
        "",
        'A comparison needs its baselines in the same sweep, with as many runs each: `--grid "opt=adamw '
        'lr=1e-4..1e-2:7 beta2=0.95,0.99 weight-decay=0.1" --grid "opt=muon lr=2e-3..2e-1:7 momentum=0.9,0.95 '
        'adam-lr=1e-3" --best "seed=1,2,3"`; hours are of the grid that is shown, on one GPU.',
        "",
        *markdown_table(
            ("of the paper", "at full size", "GPU hours", "here", "result"), paper_rows(found, velo, atari)
        ),
    ]
    for evaluation in EVALUATIONS:
        findings = found[evaluation.name]
        lines += [f"## {evaluation.title}", "", evaluation.about, "", "```", _shown(evaluation), "```", ""]
        if findings.reference is not None:
            lines += markdown_table(*comparison_rows(findings))
        lines += random_policy(findings)
        for name in FIGURES:
            if (folder / evaluation.name / name).is_file():
                lines += [f"![{name.removesuffix('.png')}]({folder.name}/{evaluation.name}/{name})", ""]
        failed = [run for run in findings.all if run.record["status"] == "failed"]
        lines += [f"- failed: {run.point}: {run.record['reason']}" for run in failed] + [""] * bool(failed)
        lines += [f"{len(findings.all)} runs, {duration(seconds[evaluation.name])} on one core each.", ""]
    lines += ["## VeLO", "", "Largest difference of a parameter at any step from the authors' code, float32:", ""]
    lines += markdown_table(
        ("file", "difference", "allowed"), [(k, f"{v:.1e}", f"{VELO_TOLERANCE:.0e}") for k, v in velo.items()]
    )
    write_atomic(PAGE, ["\n".join(lines).encode()])


def _shown(evaluation: Evaluation) -> str:
    return f"python -m celo2.pretrain.sweep --out {RUNS / evaluation.name} {evaluation.arguments}"


def evaluate(arguments: argparse.Namespace) -> int:
    wanted = arguments.only or [*(evaluation.name for evaluation in EVALUATIONS), "velo", "space-invaders", "page"]
    started = time.monotonic()
    velo = {name: velo_difference(name) for name in VELO_FILES}
    for name, difference in velo.items():
        print(f"velo: {name}: largest difference {difference:.1e}", flush=True)
        if difference > VELO_TOLERANCE:
            raise ValueError(f"VeLO differs from {name} by {difference:.1e}, more than {VELO_TOLERANCE:.0e}")
    atari = start_atari() if "space-invaders" in wanted else None
    if atari is not None:
        print(f"PPO on Atari's SpaceInvaders, {ATARI_STEPS:,} steps, beside what follows: {atari_folder()}/output.txt")
    try:
        for evaluation in EVALUATIONS:
            if evaluation.name in wanted:
                print(f"\n{evaluation.title}", flush=True)
                run_sweep(evaluation)
        if atari is not None and (status := atari.wait()):
            raise ValueError(f"PPO on SpaceInvaders ended with status {status}: {atari_folder()}/output.txt has more")
    finally:
        if atari is not None and atari.poll() is None:
            # it saves, and the same command goes on
            atari.terminate()
            atari.wait()
    if "page" in wanted:
        write_page(velo)
        print(f"\n-> {PAGE}, after {duration(time.monotonic() - started)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a mistake in it, or a part that fails, is one line on standard error and exit status 1."""
    parser = argparse.ArgumentParser(
        description="The Celo2 paper's evaluations at a size for two CPU cores; writes docs/evaluations.md."
    )
    names = [evaluation.name for evaluation in EVALUATIONS]
    parser.add_argument(
        "--only", action="append", choices=[*names, "velo", "space-invaders", "page"], help="a part (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="print the commands, and stop")
    arguments = parser.parse_args(argv)
    if arguments.list:
        for evaluation in EVALUATIONS:
            print(_shown(evaluation))
        return 0
    os.chdir(ROOT)
    try:
        return evaluate(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
