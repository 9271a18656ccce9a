"""What a run leaves to read: the line a step, `metrics.jsonl`, its trackers, the picture and the report."""

import functools
import io
import json
import math
import os
import platform
import subprocess
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from celo2.files import write_atomic
from celo2.pretrain.terminal import printable
from celo2.pretrain.trackers import TRACKED, Start, Trackers
from celo2.tables import markdown_table

METRICS = "metrics.jsonl"
CURVE = "loss.png"
REPORT = "report.md"
PACKAGES = ("celo2", "torch", "triton", "numpy", "safetensors", "tiktoken")
WINDOW = 128


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers, and the git revision of this code."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        # an installed package may lie inside of a repository that is not its own
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=12"]
        found["git"] = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["git"] = "none"
    return found


class ZScore:
    """How unusual a value is, in standard deviations of the last 128 values before it."""

    def __init__(self, values: list[float]) -> None:
        self._window = deque((value for value in values if math.isfinite(value)), maxlen=WINDOW)

    def __call__(self, value: float) -> float:
        """Score `value` and remember it; 0 while fewer than 8 values are known or they are all equal."""
        score = 0.0
        if len(self._window) >= 8 and math.isfinite(value) and min(self._window) < max(self._window):
            # the exact sums of `statistics.pstdev` take ten times as long
            mean = math.fsum(self._window) / len(self._window)
            deviation = math.sqrt(math.fsum((known - mean) ** 2 for known in self._window) / len(self._window))
            score = (value - mean) / deviation
        if math.isfinite(value):
            self._window.append(value)
        return score


def duration(seconds: float) -> str:
    """Seconds as `42s`, `10.9m`, `3.2h` or `1.5d`."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "m"), (129_600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f}{name}" if unit == 1 else f"{seconds / unit:.1f}{name}"
    return f"{seconds / 86_400:.1f}d"


def quantity(value: float) -> str:
    """A count with a unit prefix: `812`, `9.13k`, `3.71M`, `1.32B`."""
    for limit, unit, name in ((1e3, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (1e12, 1e9, "B")):
        if value < limit:
            return f"{value / unit:.3g}{name}"
    return f"{value / 1e12:.3g}T"


def format_step(record: dict[str, Any], total: int, seconds_left: float) -> str:
    """The line of one step from its `train` record."""
    mfu = "n/a MFU" if record["mfu"] is None else f"{100 * record['mfu']:.1f}% MFU"
    cells = [
        f"step {record['step']}/{total}",
        f"loss {record['loss']:.4f} ({record['loss_z']:+.2f}z)",
        f"{record['bits_per_byte']:.3f} bpb",
        f"norm {record['grad_norm']:.4f} ({record['grad_norm_z']:+.2f}z)",
        f"lr {record['lr']:.1e}",
        f"{record['step_ms']:.0f} ms (opt {record['optimizer_ms']:.1f})",
        mfu,
        f"{quantity(record['tokens_per_s'])} tok/s",
        f"eta {duration(seconds_left)}",
    ]
    return " | ".join(cells) + (" | SKIPPED: not finite" if record["skipped"] else "")


class RunLog:
    """Appends records to `metrics.jsonl` and, when asked, to trackers (`celo2.pretrain.trackers`, by their names).

    A record is a JSON object with `kind`: `run` (once a start), `train` (a step), `val`, `final`; other programs have
    kinds of their own, as `norms`. Values that are not finite are null. On a resume, records of steps after the
    checkpoint are dropped, since they are made again; a run from the start keeps an older file as `metrics.jsonl.old`.
    The last 128 values of each number stay in memory. With `main=False`, on the other ranks of a run, nothing is kept.
    Trackers call the run by `name` and `run_id`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resume_step: int | None,
        run_id: str,
        config: dict[str, Any],
        name: str = "run",
        trackers: Sequence[str] = (),
        main: bool = True,
    ) -> None:
        self.path = Path(folder) / METRICS
        self._values: dict[tuple[str, str], deque[float]] = {}
        self._trackers: Trackers | None = None
        # by kind, the last step that trackers got from earlier starts
        self._sent: dict[str, int] = {}
        self._main = main
        self._file: TextIO | None = None
        if not main:
            return
        if resume_step is not None:
            for record in self._kept(resume_step):
                self._remember(record)
            self._sent = _last_steps(self.path)
        # first what can fail for reasons of its own
        start = Start(Path(folder), run_id, f"{name}-{run_id}", resume_step, config)
        self._trackers = Trackers(trackers, start, self._sent, lambda: self._kept(resume_step or 0))
        if resume_step is not None:
            write_atomic(self.path, ((json.dumps(record) + "\n").encode() for record in self._kept(resume_step)))
        elif self.path.exists() and self.path.stat().st_size:
            os.replace(self.path, self.path.with_name(f"{METRICS}.old"))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def _kept(self, resume_step: int) -> Iterator[dict[str, Any]]:
        for record in iterate_metrics(self.path):
            if record.get("step", 0) <= resume_step and record["kind"] != "final":
                yield record

    def _remember(self, stored: dict[str, Any]) -> None:
        for key, value in stored.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._values.setdefault((stored["kind"], key), deque(maxlen=WINDOW)).append(value)

    def write(self, kind: str, **values: Any) -> dict[str, Any]:
        """Append one record and return it as given."""
        record = {"kind": kind, **values}
        if not self._main:
            return record
        if kind == "run" and self._sent:
            # steps that the next lines will not show
            record["sent"] = self._sent
        stored = {key: _json_value(value) for key, value in record.items()}
        self._remember(stored)
        if self._file is None:
            return record
        try:
            self._file.write(json.dumps(stored) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write {self.path}: {error.strerror}; free space, then go on from the last checkpoint with "
                "--resume auto",
            ) from error
        if self._trackers is not None and kind in TRACKED:
            self._trackers.log(kind, values)
        return record

    def last(self, kind: str, key: str, count: int = WINDOW) -> list[float]:
        """The last `count` values, at most 128, of `key` in records of `kind`, those that are not finite left out."""
        return list(self._values.get((kind, key), ()))[-count:]

    def sync(self) -> None:
        """Make what is written survive a power loss; before a checkpoint that counts on it."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._trackers is not None:
            self._trackers.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._trackers is not None:
            self._trackers.close()


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def iterate_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a `metrics.jsonl`, one after the other; a last line cut short by a kill is dropped.

    Raises ValueError for other damage, when it comes to it.
    """
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number} is damaged ({error}); move the file away to go on without it"
                ) from error
            yield record


def _last_steps(path: Path) -> dict[str, int]:
    """The last step of each tracked kind that any start of a run has written, also of records dropped since."""
    steps: dict[str, int] = {}
    for record in iterate_metrics(path):
        kind = record["kind"]
        found = record.get("sent", {}) if kind == "run" else {kind: record["step"]} if kind in TRACKED else {}
        for key, step in found.items():
            steps[key] = max(step, steps.get(key, step))
    return steps


def has_records(path: Path) -> bool:
    """Whether a `metrics.jsonl` holds anything."""
    return next(iterate_metrics(path), None) is not None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a `metrics.jsonl`, as `iterate_metrics` gives them."""
    return list(iterate_metrics(path))


def draw_curve(records: Iterable[dict[str, Any]], path: Path, title: str) -> None:
    """Draw training and validation loss over the steps as a PNG, written atomically; the title is shown as it is."""
    from matplotlib.figure import Figure

    points: dict[str, list[tuple[int, float]]] = {"train": [], "val": []}
    for record in records:
        if record["kind"] in points and record["loss"] is not None:
            points[record["kind"]].append((record["step"], record["loss"]))
    train, val = points.values()
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", linewidth=0.8, alpha=0.6, label="training batch")
    if val:
        label = f"validation, {val[-1][1]:.4f} at the end"
        axes.plot(*zip(*val, strict=True), color="tab:orange", marker="o", markersize=3, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)")
    # a name is no formula
    axes.set_title(printable(title), parse_math=False)
    axes.grid(alpha=0.3)
    if train or val:
        axes.legend()
    write_png(figure, path)


def write_png(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure of matplotlib atomically; `options` are of its `savefig`."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # a name in letters that the font lacks: boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png", **options)
    write_atomic(path, [buffer.getvalue()])


def write_report(folder: Path, facts: dict[str, Any], sample: str) -> None:
    """Write `report.md`: a table of facts, the picture, the sample."""
    shown = {key: " ".join(printable(str(value)).split()) for key, value in facts.items()}
    run = shown.pop("run")
    lines = [f"# {run}", "", *markdown_table(("", ""), shown.items())]
    lines += [f"![loss]({CURVE})", "", "Sample:", "", *(f"    {line}" for line in sample.splitlines()), ""]
    write_atomic(folder / REPORT, ["\n".join(lines).encode()])
