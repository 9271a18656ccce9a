"""The Celo2 paper's ablations at a size for a CPU: a small language model trained with one piece of the method changed.

    python bench/ablation.py --row no-output-rms --lr 1e-3
    python -m celo2.pretrain.sweep --by row --grid "row=base,hidden-4 lr=1e-4..1e-2:5" --out runs/ablations \
        -- bench/ablation.py

Rows of Fig. 4: `base`, then Newton-Schulz on the matrices, then AdamW for vectors and embeddings, all with one theta.
Rows of the tables: thetas that were meta-trained alike but for one change (`celo2.meta.train --ablate NAME`), applied
alike. The thetas are in `bench/ablations`, 1,000 outer steps of the recipe celo2-base-short each, from the same seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from celo2 import MatrixView, Theta, load_weights
from celo2.meta.language_model import SELECTION, Method, Text, train_once
from celo2.pretrain import options, require
from celo2.pretrain.device import device_name
from celo2.pretrain.folder_lock import locked
from celo2.pretrain.model import GPT
from celo2.pretrain.optimizers import Optimizers
from celo2.pretrain.parallel import World
from celo2.pretrain.prepare_data import prepare_embedded
from celo2.pretrain.recipes import Recipe
from celo2.pretrain.runlog import METRICS, RunLog, has_records, versions
from celo2.pretrain.terminal import unfailing_streams
from celo2.reference import (
    NORM_EPS,
    MatrixState,
    VectorState,
    matrix_columns,
    mlp,
    vector_columns,
)

THETAS = Path(__file__).resolve().parent / "ablations"
# by row: the theta, the optimizer, Newton-Schulz, and what the row is
ROWS = {
    "base": ("full", "celo2-base", "off", "the rule on everything, 8 hidden units"),
    "newton-schulz": ("full", "celo2-base", "on", "base, and Newton-Schulz on the matrices"),
    "adamw": ("full", "celo2", "on", "newton-schulz, and AdamW for vectors and embeddings: Celo2"),
    "hidden-4": ("hidden-4", "celo2-base", "off", "base with 4 hidden units"),
    "hidden-16": ("hidden-16", "celo2-base", "off", "base with 16 hidden units"),
    "no-output-rms": ("no-output-rms", "celo2-base", "off", "base without the RMS of the update"),
    "no-augmentation": ("no-augmentation", "celo2-base", "off", "base, meta-trained at one scale of the weights"),
}
SETTINGS = dataclasses.replace(SELECTION, steps=150, eval_every=25)


def _normalised(columns: Tensor, dims: tuple[int, ...]) -> Tensor:
    return columns * torch.rsqrt(columns.square().mean(dims, keepdim=True) + NORM_EPS)


class PlainRule(torch.optim.Optimizer):
    """The rule of celo2-base as `celo2.reference` has it, with or without the RMS of its update.

    `named` are (name, parameter) pairs; `views` the matrices that parameters split into, by name.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        theta: Theta,
        views: dict[str, MatrixView],
        rms: bool,
    ) -> None:
        super().__init__(named, {"lr": lr})
        self.theta = theta.tensors(torch.float32, torch.device("cpu"))
        self.views, self.rms = views, rms

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                p, g, dims = parameter.detach(), parameter.grad, (-1,)
                assert g is not None
                state: dict[str, Any] = self.state[parameter]
                if parameter.ndim >= 2:
                    view = self.views.get(name, MatrixView())
                    p, g, dims = view.matrices(p), view.matrices(g), (-2, -1)
                    old = state.get("rule") or MatrixState.zeros_like(p)
                    columns, state["rule"] = matrix_columns(p, g, old)
                else:
                    columns, state["rule"] = vector_columns(p, g, state.get("rule") or VectorState.zeros_like(p))
                direction = mlp(self.theta, _normalised(columns, tuple(axis - 1 for axis in dims)))
                p.sub_(group["lr"] * (_normalised(direction, dims) if self.rms else direction))


def build(row: str, recipe: Recipe, model: GPT, *, plain: bool = False) -> Optimizers:
    """The optimizers of a row; `plain` takes the plain rule for celo2-base also where the update has its RMS."""
    theta, opt, newton_schulz, _ = ROWS[row]
    weights = load_weights(THETAS / f"{theta}.safetensors")
    recipe = dataclasses.replace(recipe, newton_schulz=newton_schulz)
    optimizers = Optimizers(opt, recipe, model, weights)
    if row == "no-output-rms" or plain:
        rule = PlainRule(model.named_parameters(), recipe.lr, weights, model.matrix_views(), rms=row != "no-output-rms")
        rule.param_groups[0]["initial_lr"] = recipe.lr
        optimizers.members = [rule]
    return optimizers


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    rows = "\n".join(f"  {name:<16} {row[-1]}" for name, row in ROWS.items())
    parser = argparse.ArgumentParser(
        description="Train a small language model with one piece of Celo2 changed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"rows:\n{rows}",
    )
    parser.add_argument("--row", choices=ROWS, default="base", help="what is changed (default: base)")
    parser.add_argument("--lr", type=float, default=5e-4, help="peak learning rate (default: 0.0005)")
    parser.add_argument("--seed", type=options.seed, default=0, help="weights and data order (default: 0)")
    parser.add_argument(
        "--steps", type=options.whole_number(1), default=SETTINGS.steps, metavar="N", help="(default: 150)"
    )
    parser.add_argument("--out-dir", type=options.path, metavar="DIR", help="(default: runs/ablation-ROW)")
    parser.add_argument("--resume", choices=("auto", "never"), default="never", help="auto: begin again where it ended")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.lr < float("inf"):
        parser.error(f"--lr {arguments.lr}: must be finite and > 0")
    return arguments


def run(arguments: argparse.Namespace, held: ExitStack) -> int:
    require("regex", "tiktoken")
    out_dir: Path = arguments.out_dir or Path("runs") / f"ablation-{arguments.row}"
    held.enter_context(locked(out_dir, World(0, 1, 0, 1, torch.device("cpu"))))
    if arguments.resume == "never" and has_records(out_dir / METRICS):
        raise ValueError(f"{out_dir} holds a run: give another --out-dir, or begin again with --resume auto")
    theta, opt, _, what = ROWS[arguments.row]
    settings = dataclasses.replace(SETTINGS, steps=arguments.steps)
    torch.set_flush_denormal(True)
    weights = load_weights(THETAS / f"{theta}.safetensors")
    print(f"row:       {arguments.row}: {what}")
    print(f"theta:     {weights.label}, {weights.num_parameters} floats, {weights.card.get('recipe')}")
    print(f"model:     {settings.model()}, {settings.steps} steps of {settings.sequences} x {settings.context} bytes")
    log = RunLog(out_dir, resume_step=None, run_id="ablation", config={})
    log.write("run", step=0, row=arguments.row, theta=weights.label, device=device_name(torch.device("cpu")),
              versions=versions(), arguments={"lr": arguments.lr, "seed": arguments.seed})  # fmt: skip
    text = Text(prepare_embedded("bytes", Path("data/wikipedia-bytes")), settings)
    started = time.perf_counter()

    def make(recipe: Recipe, model: GPT) -> Optimizers:
        return build(arguments.row, recipe, model)

    method, tuned = Method(arguments.row, opt), {"lr": arguments.lr}
    record = train_once(method, tuned, arguments.seed, settings, text, compiled=False, build=make)
    for step, loss in record["curve"]:
        log.write("val", step=step, loss=loss)
    log.write("final", step=settings.steps, loss=record["final"], skipped=record["skipped"],
              train_seconds=time.perf_counter() - started)  # fmt: skip
    log.close()
    print(f"validation loss: {record['final']:.4f} nats a byte after {settings.steps} steps, lr {arguments.lr:g}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a mistake in it is one line on standard error and exit status 1."""
    arguments = parse_arguments(argv)
    try:
        with unfailing_streams(), ExitStack() as held:
            return run(arguments, held)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing is saved of a run this short", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
