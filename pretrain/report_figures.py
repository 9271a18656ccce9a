"""The figures of a report on several runs: losses, rates and norms, one colour for all seeds of a setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celo2.pretrain.comparison import Comparison, Log
from celo2.pretrain.curves import smoothed
from celo2.pretrain.runlog import write_png
from celo2.pretrain.terminal import printable

_UNITS = {"loss": "loss (nats a token)", "bits_per_byte": "bits per byte"}
STYLES = ("-", "--", ":", "-.")
Points = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """What is on the axes, and a run's points; `crop` leaves out the first steps of a loss, far above the rest."""

    xlabel: str
    ylabel: str
    points: Callable[[Log], Points]
    log: bool = False
    crop: bool = False


def _draw(comparison: Comparison, panels: Sequence[Panel], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    rows, columns = math.ceil(len(panels) / 3), min(3, len(panels))
    figure = Figure(figsize=(max(5.0, 4.4 * columns), 3.6 * rows + 0.4), dpi=120, layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for axes, panel in zip(all_axes, panels, strict=False):
        heights: list[float] = []
        for index, group in enumerate(comparison.groups().values()):
            style = {"color": f"C{index % 10}", "linestyle": STYLES[index // 10 % len(STYLES)]}
            label = group[0].name + (f", one of {len(group)} seeds" if len(group) > 1 else "")
            for log in group:
                xs, ys = panel.points(log)
                # one validation is a point
                marker = "o" if len(xs) == 1 else ""
                (line,) = axes.plot(xs, ys, marker=marker, linewidth=1.2, alpha=0.85, **style)
                handles.setdefault(label, line)
                heights += [y for y in ys if math.isfinite(y)]
        axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
        axes.grid(alpha=0.3)
        for axis, label in ((axes.xaxis, panel.xlabel), (axes.yaxis, panel.ylabel)):
            if label.startswith("tokens"):
                axis.set_major_formatter(EngFormatter(sep=""))
        if panel.log and heights and min(heights) > 0:
            axes.set_yscale("log")
        if panel.crop and len(heights) > 20:
            low, middle, high = min(heights), sorted(heights)[len(heights) // 2], max(heights)
            if high - middle > 4 * (middle - low) > 0:
                axes.set_ylim(low - 0.1 * (middle - low), middle + 3 * (middle - low))
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    # a name is no formula
    labels = [printable(name).replace("$", r"\$") for name in handles]
    figure.legend(handles.values(), labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=8)
    write_png(figure, path)


def _against_all(points: Callable[[Log], tuple[list[float], list[float]]], ylabel: str) -> list[Panel]:
    """A panel against steps, tokens and training time; `points` are steps and heights."""

    def against(of: Callable[[Log, list[float]], Sequence[float]]) -> Callable[[Log], Points]:
        def both(log: Log) -> Points:
            steps, ys = points(log)
            return of(log, steps), ys

        return both

    axes = {
        "optimizer step": against(lambda log, steps: steps),
        "tokens": against(lambda log, steps: log.tokens_at(steps)),
        "training time (minutes)": against(lambda log, steps: [s / 60 for s in log.seconds_at(steps)]),
    }
    return [Panel(xlabel, ylabel, found, crop=True) for xlabel, found in axes.items()]


def draw_validation(comparison: Comparison, path: Path) -> None:
    """The validation loss against steps, tokens and training time."""
    metric = comparison.metric
    panels = _against_all(lambda log: (log.val["step"], log.val[metric]), f"validation {_UNITS[metric]}")
    _draw(comparison, panels, path)


def draw_training(comparison: Comparison, path: Path) -> None:
    """The training loss, smoothed over a fiftieth of the run's steps, against steps, tokens and training time."""
    metric = comparison.metric

    def points(log: Log) -> tuple[list[float], list[float]]:
        return log.train["step"], smoothed(log.train.get(metric, []), log.steps / 50)

    _draw(comparison, _against_all(points, f"training {_UNITS[metric]}, smoothed"), path)


def draw_rates(comparison: Comparison, path: Path) -> None:
    """The learning rate of the matrices, the gradient norm before clipping and tokens a second, against steps."""

    def column(key: str) -> Callable[[Log], Points]:
        return lambda log: (log.train["step"], log.train.get(key, [math.nan] * len(log.train["step"])))

    names = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_s": "tokens a second"}
    panels = [Panel("optimizer step", label, column(key), log=key == "grad_norm") for key, label in names.items()]
    _draw(comparison, panels, path)


def norm_kinds(comparison: Comparison) -> list[str]:
    """The kinds of parameters of which a run has norms."""
    keys = dict.fromkeys(key for log in comparison.logs for key in log.norms if key.startswith("update_ratio/"))
    return [key.removeprefix("update_ratio/") for key in keys]


def draw_norms(comparison: Comparison, path: Path) -> None:
    """The RMS of a step's update over that of the weights, a panel for each kind of parameter."""

    def ratio(kind: str) -> Callable[[Log], Points]:
        key = f"update_ratio/{kind}"
        return lambda log: (log.norms["step"] if key in log.norms else [], log.norms.get(key, []))

    kinds = norm_kinds(comparison)
    panels = [Panel("optimizer step", f"update / weight RMS, {kind}", ratio(kind), log=True) for kind in kinds]
    _draw(comparison, panels, path)
