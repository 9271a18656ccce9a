"""`docs/results.md`: the tables and the plot of the evaluation, made from its records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from celo2.files import write_atomic
from celo2.meta.language_model import Method, Settings
from celo2.pretrain.runlog import write_png
from celo2.pretrain.terminal import attempt
from celo2.tables import markdown_table
from celo2.theta import Theta

Record = dict[str, Any]
# two-sided 95 % quantiles of Student's t by degrees of freedom
T_QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
REFERENCE = "adamw"
CURVES = "curves.png"
SWEEPS = "sweeps.png"


@dataclass(frozen=True)
class Comparison:
    """A method with the runs of its sweep and, at its best learning rate, of the seeds."""

    method: Method
    sweep: Sequence[Record]
    finals: Sequence[Record]

    @property
    def losses(self) -> list[float]:
        return [float(record["final"]) for record in self.finals]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of the mean over the seeds (Student's t)."""
        n = len(self.losses)
        return T_QUANTILE[n - 1] * statistics.stdev(self.losses) / math.sqrt(n)

    @property
    def complete(self) -> bool:
        return len(self.sweep) == len(self.method.learning_rates) and len(self.finals) >= 2

    @property
    def curve(self) -> np.ndarray:
        """Mean validation curve, [points, 2]: step and loss."""
        return np.mean([record["curve"] for record in self.finals], axis=0)

    def steps_to(self, target: float) -> float | None:
        """Return the step at which the mean curve first reaches `target`, between validations by a straight line."""
        steps, losses = self.curve.T
        for i in np.flatnonzero(losses <= target):
            if i == 0:
                return float(steps[0])
            part = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
            return float(steps[i - 1] + part * (steps[i] - steps[i - 1]))
        return None


def _model_section(comparisons: Sequence[Comparison], settings: Settings) -> list[str]:
    complete = [c for c in comparisons if c.complete]
    unfinished = [c.method.name for c in comparisons if not c.complete]
    lines = []
    if unfinished:
        lines += [f"**Not finished: {', '.join(unfinished)}.** `python -m celo2.meta.evaluate` goes on.", ""]
    if not complete:
        return lines + _sweeps(comparisons)
    reference = next((c for c in complete if c.method.name == REFERENCE), None)
    rows = []
    for c in sorted(complete, key=lambda c: c.mean):
        steps = ratio = "-"
        if reference is not None:
            reached = c.steps_to(reference.mean)
            steps = f"{reached:.0f}" if reached is not None else "not reached"
            ratio = f"{settings.steps / reached:.2f}x" if reached else "-"
        lr = f"{c.finals[0]['lr']:.3g}"
        rates = [r["lr"] for r in c.sweep]
        edge = " (edge)" if c.finals[0]["lr"] in (min(rates), max(rates)) else ""
        seconds = statistics.median(r["seconds"] for r in c.finals)
        rows.append([c.method.name, lr + edge, f"{c.mean:.4f} +- {c.half_width:.4f}", steps, ratio, f"{seconds:.0f} s"])
    runs = complete[0].finals[0]
    lines += [
        f"A `modern` GPT of {runs['parameters']:,} parameters ({settings.n_layer} layers, width "
        f"{settings.n_head * settings.head_dim}, context {settings.context}) on the embedded Wikipedia text, bytes, "
        f"{settings.steps} steps of {settings.sequences * settings.context} tokens, {settings.warmup_frac:.0%} warm-up "
        "then cosine to 0, clip 1.0, no weight decay. Every method is swept over seven learning rates with one seed, "
        "then run with three other seeds at its best. Loss: nats a byte on held-out articles, mean and 95 % interval "
        "(Student's t) over the seeds.",
        "",
    ]
    lines += markdown_table(
        ["method", "best lr", "final validation loss", f"steps to {REFERENCE}'s final loss", "speed-up", "time a run"],
        rows,
    )
    lines += [
        "`momentum` and `adam` are closed-form thetas in the same rule, without training: the bar that learned "
        "weights must pass. `muon` is `torch.optim.Muon` on the hidden matrices, with AdamW at the same rate on the "
        "rest.",
        "",
    ]
    lines += [f"![validation curves](results/{CURVES})", "", f"![learning-rate sweeps](results/{SWEEPS})", ""]
    lines += _claims({c.method.name: c for c in complete})
    return lines + _sweeps(comparisons)


def _sweeps(comparisons: Sequence[Comparison]) -> list[str]:
    """Tabulate the recorded runs of each sweep, by learning rate."""
    rows = []
    for c in comparisons:
        finals = {r["lr"]: f"{r['final']:.4f} ({r['lr']:.3g})" for r in c.sweep}
        if finals:
            rows.append([c.method.name, *(finals.get(lr, "-") for lr in c.method.learning_rates)])
    if not rows:
        return []
    header = ["method", *(f"rate {i + 1}" for i in range(len(rows[0]) - 1))]
    return [
        "### The sweeps",
        "",
        "Final validation loss of one seed, and the learning rate.",
        "",
        *markdown_table(header, rows),
    ]


def _claims(by_name: dict[str, Comparison]) -> list[str]:
    """State each goal with its numbers, reached or not."""
    lines = ["### Goals", ""]

    def claim(text: str, ours: str, theirs: str, apart: bool) -> None:
        if ours not in by_name or theirs not in by_name:
            return
        a, b = by_name[ours], by_name[theirs]
        reached = a.mean <= b.mean
        if apart:
            reached = a.mean + a.half_width < b.mean - b.half_width
        verdict = "reached" if reached else "**not reached**"
        lines.append(
            f"- {text}: {a.mean:.4f} +- {a.half_width:.4f} against {b.mean:.4f} +- {b.half_width:.4f}, {verdict}."
        )

    claim("`celo2` below tuned AdamW, intervals apart", "celo2", "adamw", True)
    claim("`celo2` at least as good as Muon swept over its rate alone", "celo2", "muon", False)
    claim("`celo2-base` at least as good as tuned AdamW", "celo2-base", "adamw", False)
    claim("`celo2` at least as good as its closed form", "celo2", "momentum", False)
    claim("`celo2-base` at least as good as its closed form", "celo2-base", "adam", False)
    return [*lines, ""]


def _horizon_section(records: Sequence[Record]) -> list[str]:
    if not records:
        return ["No long unroll is recorded yet: run `python -m celo2.meta.evaluate --only horizon`.", ""]
    steps = max(r["steps"] for r in records)
    rows = []
    keys = sorted({(r["theta"], r["task"], r["scale"]) for r in records})
    for theta, task, scale in keys:
        runs = [r for r in records if (r["theta"], r["task"], r["scale"]) == (theta, task, scale)]
        rows.append(
            [
                theta,
                task,
                f"{scale:g}",
                f"{statistics.fmean(r['final_loss'] for r in runs):.4g}",
                f"{max(r['drawup'] for r in runs):.3g}",
                str(sum(r["non_finite"] for r in runs)),
                f"{statistics.fmean(r['weight_rms'] for r in runs):.3g}",
            ]
        )
    bad = sum(r["non_finite"] for r in records)
    lines = [
        f"{steps:,} inner steps at the meta-training's constant rate, from two starts each; the longest fresh "
        "trajectory of the meta-training has 2,000. At scale s a step moves the network by an RMS of s / 1000 an "
        "element, so s = 1000 takes steps far larger than the weights: there the question is only whether it stays "
        "finite. Final loss: mean of the last 500 steps. Draw-up: the largest rise of the averaged loss over its "
        "running minimum.",
        "",
        f"Losses that were not finite: {bad} of {len(records) * steps:,}.",
        "",
    ]
    header = ["theta", "task", "scale", "final loss", "largest draw-up", "not finite", "weight RMS"]
    return lines + markdown_table(header, rows)


def _thetas_section(thetas: Sequence[Theta]) -> list[str]:
    shown = ("recipe", "data", "seed", "outer_steps", "inner_steps", "seconds", "machine", "torch", "git", "selection")
    rows = [[key, *(theta.card.get(key, "-") for theta in thetas)] for key in shown]
    rows.append(["sha256", *(theta.sha256[:16] for theta in thetas)])
    return markdown_table(["", *(theta.name for theta in thetas)], rows)


def _legend(axis: Any) -> None:
    for text in axis.legend().get_texts():
        # a name is no formula
        text.set_parse_math(False)


def draw(comparisons: Sequence[Comparison], folder: Path) -> None:
    """Draw the mean validation curves and the sweeps into `folder`."""
    from matplotlib.figure import Figure

    complete = [c for c in comparisons if c.complete]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for c in complete:
        runs = np.array([record["curve"] for record in c.finals])
        (line,) = axis.plot(runs[0, :, 0], runs[..., 1].mean(0), label=f"{c.method.name} ({c.mean:.3f})")
        axis.fill_between(runs[0, :, 0], runs[..., 1].min(0), runs[..., 1].max(0), alpha=0.2, color=line.get_color())
    lowest = min(c.mean for c in complete)
    axis.set(xlabel="step", ylabel="validation loss, nats a byte", ylim=(lowest - 0.03, lowest + 0.9))
    _legend(axis)
    axis.grid(alpha=0.3)
    write_png(figure, folder / CURVES, dpi=110)

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for c in complete:
        axis.plot([r["lr"] for r in c.sweep], [r["final"] for r in c.sweep], marker="o", label=c.method.name)
    best = min(r["final"] for c in complete for r in c.sweep)
    axis.set(xscale="log", xlabel="learning rate", ylabel="final validation loss", ylim=(best - 0.05, best + 1.0))
    _legend(axis)
    axis.grid(alpha=0.3)
    write_png(figure, folder / SWEEPS, dpi=110)


def write(
    path: Path,
    folder: Path,
    comparisons: Sequence[Comparison],
    horizons: Sequence[Record],
    settings: Settings,
    thetas: Sequence[Theta],
    facts: dict[str, str],
) -> None:
    """Write the page at `path` and its pictures into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(c.complete for c in comparisons):
        attempt("picture", lambda: draw(comparisons, folder))
    machine = ", ".join(f"{key} {value}" for key, value in facts.items())
    lines = [
        "# Results",
        "",
        "Written by `python -m celo2.meta.evaluate`, nothing by hand; the records are in `docs/results/`.",
        f"Page made with: {machine}.",
        "",
        "## The bundled thetas",
        "",
        *_thetas_section(thetas),
        "## Language model",
        "",
        *_model_section(comparisons, settings),
        "## Horizon",
        "",
        *_horizon_section(horizons),
    ]
    write_atomic(path, ["\n".join(lines).encode()])
