"""The proof: how the bundled thetas train language models beside tuned baselines, and how long they stay stable.

    python -m celo2.meta.evaluate                      # everything, then docs/results.md
    python -m celo2.meta.evaluate --settings short     # the first setting alone
    python -m celo2.meta.evaluate --only report        # the page again, from the records

What is compared, and how, is in `celo2.meta.protocol`. Every run is one line of JSON under `docs/results/`; a run whose
line is there is not repeated, so the command continues where it was stopped. A line belongs to a theta's hash, to the
settings and to the data: others run anew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from celo2.meta import horizon, protocol, report
from celo2.meta.images import load_image_sets
from celo2.meta.language_model import Method, Settings, Text, selection_shards, train_once
from celo2.meta.protocol import SEARCH_SEED, SEEDS, Contender, Setting
from celo2.meta.search import Point, Search
from celo2.pretrain import options
from celo2.pretrain.device import device_name
from celo2.pretrain.runlog import versions
from celo2.pretrain.terminal import unfailing_streams
from celo2.theta import TRAINED, load_weights

Record = dict[str, Any]
PARTS = ("horizon", "language-model", "report")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate the bundled thetas; writes docs/results.md.")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part of it (default: all three)")
    parser.add_argument(
        "--out", type=options.path, default=Path("docs/results.md"), help="the page (default: docs/results.md)"
    )
    parser.add_argument(
        "--settings", choices=protocol.SETTINGS, nargs="+", help="of the language models (default: all)"
    )
    parser.add_argument("--texts", choices=protocol.TEXTS, nargs="+", help="(default: all)")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="rows to run (default: all); the page has all")
    parser.add_argument(
        "--also", action="append", default=[], metavar="WEIGHTS", help="a row more: a file, a run's folder, or a hub id"
    )
    parser.add_argument(
        "--images", type=options.given, default="embedded", metavar="SOURCE", help="as celo2.meta.train --data"
    )
    parser.add_argument("--horizon-steps", type=int, default=horizon.STEPS, metavar="N", help="inner steps")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="runs at once, a thread each")
    parser.add_argument("--minutes", type=float, metavar="N", help="begin no run after this long")
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


class Splits(NamedTuple):
    """Folders of a text's shards: for training and for choosing options, and the one whose validation is reported."""

    chosen_on: Path
    reported_on: Path

    def text(self, settings: Settings) -> Text:
        return Text(self.chosen_on, settings, self.reported_on)


class Job(NamedTuple):
    """One run: which text and setting it belongs to, and what it trains."""

    text: str
    setting: str
    contender: Contender
    point: Point
    seed: int

    @property
    def key(self) -> tuple[str, str, str, Point, int]:
        return self.text, self.setting, self.contender.name, self.point, self.seed


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def train(method: Method, point: Point, seed: int, settings: Settings, splits: Splits) -> Record:
    """Train one model; in a process of its own."""
    return train_once(method, dict(point), seed, settings, splits.text(settings))


class LanguageModels:
    """The runs of the comparison: what is recorded, and what is still to do."""

    def __init__(
        self,
        path: Path,
        splits: Mapping[str, Splits],
        rows: Sequence[Contender],
        settings: Mapping[str, Setting],
        wanted: Sequence[str],
        methods: Sequence[str] | None = None,
    ) -> None:
        known = [row.name for row in rows]
        if unknown := sorted(set(methods or ()) - set(known)):
            raise ValueError(f"--methods {', '.join(unknown)}: the rows are {', '.join(known)}")
        self._to_run = [row for row in rows if methods is None or row.name in methods]
        self.path, self.splits, self.rows, self.settings = path, splits, rows, settings
        # a setting's search begins where that of another ended
        self.wanted = [name for name in settings if any(name in self._chain(other) for other in wanted)]
        self.data = {
            (text, name): splits[text].text(settings[name].settings).fingerprint
            for text in splits
            for name in self.wanted
        }
        self.records: dict[tuple[Any, ...], Record] = {}
        for record in read_records(path):
            self._take(record)

    def _chain(self, name: str | None) -> list[str]:
        return [] if name is None else [name, *self._chain(self.settings[name].after)]

    def _identity(self, text: str, setting: str, contender: Contender) -> Record:
        """What a record must have to count."""
        weights = contender.method.weights
        return {
            "text": text,
            "setting": setting,
            "method": contender.name,
            "theta": None if weights is None else load_weights(weights).sha256,
            "settings": asdict(self.settings[setting].settings),
            "data": self.data[text, setting],
        }

    def _take(self, record: Record) -> None:
        for contender in self.rows:
            if record.get("method") != contender.name or (record.get("text"), record.get("setting")) not in self.data:
                continue
            identity = self._identity(record["text"], record["setting"], contender)
            if all(record.get(key) == value for key, value in identity.items()):
                point = tuple(record["tuned"].items())
                self.records[record["text"], record["setting"], contender.name, point, record["seed"]] = record

    def search(self, text: str, setting: str, contender: Contender) -> Search | None:
        """Return the search of a method's options as far as it has gone; None before that of the setting it follows."""
        start = contender.lattice.start
        if (after := self.settings[setting].after) is not None:
            before = self.search(text, after, contender)
            if before is None or before.best is None:
                return None
            start = before.best
        losses = {
            key[3]: record["final"]
            for key, record in self.records.items()
            if key[:3] == (text, setting, contender.name) and key[4] == SEARCH_SEED
        }
        return Search(contender.lattice, start, self.settings[setting].runs, losses)

    def finals(self, text: str, setting: str, contender: Contender) -> dict[int, Record]:
        """Return the recorded runs of a method at its best options, by seed."""
        search = self.search(text, setting, contender)
        if search is None or search.best is None:
            return {}
        keys = {seed: (text, setting, contender.name, search.best, seed) for seed in SEEDS}
        return {seed: self.records[key] for seed, key in keys.items() if key in self.records}

    def missing(self) -> Iterator[Job]:
        """Iterate over the runs that can begin now: setting after setting, searches before seeds."""
        for setting in self.wanted:
            for text in self.splits:
                for contender in self._to_run:
                    search = self.search(text, setting, contender)
                    for point in search.missing if search is not None else ():
                        yield Job(text, setting, contender, point, SEARCH_SEED)
            for seed in SEEDS:
                for text in self.splits:
                    for contender in self._to_run:
                        search = self.search(text, setting, contender)
                        if search is None or search.best is None:
                            continue
                        job = Job(text, setting, contender, search.best, seed)
                        if job.key not in self.records:
                            yield job

    def run(self, workers: int, minutes: float | None = None) -> None:
        """Run what is missing, `workers` at once; a run that ended is on the disk."""
        began = time.monotonic()
        spawn = multiprocessing.get_context("spawn")
        running: dict[Future[Record], Job] = {}
        with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker) as pool:
            try:
                while True:
                    late = minutes is not None and time.monotonic() - began > 60 * minutes
                    busy = {job.key for job in running.values()}
                    for job in () if late else self.missing():
                        if len(running) >= workers:
                            break
                        if job.key not in busy:
                            settings = self.settings[job.setting].settings
                            arguments = job.contender.method, job.point, job.seed, settings, self.splits[job.text]
                            running[pool.submit(train, *arguments)] = job
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        self._record(running.pop(future), future.result())
            except BaseException:
                for process in multiprocessing.active_children():
                    process.terminate()
                raise

    def _record(self, job: Job, record: Record) -> None:
        record = self._identity(job.text, job.setting, job.contender) | record
        append(self.path, record)
        self._take(record)
        tuned = " ".join(f"{option} {value:.3g}" for option, value in job.point)
        print(
            f"{job.text} {job.setting} {job.contender.name:<10} {tuned} seed {job.seed} | validation "
            f"{record['final']:.4f}, reported {record['reported']:.4f} | {record['seconds']:.0f} s",
            flush=True,
        )


def run_horizon(path: Path, images: str, steps: int) -> list[Record]:
    """Unroll the bundled thetas and return their records, from the file where they are there."""
    sets = load_image_sets(images)
    names = [image_set.name for image_set in sets]
    wanted = {load_weights(name).sha256: name for name in TRAINED}
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
    torch.set_flush_denormal(True)
    horizon_path = folder / "horizon.jsonl"
    if "horizon" in parts:
        run_horizon(horizon_path, arguments.images, arguments.horizon_steps)
    rows = [*protocol.contenders(), *map(protocol.also, arguments.also)]
    splits = {}
    for name in arguments.texts or protocol.TEXTS:
        shards = protocol.TEXTS[name]()
        splits[name] = Splits(selection_shards(shards, shards.with_name(f"{shards.name}-selection")), shards)
    wanted = arguments.settings or list(protocol.SETTINGS)
    models = LanguageModels(folder / "language_model.jsonl", splits, rows, protocol.SETTINGS, wanted, arguments.methods)
    if "language-model" in parts:
        models.run(arguments.workers, arguments.minutes)
    if "report" in parts:
        tables = [
            report.Table(text, name, models.settings[name], [
                report.Row(row, models.search(text, name, row), models.finals(text, name, row)) for row in rows
            ])
            for name in models.wanted
            for text in splits
        ]  # fmt: skip
        current = {load_weights(name).sha256 for name in TRAINED}
        horizons = [r for r in read_records(horizon_path) if r["sha256"] in current]
        facts = {"machine": device_name(torch.device("cpu")).split(",")[0], **versions()}
        thetas = [load_weights(name) for name in TRAINED]
        report.write(arguments.out, folder, tables, horizons, thetas, facts)
        print(f"-> {arguments.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 for a user's mistake, 130 for an interrupt."""
    arguments = parse_arguments(argv)
    try:
        with unfailing_streams():
            return evaluate(arguments)
    except KeyboardInterrupt:
        print("interrupted: the runs that ended are recorded, and the same command goes on", file=sys.stderr)
        return 130
    except BrokenProcessPool as error:
        print(f"error: {error} (no memory for {arguments.workers} runs? give --workers 1)", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
