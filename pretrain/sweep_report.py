"""What a sweep found: `report.md` with paired comparisons, and the figures.

A method is what `by` names (the optimizer and its weights). Its best setting is the one with the best mean over the
seeds of the grid, where a run that failed counts as the worst; what is compared are the runs at that setting with the
seeds of `--best`, or, without them, with those of the grid. The figures: the metric against the learning rate (Fig. 5
of the Celo2 paper), parallel coordinates of the hyper-parameters (Fig. 6), and the curves at the best settings.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from celo2.files import write_atomic
from celo2.pretrain.curves import first_reaching
from celo2.pretrain.intervals import Mean, margin, mean, paired_difference
from celo2.pretrain.runlog import duration, write_png
from celo2.pretrain.sweep_points import Point
from celo2.pretrain.sweep_runner import Record
from celo2.pretrain.terminal import attempt, printable
from celo2.tables import markdown_table

SEED = "seed"
REPORT, RECORDS = "report.md", "records.jsonl"
SWEEP_PICTURE, CURVES_PICTURE, PARALLEL_PICTURE = "lr.png", "curves.png", "parallel.png"
Settings = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Metric:
    """A number of the `final` records and the curve of the same name of the `val` records."""

    name: str = "loss"
    maximize: bool = False

    @property
    def worst(self) -> float:
        return -math.inf if self.maximize else math.inf

    def of(self, record: Record) -> float:
        """The value of a run; the worst for one that failed or ended not finite."""
        value = record["metrics"].get(self.name) if record["status"] == "done" else None
        return self.worst if value is None or not math.isfinite(value) else float(value)

    def better(self, one: float, other: float) -> bool:
        return one > other if self.maximize else one < other

    def best(self, values: Sequence[float]) -> float:
        return max(values) if self.maximize else min(values)


@dataclass(frozen=True)
class Run:
    """A point with its record."""

    point: Point
    record: Record

    def without_seed(self) -> Settings:
        return tuple((key, value) for key, value in self.point.settings if key != SEED)

    @property
    def seed(self) -> str:
        return self.point.get(SEED)


class Method:
    """The runs of one method: those of the grid that choose its setting, and those that are compared."""

    def __init__(self, name: str, grid: Sequence[Run], confirming: Sequence[Run], metric: Metric) -> None:
        self.name, self.grid, self.metric, self._confirming = name, grid, metric, confirming

    @cached_property
    def by_setting(self) -> dict[Settings, list[Run]]:
        found: dict[Settings, list[Run]] = {}
        for run in self.grid:
            found.setdefault(run.without_seed(), []).append(run)
        return found

    def value(self, setting: Settings) -> float:
        """The mean over the seeds of the grid at a setting."""
        values = [self.metric.of(run.record) for run in self.by_setting[setting]]
        return float(np.mean(values)) if np.isfinite(values).all() else self.metric.worst

    @cached_property
    def best(self) -> Settings | None:
        """The best setting, None while no run of the method has a value."""
        finite = {setting: value for setting in self.by_setting if math.isfinite(value := self.value(setting))}
        if not finite:
            return None
        return max(finite, key=lambda s: finite[s]) if self.metric.maximize else min(finite, key=lambda s: finite[s])

    @cached_property
    def compared(self) -> list[Run]:
        """The runs at the best setting that are compared, with other seeds than chose it where there are some."""
        if self.best is None:
            return []
        at_best = [run for run in self._confirming if run.without_seed() == self.best]
        return at_best or self.by_setting[self.best]

    @property
    def values(self) -> dict[str, float]:
        """The values that are compared, by seed; a run that failed has none."""
        values = {run.seed: self.metric.of(run.record) for run in self.compared}
        return {seed: value for seed, value in values.items() if math.isfinite(value)}

    def steps_to(self, seed: str, target: float) -> float | None:
        """The step at which the run with this seed reaches `target`, between two validations by a straight line."""
        run = next((run for run in self.compared if run.seed == seed), None)
        if run is None:
            return None
        return first_reaching(*_curve(run.record, self.metric.name), target, maximize=self.metric.maximize)


def _curve(record: Record, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a run's curve; NaN where a value was not finite."""
    curve = record["curve"]
    values = [math.nan if value is None else float(value) for value in curve.get(name, [])]
    return [float(step) for step in curve.get("step", [])], values


class Findings:
    """The methods of a sweep beside a reference, the first one unless it is named."""

    def __init__(
        self,
        grid: Sequence[Run],
        confirming: Sequence[Run],
        metric: Metric,
        by: Sequence[str],
        reference: str | None = None,
    ) -> None:
        self.grid, self.metric = grid, metric

        names = list(dict.fromkeys(run.point.method(by) for run in grid))
        self.methods = [
            Method(
                name,
                [run for run in grid if run.point.method(by) == name],
                [run for run in confirming if run.point.method(by) == name],
                metric,
            )
            for name in names
        ]
        if reference is not None and reference not in names:
            raise ValueError(f"--reference {reference}: no such method; choose one of {', '.join(names)}")
        self.reference = next(m for m in self.methods if m.name == (reference or names[0])) if names else None
        self.all = [*grid, *(run for run in confirming if run not in grid)]

    def difference(self, method: Method) -> Mean:
        """Paired difference to the reference over the seeds that both have."""
        return paired_difference(method.values, self.reference.values if self.reference else {})

    def speed(self, method: Method) -> tuple[Mean, int]:
        """The reference's steps over those to its final value, paired by seed; and how many runs do not reach it."""
        assert self.reference is not None
        ratios, missing = [], 0
        for seed, target in self.reference.values.items():
            if seed not in method.values:
                continue
            steps = method.steps_to(seed, target)
            total = next(run for run in self.reference.compared if run.seed == seed).record["metrics"]["step"]
            if steps:
                ratios.append(total / steps)
            else:
                missing += 1
        return mean(ratios), missing

    @property
    def varying(self) -> list[str]:
        """Options that differ among the runs of the grid, the seed left out."""
        values: dict[str, set[str]] = {}
        for run in self.grid:
            for key, value in run.without_seed():
                values.setdefault(key, set()).add(value)
        return [key for key in values if len(values[key]) > 1 or any(run.point.get(key) == "" for run in self.grid)]


def comparison_rows(findings: Findings) -> tuple[list[str], list[list[str]]]:
    """The comparison as header and rows: best setting, value, paired difference, steps to the reference's value."""
    metric, reference = findings.metric, findings.reference
    assert reference is not None
    header = ["method", "runs", "best setting", metric.name, f"minus {reference.name}", "speed-up"]
    order = sorted(findings.methods, key=lambda m: mean(list(m.values.values())).value, reverse=metric.maximize)
    rows = []
    for method in sorted(order, key=lambda m: not m.values):
        setting = [f"{key} {value}" for key, value in method.best or () if value not in method.name.split()]
        difference, (speed, missing) = findings.difference(method), findings.speed(method)
        reached = f"{speed:.2f}x" if speed.count else "not reached"
        rows.append(
            [
                method.name,
                str(len(method.grid)),
                ", ".join(setting) or "-",
                f"{mean(list(method.values.values())):.4f}" if method.values else "no run ended",
                "-" if method is reference else f"{difference:+.4f}",
                "1" if method is reference else reached + (f" ({missing} not)" if missing and speed.count else ""),
            ]
        )
    return header, rows


def _x_values(findings: Findings, x: str) -> dict[str, list[tuple[float, float]]]:
    """By method, (x, best value over the other options) in the order of x; the worst value where all runs failed."""
    found = {}
    for method in findings.methods:
        columns: dict[float, list[float]] = {}
        for setting in method.by_setting:
            text = dict(setting).get(x)
            if text is not None:
                columns.setdefault(float(text), []).append(method.value(setting))
        found[method.name] = sorted((key, findings.metric.best(values)) for key, values in columns.items())
    return found


def draw_sweep(findings: Findings, path: Path, title: str, x: str = "lr") -> None:
    """Draw the metric against the learning rate, a line a method; a rate at which all runs failed is a cross."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    points = _x_values(findings, x)
    finite = [value for line in points.values() for _, value in line if math.isfinite(value)]
    for index, (name, line) in enumerate(points.items()):
        color = f"C{index % 10}"
        kept = [(key, value) for key, value in line if math.isfinite(value)]
        if kept:
            axes.plot(*zip(*kept, strict=True), marker="o", color=color, label=name)
            best = (max if findings.metric.maximize else min)(kept, key=lambda pair: pair[1])
            axes.plot(*best, marker="*", markersize=14, color=color)
        if lost := [key for key, value in line if not math.isfinite(value)]:
            edge = (min if findings.metric.maximize else max)(finite, default=0.0)
            axes.plot(lost, [edge] * len(lost), linestyle="", marker="x", color=color)
    for index, method in enumerate(findings.methods):
        if not points[method.name] and method.best is not None:
            # it has no learning rate, as VeLO
            axes.axhline(method.value(method.best), color=f"C{index % 10}", linestyle="--", label=method.name)
    if all(key > 0 for line in points.values() for key, _ in line):
        axes.set_xscale("log")
    if finite and not findings.metric.maximize and max(finite) > 3 * min(finite) > 0:
        axes.set_yscale("log")
    axes.set(xlabel={"lr": "peak learning rate"}.get(x, x), ylabel=f"final {findings.metric.name}")
    axes.set_title(printable(title), parse_math=False)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    write_png(figure, path)


def draw_curves(findings: Findings, path: Path, title: str) -> None:
    """Draw the mean curve of every method at its best setting, with the range over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for index, method in enumerate(findings.methods):
        curves = [_curve(run.record, findings.metric.name) for run in method.compared]
        curves = [curve for curve in curves if curve[0]]
        if not curves:
            continue
        shortest = min(len(steps) for steps, _ in curves)
        steps = curves[0][0][:shortest]
        values = np.array([values[:shortest] for _, values in curves])
        color, count = f"C{index % 10}", len(curves)
        axes.plot(steps, values.mean(0), color=color, label=f"{method.name} ({count} seed{'s' * (count > 1)})")
        axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="step", ylabel=findings.metric.name)
    axes.set_title(printable(title), parse_math=False)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    write_png(figure, path)


def _axis(values: Sequence[str]) -> tuple[list[float | None], list[tuple[float, str]]]:
    """Heights within 0..1 of an option's values, None where it is not set, and ticks: log, linear, or evenly spaced."""
    present = [value for value in values if value != ""]
    try:
        numbers = {value: float(value) for value in present}
    except ValueError:
        numbers = {}
    if numbers:
        order = sorted(set(present), key=lambda value: numbers[value])
        low, high = numbers[order[0]], numbers[order[-1]]
        log = low > 0 and high / low > 8
        if len(order) <= 4:
            # few values, as decays of 0, 0.1 and 10: their order
            numbers, log = {value: float(rank) for rank, value in enumerate(order)}, False
            low = 0.0
        scale = {v: (math.log(numbers[v] / low) if log else numbers[v] - low) for v in order}
        span = max(scale.values()) or 1.0
        heights = {v: scale[v] / span if len(order) > 1 else 0.5 for v in order}
    else:
        order = list(dict.fromkeys(present))
        heights = {v: (i + 0.5) / len(order) for i, v in enumerate(order)}
    shown = order if len(order) <= 9 else [order[0], order[len(order) // 2], order[-1]]
    return [heights.get(value) for value in values], [(heights[value], value) for value in shown]


def draw_parallel(findings: Findings, path: Path, title: str) -> None:
    """Draw parallel coordinates: an axis for each option that varies and one for the metric, a line a setting.

    The colour is the metric's rank; the best of each method is drawn thick. A run that failed is grey and ends below.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    metric, keys = findings.metric, findings.varying
    settings = [
        (method, setting, method.value(setting)) for method in findings.methods for setting in method.by_setting
    ]
    columns = [_axis([dict(setting).get(key, "") for _, setting, _ in settings]) for key in keys]
    finite = sorted((value for *_, value in settings if math.isfinite(value)), reverse=not metric.maximize)
    if not finite or not keys:
        return
    low, high = min(finite), max(finite)
    figure = Figure(figsize=(max(6.0, 2.1 * (len(keys) + 1)), 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    order = sorted(range(len(settings)), key=lambda i: finite.index(settings[i][2]) if settings[i][2] in finite else -1)
    for index in order:
        method, setting, value = settings[index]
        heights = [column[0][index] for column in columns]
        if math.isfinite(value):
            rank = finite.index(value) / max(1, len(finite) - 1)
            color: Any = colormaps["viridis"](rank)
            heights.append((value - low) / (high - low) if high > low else 0.5)
        else:
            color, rank = "0.75", 0.0
            heights.append(-0.08 if metric.maximize else 1.08)
        best = setting == method.best
        xs = [x for x, height in enumerate(heights) if height is not None]
        axes.plot(
            xs,
            [height for height in heights if height is not None],
            color=color,
            linewidth=3.0 if best else 1.0,
            alpha=1.0 if best else 0.35 + 0.5 * rank,
            zorder=3 if best else 2,
        )
    for x, (_, ticks) in enumerate(columns):
        axes.axvline(x, color="0.3", linewidth=0.8, zorder=1)
        for height, text in ticks:
            axes.annotate(
                text, (x, height), xytext=(4, 0), textcoords="offset points", fontsize=7, va="center", zorder=4,
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.7},
            )  # fmt: skip
    x = len(columns)
    axes.axvline(x, color="0.3", linewidth=0.8, zorder=1)
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        axes.annotate(
            f"{low + part * (high - low):.4g}", (x, part), xytext=(4, 0), textcoords="offset points", fontsize=7,
            va="center",
        )  # fmt: skip
    axes.set_xticks(range(x + 1), [*keys, metric.name])
    axes.set_yticks([])
    axes.set_xlim(-0.15, x + 0.4)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title(printable(title), parse_math=False)
    write_png(figure, path)


def write_report(out: Path, findings: Findings, title: str, facts: dict[str, str], target: float | None = None) -> None:
    """Write `report.md`, with the margins to `target`, the figures, and `records.jsonl` with every run in them."""
    import json

    metric = findings.metric
    write_atomic(out / RECORDS, [(json.dumps(run.record) + "\n").encode() for run in findings.all])
    lines = [f"# {printable(title)}", "", *(f"- {key}: {printable(value)}" for key, value in facts.items()), ""]
    if findings.reference is None:
        lines += ["No run has ended yet.", ""]
    else:
        header, rows = comparison_rows(findings)
        lines += markdown_table(header, rows)
        if target is not None:
            sign = -1.0 if metric.maximize else 1.0
            margins = [(m.name, sign * margin(list(m.values.values()), target)) for m in findings.methods if m.values]
            lines += [f"- {name}: margin to {target:g} {value:+.4f}" for name, value in margins] + [""]
        lines += [
            f"{metric.name}: of the `final` record, {'larger' if metric.maximize else 'smaller'} is better; mean and "
            "95% interval (Student's t) over the seeds. Differences are paired by seed. Speed-up: the steps of "
            f"{findings.reference.name} over those to its final value, paired by seed.",
            "",
        ]
        seeds = {run.seed for run in findings.grid} & {run.seed for m in findings.methods for run in m.compared}
        if seeds:
            lines += [
                "The settings were chosen on the same seeds that are shown: that flatters large grids.",
                "",
            ]
        lines += _rates(findings)
        pictures = [("curves", CURVES_PICTURE, lambda path: draw_curves(findings, path, title))]
        if any(_x_values(findings, "lr").values()):
            pictures.append(("learning rates", SWEEP_PICTURE, lambda path: draw_sweep(findings, path, title)))
        if findings.varying:
            pictures.append(
                ("parallel coordinates", PARALLEL_PICTURE, lambda path: draw_parallel(findings, path, title))
            )
        for what, name, draw in pictures:
            attempt(f"picture of {what}", lambda draw=draw, name=name: draw(out / name))  # type: ignore[misc]
            lines += [f"![{what}]({name})", ""]
    failed = [run for run in findings.all if run.record["status"] == "failed"]
    if failed:
        lines += ["## Failed runs", ""]
        lines += markdown_table(
            ("run", "reason"), [(str(run.point), printable(run.record["reason"])) for run in failed]
        )
    versions = Counter(json.dumps(run.record.get("versions")) for run in findings.all)
    if len(versions) > 1:
        lines += [f"The runs were made with {len(versions)} different sets of versions.", ""]
    seconds = sum(run.record["seconds"] for run in findings.all)
    lines += [f"{len(findings.all)} runs, {duration(seconds)} in all.", ""]
    write_atomic(out / REPORT, ["\n".join(lines).encode()])


def _rates(findings: Findings) -> list[str]:
    """The table behind the figure of the learning rates."""
    points = {name: line for name, line in _x_values(findings, "lr").items() if line}
    if not points:
        return []
    width = max(len(line) for line in points.values())
    rows = []
    for name, line in points.items():
        cells = [f"{value:.4f} ({key:g})" if math.isfinite(value) else f"failed ({key:g})" for key, value in line]
        rows.append([name, *cells, *[""] * (width - len(cells))])
    header = ["method", *(f"rate {index + 1}" for index in range(width))]
    return ["The best over the other options at each learning rate, in the grid:", "", *markdown_table(header, rows)]
