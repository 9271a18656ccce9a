"""Choose the theta of a meta-training run: train a small language model with its checkpoints, keep the best.

    python -m celo2.meta.select runs/meta/celo2-short --out celo2/weights/celo2.safetensors

The lowest meta-loss does not predict a language model's loss (the authors' finding too), so the checkpoints compete on
a model, a split and a seed of their own: what `celo2.meta.evaluate` tests on stays unseen. Scores go to
`selection.jsonl` in the run's folder, and a command that is run again goes on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from celo2.meta.language_model import SELECTION, Method, Text, selection_shards, train_once
from celo2.meta.train import THETA
from celo2.pretrain import options
from celo2.pretrain.failures import require_compiler
from celo2.pretrain.prepare_data import prepare_embedded
from celo2.pretrain.terminal import unfailing_streams
from celo2.theta import Theta

SEED = 7
LEARNING_RATES = {"celo2": (1e-3, 2e-3, 4e-3), "celo2-base": (2.5e-4, 5e-4, 1e-3)}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Choose a theta by a small language model.")
    parser.add_argument("run", type=options.path, help="folder of a finished meta-training run")
    parser.add_argument(
        "--out", type=options.path, help="where the chosen theta goes (default: RUN/selected.safetensors)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        metavar="N",
        help="outer steps of the checkpoints that compete (default: last 4)",
    )
    parser.add_argument(
        "--train-steps",
        type=options.whole_number(1),
        default=SELECTION.steps,
        metavar="N",
        help=f"steps of the language model that each trains (default: {SELECTION.steps})",
    )
    parser.add_argument("--no-compile", action="store_true", help="train it eagerly, several times slower")
    parser.add_argument(
        "--threads", type=options.threads, default=torch.get_num_threads(), metavar="N", help="CPU threads"
    )
    return parser.parse_args(argv)


def select(arguments: argparse.Namespace) -> int:
    final = Theta.load(arguments.run / THETA)
    compiled = not arguments.no_compile
    if compiled:
        require_compiler(torch.device("cpu"), "give --no-compile")
    paths = sorted(arguments.run.glob("theta-*.safetensors"))[-4:]
    if not paths:
        raise ValueError(f"{arguments.run} has no theta-*.safetensors, which celo2.meta.train writes at --save-every")
    if arguments.steps is not None:
        paths = [arguments.run / f"theta-{step:07d}.safetensors" for step in arguments.steps]
    settings = replace(SELECTION, steps=arguments.train_steps)
    torch.set_num_threads(arguments.threads)
    text = Text(
        selection_shards(prepare_embedded("bytes", Path("data/wikipedia-bytes")), Path("data/selection")), settings
    )
    scores = arguments.run / "selection.jsonl"
    records: list[dict[str, Any]] = []
    if scores.is_file():
        records = [json.loads(line) for line in scores.read_text().splitlines()]
    # a score counts for a theta, not for a file's name, and on this data in this setting
    context = {"settings": asdict(settings), "data": text.fingerprint}
    records = [record for record in records if {key: record.get(key) for key in context} == context]
    known = {(record["theta"], record["tuned"]["lr"]) for record in records}
    files: dict[str, Path] = {}
    for path in paths:
        # of a checkpoint's theta the run's card says how it is used
        theta = Theta.from_arrays(Theta.load(path).arrays, dict(final.card))
        files[theta.sha256] = path
        for lr in LEARNING_RATES[final.variant]:
            if (theta.sha256, lr) in known:
                continue
            method = Method(path.stem, final.variant, theta)
            record = train_once(method, {"lr": lr}, SEED, settings, text, compiled=compiled) | context
            records.append(record)
            with scores.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{path.name} lr {lr:.3g} | validation {record['final']:.4f} | {record['seconds']:.0f} s", flush=True)
    records = [record for record in records if record["theta"] in files]
    best = min(records, key=lambda record: record["final"])
    checkpoint = files[best["theta"]]
    chosen = Theta.load(checkpoint)
    step = int(checkpoint.stem.split("-")[1])
    card = dict(final.card)
    card["inner_steps"] = str(int(card["inner_steps"]) // int(card["outer_steps"]) * step)
    card |= {
        "outer_steps": f"{step} of {card['outer_steps']}",
        "selection": f"{best['final']:.4f} nats/byte at lr {best['tuned']['lr']:.3g}, {settings.steps} steps of a "
        f"{best['parameters']:,}-parameter GPT, best of {len(records)} runs",
    }
    out = arguments.out or arguments.run / "selected.safetensors"
    theta = Theta.from_arrays(chosen.arrays, card)
    theta.save(out)
    print(f"{checkpoint.name} at lr {best['tuned']['lr']:.3g}: {best['final']:.4f} -> {out} ({theta.label})")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for a user's mistake."""
    arguments = parse_arguments(argv)
    try:
        with unfailing_streams():
            return select(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
