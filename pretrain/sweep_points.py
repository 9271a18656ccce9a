"""The points of a sweep: grids of options written as text, and the command and folder of each point.

A grid is `opt=celo2,muon lr=1e-5..1e-3:7 seed=0`: options of the program with their values, a list with commas, or
`low..high:count` for numbers spaced evenly in their logarithm. Several grids are several products.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAM = "celo2.pretrain.train_gpt"
_OPTION = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_RANGE = re.compile(r"(?P<low>[^.:]\S*?)\.\.(?P<high>[^:]+):(?P<count>\d+)")
# of the sweep itself
RESERVED = ("out-dir", "resume")


def canonical(text: str) -> str:
    """A value as it names a point: numbers in one spelling (`1e-3` is `0.001`), anything else as it is."""
    try:
        return str(int(text))
    except ValueError:
        pass
    try:
        return f"{float(text):.6g}"
    except ValueError:
        return text


def log_spaced(low: float, high: float, count: int) -> list[float]:
    """`count` numbers from `low` to `high`, evenly spaced in their logarithm, with three significant digits."""
    if count == 1:
        return [float(f"{low:.3g}")]
    ratio = math.log(high / low) / (count - 1)
    return [float(f"{low * math.exp(ratio * index):.3g}") for index in range(count)]


def _values(option: str, text: str, grid: str) -> list[str]:
    values: list[str] = []
    for part in text.split(","):
        if not part:
            raise ValueError(f"--grid {grid!r}: {option} has an empty value; write {option}=VALUE[,VALUE...]")
        match = _RANGE.fullmatch(part)
        if match is None:
            values.append(canonical(part))
            continue
        try:
            low, high, count = float(match["low"]), float(match["high"]), int(match["count"])
        except ValueError:
            low = high = count = 0
        if not (0 < low < math.inf and 0 < high < math.inf and count > 0):
            raise ValueError(f"--grid {grid!r}: {part} is no range; write low..high:count with positive numbers")
        values += [canonical(repr(value)) for value in log_spaced(low, high, count)]
    return list(dict.fromkeys(values))


def parse_grid(text: str) -> list[dict[str, str]]:
    """The settings of a grid, in the order of its product, the last option fastest.

    Raises ValueError, showing the grid, for what is no option, an option given twice, and the sweep's own options.
    """
    options: dict[str, list[str]] = {}
    for token in shlex.split(text):
        option, equals, values = token.partition("=")
        option = option.lstrip("-").replace("_", "-")
        if not equals or not _OPTION.fullmatch(option):
            raise ValueError(f"--grid {text!r}: {token!r} is no setting; write option=value[,value...]")
        if option in RESERVED:
            raise ValueError(f"--grid {text!r}: --{option} of a point is the sweep's own; leave it out")
        if option in options:
            raise ValueError(f"--grid {text!r}: {option} is there twice; put its values into one list")
        options[option] = _values(option, values, text)
    if not options:
        raise ValueError(f"--grid {text!r}: no setting; write option=value[,value...]")
    return [dict(zip(options, chosen, strict=True)) for chosen in itertools.product(*options.values())]


@dataclass(frozen=True)
class Point:
    """One run: a program, its options that all points share, and those of this point."""

    program: str
    """A module's name, or a Python file."""
    fixed: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]

    @property
    def id(self) -> str:
        """The settings in short and a hash of everything: the same in every grid that has this point."""
        content = json.dumps([self.program, self.fixed, sorted(self.settings)])
        name = ",".join(f"{key}={value}" for key, value in self.settings)
        short = re.sub(r"[^A-Za-z0-9=,.+-]+", "_", name)[:80]
        return f"{short}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

    def get(self, option: str, default: str = "") -> str:
        return dict(self.settings).get(option, default)

    def method(self, by: Sequence[str]) -> str:
        """The values of the options in `by` that are set, as the name of what is compared."""
        return " ".join(value for option in by if (value := self.get(option))) or "run"

    def command(self, folder: Path, launcher: Sequence[str] = ()) -> list[str]:
        """The command line that runs this point in `folder`, resuming; `launcher` as `torchrun --nproc-per-node 8`."""
        target = [self.program] if self.program.endswith(".py") else ["-m", self.program]
        options = [word for key, value in self.settings for word in (f"--{key}", value)]
        own = ["--out-dir", str(folder), "--resume", "auto"]
        return [*(launcher or [sys.executable]), *target, *self.fixed, *options, *own]

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.settings)


def make_points(grids: Sequence[str], program: str, fixed: Sequence[str]) -> list[Point]:
    """All points of the grids, each once, in order; raises ValueError as `parse_grid`."""
    settings = [tuple(chosen.items()) for grid in grids for chosen in parse_grid(grid)]
    points: dict[str, Point] = {}
    for chosen in settings:
        point = Point(program, tuple(fixed), chosen)
        points.setdefault(point.id.rsplit("-", 1)[1], point)
    return list(points.values())
