"""The proof: how far the bundled thetas stay stable, and how they train a language model beside tuned baselines.

    python -m celo2.meta.evaluate                # everything, then docs/results.md
    python -m celo2.meta.evaluate --only report  # the page again, from the records

Every run is one line of JSON under `docs/results/`; a run whose line is there is not repeated, so the command continues
where it was stopped. A line belongs to a theta's hash and to the settings: another theta or setting runs anew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from celo2.meta import horizon, report
from celo2.meta.images import load_image_sets
from celo2.meta.language_model import Method, Settings, Text, log_spaced, train_once
from celo2.pretrain import options
from celo2.pretrain.device import device_name
from celo2.pretrain.prepare_data import prepare_embedded
from celo2.pretrain.runlog import versions
from celo2.pretrain.terminal import unfailing_streams
from celo2.theta import load_weights

Record = dict[str, Any]
# one sweep of seven rates a method, log-spaced around its own known range
METHODS = (
    Method("celo2", "celo2", log_spaced(3e-4, 1e-2), "celo2"),
    Method("celo2-base", "celo2-base", log_spaced(5e-5, 5e-3), "celo2-base"),
    Method("adamw", "adamw", log_spaced(3e-4, 3e-2)),
    Method("muon", "muon", log_spaced(2e-3, 2e-1)),
    Method("momentum", "celo2", log_spaced(3e-4, 1e-2), "momentum"),
    Method("adam", "celo2-base", log_spaced(5e-5, 5e-3), "adam"),
)
SWEEP_SEED = 0
SEEDS = (1, 2, 3)
BUNDLED = ("celo2", "celo2-base")
PARTS = ("horizon", "language-model", "report")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate the bundled thetas; writes docs/results.md.")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part of it (default: all three)")
    parser.add_argument(
        "--out", type=options.path, default=Path("docs/results.md"), help="the page (default: docs/results.md)"
    )
    parser.add_argument("--data", type=options.path, metavar="DIR", help="byte shards (default: the embedded text)")
    parser.add_argument(
        "--images", type=options.given, default="embedded", metavar="SOURCE", help="as celo2.meta.train --data"
    )
    parser.add_argument("--horizon-steps", type=int, default=horizon.STEPS, metavar="N", help="inner steps")
    parser.add_argument("--steps", type=int, default=Settings().steps, metavar="N", help="language-model steps")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="runs at once, a thread each")
    return parser.parse_args(argv)


def read_records(path: Path) -> list[Record]:
    """Return the records of a file of JSON lines; a last line that was cut off is dropped from the file too."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]))
        lines = lines[:-1]
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} holds a line that is not JSON ({error}): repair or remove it") from error


def append(path: Path, record: Record) -> None:
    """Append one record as a line that is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _start_worker() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _train(method: Method, lr: float, seed: int, settings: Settings, folder: Path) -> Record:
    return train_once(method, lr, seed, settings, Text(folder, settings))


class LanguageModels:
    """The runs of the comparison: what is recorded, and what is still to do."""

    def __init__(self, path: Path, settings: Settings, folder: Path) -> None:
        self.path, self.settings, self.folder = path, settings, folder
        self.context = {"settings": asdict(settings), "data": Text(folder, settings).fingerprint}
        self.thetas = {m.name: load_weights(m.weights).sha256 if m.weights else None for m in METHODS}
        self.records = [r for r in read_records(path) if self._current(r)]

    def _current(self, record: Record) -> bool:
        mine = record["method"] in self.thetas and record["theta"] == self.thetas[record["method"]]
        return mine and {key: record[key] for key in self.context} == self.context

    def sweep(self, method: Method) -> list[Record]:
        """Return the recorded runs of a method's sweep, by learning rate."""
        runs = [r for r in self.records if r["method"] == method.name and r["seed"] == SWEEP_SEED]
        return sorted((r for r in runs if r["lr"] in method.learning_rates), key=lambda r: float(r["lr"]))

    def best_lr(self, method: Method) -> float | None:
        """Return the learning rate with the lowest final loss; None while the sweep is not complete."""
        runs = self.sweep(method)
        if len(runs) < len(method.learning_rates):
            return None
        return float(min(runs, key=lambda r: float(r["final"]))["lr"])

    def finals(self, method: Method) -> list[Record]:
        """Return the recorded runs of a method at its best learning rate, over the three seeds."""
        lr = self.best_lr(method)
        runs = [r for r in self.records if r["method"] == method.name and r["lr"] == lr and r["seed"] in SEEDS]
        return sorted(runs, key=lambda r: int(r["seed"]))

    def _missing(self) -> Iterator[tuple[Method, float, int]]:
        done = {(r["method"], r["lr"], r["seed"]) for r in self.records}
        for method in METHODS:
            best = self.best_lr(method)
            wanted: Iterable[tuple[float, int]] = ((lr, SWEEP_SEED) for lr in method.learning_rates)
            if best is not None:
                wanted = ((best, seed) for seed in SEEDS)
            yield from ((method, lr, seed) for lr, seed in wanted if (method.name, lr, seed) not in done)

    def run(self, workers: int) -> None:
        """Run what is missing, `workers` at once; first the sweeps, then the seeds at each best rate."""
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker) as pool:
            while missing := list(self._missing()):
                futures = [pool.submit(_train, *run, self.settings, self.folder) for run in missing]
                for future in as_completed(futures):
                    record = future.result() | self.context
                    append(self.path, record)
                    self.records.append(record)
                    print(
                        f"{record['method']:<10} lr {record['lr']:<8.3g} seed {record['seed']} | validation "
                        f"{record['final']:.4f} | {record['seconds']:.0f} s",
                        flush=True,
                    )


def run_horizon(path: Path, images: str, steps: int) -> list[Record]:
    """Unroll the bundled thetas and return their records, from the file where they are there."""
    sets = load_image_sets(images)
    names = [image_set.name for image_set in sets]
    wanted = {load_weights(name).sha256: name for name in BUNDLED}
    records = [r for r in read_records(path) if r["sha256"] in wanted and r["steps"] == steps and r["task"] in names]
    for sha256, name in wanted.items():
        if any(record["sha256"] == sha256 for record in records):
            continue
        print(f"horizon: {name}, {steps:,} inner steps on {', '.join(names)}", flush=True)
        fresh = horizon.unroll(load_weights(name), sets, steps=steps)
        for record in fresh:
            append(path, record)
        records += fresh
    return records


def evaluate(arguments: argparse.Namespace) -> int:
    parts = arguments.only or PARTS
    folder = arguments.out.parent / arguments.out.stem
    settings = Settings(steps=arguments.steps)
    data = arguments.data or prepare_embedded("bytes", Path("data/wikipedia-bytes"))
    torch.set_flush_denormal(True)
    models = LanguageModels(folder / "language_model.jsonl", settings, data)
    horizon_path = folder / "horizon.jsonl"
    if "horizon" in parts:
        run_horizon(horizon_path, arguments.images, arguments.horizon_steps)
    if "language-model" in parts:
        models.run(arguments.workers)
    if "report" in parts:
        comparisons = [report.Comparison(m, models.sweep(m), models.finals(m)) for m in METHODS]
        current = {load_weights(name).sha256 for name in BUNDLED}
        horizons = [r for r in read_records(horizon_path) if r["sha256"] in current]
        facts = {"machine": device_name(torch.device("cpu")).split(",")[0], **versions()}
        thetas = [load_weights(name) for name in BUNDLED]
        report.write(arguments.out, folder, comparisons, horizons, settings, thetas, facts)
        print(f"-> {arguments.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for a user's mistake."""
    arguments = parse_arguments(argv)
    try:
        with unfailing_streams():
            return evaluate(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
