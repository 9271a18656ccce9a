"""The figures of a report on several runs: losses, rates and norms, one colour for all seeds of a setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from celo2.pretrain.comparison import Comparison, Log
from celo2.pretrain.curves import smoothed
from celo2.pretrain.runlog import write_png
from celo2.pretrain.terminal import printable

# a panel: what is on its axes, and a run's points
Panel = tuple[str, str, Callable[[Log], tuple[Sequence[float], Sequence[float]]]]
_UNITS = {"loss": "loss (nats a token)", "bits_per_byte": "bits per byte"}
STYLES = ("-", "--", ":", "-.")


def _draw(comparison: Comparison, panels: Sequence[Panel], path: Path, *, log_scale: bool = False) -> None:
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / 3)
    columns = min(3, len(panels))
    figure = Figure(figsize=(max(5.0, 4.4 * columns), 3.6 * rows + 0.4), dpi=120, layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    handles: dict[str, Any] = {}
    for axes, (xlabel, ylabel, points) in zip(all_axes, panels, strict=False):
        heights = []
        for index, group in enumerate(comparison.groups().values()):
            for log in group:
                xs, ys = points(log)
                style = STYLES[index // 10 % len(STYLES)]
                # one validation is a point
                marker = "o" if len(xs) == 1 else ""
                (line,) = axes.plot(xs, ys, style, color=f"C{index % 10}", marker=marker, linewidth=1.2, alpha=0.85)
                label = log.name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} more seeds"
                handles.setdefault(label, line)
                heights += [y for y in ys if math.isfinite(y)]
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.3)
        if log_scale and heights and min(heights) > 0:
            axes.set_yscale("log")
        if heights and not log_scale and len(heights) > 20:
            # the first steps are far above the rest
            _crop(axes, heights)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    labels = [printable(name).replace("$", r"\$") for name in handles]
    figure.legend(handles.values(), labels, loc="outside lower center", ncols=min(3, len(labels)), fontsize=8)
    write_png(figure, path)


def _crop(axes: Any, heights: list[float]) -> None:
    low, high = min(heights), max(heights)
    middle = sorted(heights)[len(heights) // 2]
    if high - middle > 4 * (middle - low) > 0:
        axes.set_ylim(low - 0.1 * (middle - low), middle + 3 * (middle - low))


def _against_all(points: Callable[[Log], tuple[list[float], list[float]]], ylabel: str) -> list[Panel]:
    """A panel against steps, tokens and training time; `points` are steps and heights."""

    def against(of: Callable[[Log, list[float]], Sequence[float]]) -> Callable[[Log], tuple[Any, Any]]:
        def both(log: Log) -> tuple[Sequence[float], Sequence[float]]:
            steps, ys = points(log)
            return of(log, steps), ys

        return both

    return [
        ("optimizer step", ylabel, against(lambda log, steps: steps)),
        ("tokens", ylabel, against(lambda log, steps: log.tokens_at(steps))),
        ("training time (minutes)", ylabel, against(lambda log, steps: [s / 60 for s in log.seconds_at(steps)])),
    ]


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

    def column(key: str) -> Callable[[Log], tuple[list[float], list[float]]]:
        return lambda log: (log.train["step"], log.train.get(key, [math.nan] * len(log.train["step"])))

    names = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_s": "tokens a second"}
    _draw(comparison, [("optimizer step", label, column(key)) for key, label in names.items()], path)


def norm_kinds(comparison: Comparison) -> list[str]:
    """The kinds of parameters of which a run has norms."""
    keys = dict.fromkeys(key for log in comparison.logs for key in log.norms if key.startswith("update_ratio/"))
    return [key.removeprefix("update_ratio/") for key in keys]


def draw_norms(comparison: Comparison, path: Path) -> None:
    """The RMS of a step's update over that of the weights, a panel for each kind of parameter."""

    def ratio(kind: str) -> Callable[[Log], tuple[list[float], list[float]]]:
        key = f"update_ratio/{kind}"
        return lambda log: (log.norms["step"] if key in log.norms else [], log.norms.get(key, []))

    panels = [("optimizer step", f"update / weight RMS, {kind}", ratio(kind)) for kind in norm_kinds(comparison)]
    _draw(comparison, panels, path, log_scale=True)
