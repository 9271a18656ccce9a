"""Runs of the trainer side by side, read from their `metrics.jsonl`: what differs, and what came out.

A run may have ended, stopped, or be under way. Steps, tokens and seconds are of the training alone: what validations
and checkpoints take is not in them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from celo2.pretrain.curves import first_reaching, value_at
from celo2.pretrain.runlog import METRICS, iterate_metrics
from celo2.pretrain.sweep_points import PROGRAM, Point
from celo2.pretrain.sweep_report import SEED, Findings, Metric, Run

LOSS, BITS = "loss", "bits_per_byte"
# what a run is called and what it leaves, not what it computes
_IDLE = frozenset(
    [
        "out_dir",
        "resume",
        "wandb",
        "tensorboard",
        "trackio",
        "log_every",
        "save_every",
        "eval_every",
        "keep",
        "keep_every",
        "norms_every",
        "prompt",
        "sample_tokens",
        "hellaswag",
        "async_save",
        "dry_run",
        "world_size",
        "gpu",
        "max_skips",
        "data",
    ]
)
Series = dict[str, list[float]]


@dataclass(frozen=True)
class Log:
    """A run as its log has it; `train`, `val` and `norms` are columns of numbers, NaN where there was none."""

    name: str
    path: Path
    about: dict[str, Any]
    """The newest `run` record."""
    train: Series
    val: Series
    norms: Series
    finished: bool
    steps: int
    """Steps of the whole run."""
    batch_tokens: int
    settings: dict[str, str] = field(default_factory=dict)
    """What decides its numbers, by option: the command line's with the recipe's values filled in."""

    @property
    def step(self) -> int:
        """The last step of the log."""
        return int(self.train["step"][-1]) if self.train["step"] else 0

    @cached_property
    def seconds(self) -> list[float]:
        """Training time from the start to the end of each step of `train`."""
        total, found = 0.0, []
        for milliseconds in self.train["step_ms"]:
            total += milliseconds / 1000
            found.append(total)
        return found

    def tokens_at(self, steps: Sequence[float]) -> list[float]:
        return [self.batch_tokens * step for step in steps]

    def seconds_at(self, steps: Sequence[float]) -> list[float]:
        """Training time at steps, those that the log lacks on a straight line between its steps."""
        known, times = [0.0, *self.train["step"]], [0.0, *self.seconds]
        by_step = dict(zip(known, times, strict=True))
        return [by_step[step] if step in by_step else value_at(known, times, step) for step in steps]

    def median(self, key: str) -> float:
        """The median over the steps of a number of the `train` records; NaN without any."""
        values = [value for value in self.train.get(key, []) if math.isfinite(value)]
        return statistics.median(values) if values else math.nan

    def last(self, metric: str) -> float:
        """The newest validation's; NaN before the first."""
        return self.val[metric][-1] if self.val[metric] else math.nan

    def least(self, metric: str) -> float:
        return min((value for value in self.val[metric] if math.isfinite(value)), default=math.nan)

    @property
    def validated_on(self) -> tuple[object, ...]:
        """What must be alike for two losses a token to be: the validation tokens, how many, and the vocabulary."""
        identity = self.about["identity"]
        shards = {name: value for name, value in identity["shards"].items() if "_val_" in name}
        return tuple(sorted(shards.values())), identity["recipe"].get("val_tokens"), identity["model"]["vocab_size"]

    @property
    def trained_on(self) -> tuple[object, ...]:
        """The training tokens."""
        shards = self.about["identity"]["shards"]
        return tuple(sorted(value for name, value in shards.items() if "_val_" not in name))


def read_log(path: Path, name: str) -> Log:
    """Read a run by its folder or its `metrics.jsonl`; a last line that a kill cut short is left out.

    Raises ValueError for a folder without a log, an empty log, and one of another program; OSError as it comes.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such folder or file; give folders of runs, or their {METRICS}")
    file = path / METRICS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} is no folder of a run: it has no {METRICS}")
    about: dict[str, Any] | None = None
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "norms": []}
    finished = False
    for record in iterate_metrics(file):
        if not isinstance(record, dict) or "kind" not in record:
            raise ValueError(f"{file} is no log of a run: a line of it is {str(record)[:60]!r}")
        if record["kind"] == "run":
            about = record
        elif record["kind"] == "final":
            finished = True
        elif record["kind"] in rows:
            rows[record["kind"]].append(record)
    if about is None:
        raise ValueError(f"{file} has no record of a run yet: it is empty, or its run has just begun")
    recipe = about.get("identity", {}).get("recipe", {})
    if not isinstance(recipe, dict) or "batch_tokens" not in recipe:
        raise ValueError(f"{file} is of another program: this reports runs of celo2.pretrain.train_gpt")
    train, val, norms = (_columns(found) for found in rows.values())
    for series, keys in ((train, ("step", "loss", "step_ms")), (val, ("step", LOSS, BITS)), (norms, ("step",))):
        for key in keys:
            series.setdefault(key, [])
    batch, tokens = int(recipe["batch_tokens"]), int(recipe["tokens"])
    steps = max(1, tokens // batch) + sum(about["identity"].get("extensions", []))
    return Log(name, file, about, train, val, norms, finished, steps, batch, _settings(about))


def _columns(records: Sequence[dict[str, Any]]) -> Series:
    """Records as columns of the numbers in them."""
    keys = dict.fromkeys(key for record in records for key, value in record.items() if isinstance(value, (int, float)))
    # None: not finite
    return {key: [math.nan if record.get(key) is None else float(record[key]) for record in records] for key in keys}


def _settings(about: dict[str, Any]) -> dict[str, str]:
    recipe = about["identity"]["recipe"]
    given = {**about.get("arguments", {}), "theta": about.get("theta")}
    # the label has them
    given.pop("weights", None)
    betas = recipe.get("betas") or (None, None)
    resolved = {"beta1": betas[0], "beta2": betas[1], **recipe}
    values = {key: resolved.get(key, value) for key, value in given.items() if key not in _IDLE}
    # `tokens` decides them
    values["steps"] = max(1, recipe["tokens"] // recipe["batch_tokens"])
    return {key.replace("_", "-"): "" if value is None else _shown(value) for key, value in values.items()}


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(str(part) for part in value) if isinstance(value, list) else str(value)


def names_of(paths: Sequence[Path]) -> list[str]:
    """A name for each run: its folder's, with as many folders above it as tell all apart.

    Raises ValueError for a run that is given twice.
    """
    folders = [path.resolve().parent if path.name == METRICS else path.resolve() for path in paths]
    for index, folder in enumerate(folders):
        if folder in folders[:index]:
            raise ValueError(f"{paths[index]} is given twice")
    names: list[str] = []
    for folder in folders:
        # the shortest end of the path that no other path has
        ends = ("/".join(folder.parts[-length:]) for length in range(1, len(folder.parts) + 1))
        names.append(next(end for end in ends if sum(f"/{other}".endswith(f"/{end}") for other in folders) == 1))
    return names


class Comparison:
    """Runs beside the first of them.

    `metric` is the loss a token, or bits per byte where tokens are not the same for all. `target` is what the worst of
    the finished runs ended at, unless it is given; NaN while none has ended.
    """

    def __init__(self, logs: Sequence[Log], target: float | None = None) -> None:
        self.logs = list(logs)
        self.comparable = len({log.validated_on for log in logs}) == 1
        self.metric = LOSS if self.comparable else BITS
        ends = [log.last(self.metric) for log in logs if log.finished and math.isfinite(log.last(self.metric))]
        self.target = max(ends, default=math.nan) if target is None else target
        self.differing = [
            key
            for key in dict.fromkeys(key for log in logs for key in log.settings)
            if len({log.settings.get(key, "") for log in logs}) > 1
        ]

    def tokens_to_target(self, log: Log) -> float | None:
        return first_reaching(log.tokens_at(log.val["step"]), log.val[self.metric], self.target)

    @property
    def common_tokens(self) -> float:
        """As many tokens as every run has been validated after; 0 where one has not been."""
        return min((log.batch_tokens * max(log.val["step"], default=0.0) for log in self.logs), default=0.0)

    def at_common_tokens(self, log: Log) -> float:
        return value_at(log.tokens_at(log.val["step"]), log.val[self.metric], self.common_tokens)

    def warnings(self) -> list[str]:
        """Why numbers of these runs may not be what they seem beside each other."""
        found = []
        if not self.comparable:
            found.append(
                "the runs are validated on different tokens (data, their number, or vocabulary): losses a token do not "
                "compare, bits per byte do as far as the texts are alike, and those are compared here"
            )
        elif len({log.trained_on for log in self.logs}) > 1:
            found.append("the runs are trained on different data")
        for what, values in (
            ("devices", {str(log.about.get("device")) for log in self.logs}),
            ("numbers of processes", {str(log.about["identity"].get("ranks", 1)) for log in self.logs}),
        ):
            if len(values) > 1:
                found.append(f"different {what}, so times do not compare: {', '.join(sorted(values))}")
        for package in ("git", "torch"):
            versions = {str(log.about.get("versions", {}).get(package, "unknown")) for log in self.logs}
            if len(versions) > 1:
                found.append(f"different versions of {package}: {', '.join(sorted(versions))}")
        return found

    def groups(self) -> dict[tuple[tuple[str, str], ...], list[Log]]:
        """Runs that differ by their seed alone, by their other settings."""
        found: dict[tuple[tuple[str, str], ...], list[Log]] = {}
        for log in self.logs:
            key = tuple((name, log.settings.get(name, "")) for name in self.differing if name != SEED)
            found.setdefault(key, []).append(log)
        return found

    def findings(self) -> Findings | None:
        """The finished runs as those of a sweep over their settings; None unless two of them differ by their seed."""
        finished = [log for log in self.logs if log.finished]
        by = [name for name in self.differing if name != SEED]
        runs = []
        for log in finished:
            values = [math.isfinite(value) for value in log.val[self.metric]]
            curve = {key: log.val[key] for key in ("step", self.metric)} if any(values) else {}
            metrics = {"step": float(log.step), self.metric: log.last(self.metric)}
            point = Point(PROGRAM, (), tuple((key, log.settings.get(key) or "none") for key in [*by, SEED]))
            runs.append(Run(point, {"status": "done", "metrics": metrics, "curve": curve}))
        if len({run.point for run in runs}) < len(runs) or len({run.without_seed() for run in runs}) == len(runs):
            # the same run twice, or nothing to take a mean of
            return None
        # the first options that tell the settings apart
        count = len({run.without_seed() for run in runs})
        few = next(n for n in range(len(by) + 1) if len({run.point.method(by[:n]) for run in runs}) == count)
        return Findings(runs, [], Metric(self.metric), by[:few])
