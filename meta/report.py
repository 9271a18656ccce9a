"""`docs/results.md`: the tables and the plots of the evaluation, made from its records."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from celo2.files import write_atomic
from celo2.meta.protocol import SEEDS, Contender, Setting
from celo2.meta.search import Search
from celo2.pretrain.intervals import Mean, mean, paired_difference
from celo2.pretrain.runlog import write_png
from celo2.pretrain.terminal import attempt
from celo2.tables import markdown_table
from celo2.theta import Theta

Record = dict[str, Any]
CURVES = "curves.png"
# what each trained theta is compared with: its start, and the tuned optimizer that it would replace
OPPONENTS = {"celo2": ("start", "muon"), "celo2-lm": ("start", "celo2", "muon"), "celo2-base": ("adam", "adamw")}


@dataclass(frozen=True)
class Row:
    """A method in a setting: the search of its options, and its runs at the best ones, by seed."""

    contender: Contender
    search: Search | None
    finals: Mapping[int, Record]

    @property
    def name(self) -> str:
        return self.contender.name

    @property
    def complete(self) -> bool:
        return len(self.finals) == len(SEEDS)

    @property
    def losses(self) -> dict[str, float]:
        """The reported loss of each seed."""
        return {str(seed): float(record["reported"]) for seed, record in self.finals.items()}

    @property
    def mean(self) -> Mean:
        return mean(list(self.losses.values()))


@dataclass(frozen=True)
class Table:
    """All methods on a text in a setting."""

    text: str
    name: str
    setting: Setting
    rows: Sequence[Row]

    @property
    def complete(self) -> list[Row]:
        """The rows of which all seeds have ended, the best first."""
        return sorted((row for row in self.rows if row.complete), key=lambda row: row.mean.value)

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name and row.complete), None)

    def difference(self, ours: str, theirs: str) -> Mean | None:
        """The mean of our loss minus theirs over the seeds; None before both are complete."""
        a, b = self.row(ours), self.row(theirs)
        return None if a is None or b is None else paired_difference(a.losses, b.losses)


def _model_section(tables: Sequence[Table]) -> list[str]:
    lines = [
        "Every method has as many runs to find its options in a setting, with one seed, on a split of its own; then "
        "five other seeds, the same for all, at the best. Losses are nats a byte on documents that nothing was chosen "
        "on: the mean over the seeds, and its 95 % interval (Student's t). Differences are paired: the same seed has "
        "the same weights, and the same batches. (edge) marks an option that was best at an end of its range.",
        "",
    ]
    if tables:
        lines += markdown_table(("method", ""), [(row.name, row.contender.what) for row in tables[0].rows])
    for table in tables:
        lines += _setting_section(table)
    return lines + _claims(tables)


def _setting_section(table: Table) -> list[str]:
    settings = table.setting.settings
    lines = [
        f"### {table.text}, {table.name}",
        "",
        f"A `modern` GPT of {settings.n_layer} layers, width {settings.n_head * settings.head_dim}, context "
        f"{settings.context}; {settings.steps:,} steps of {settings.sequences * settings.context} bytes, "
        f"{settings.warmup_frac:.0%} warm-up then cosine to 0, clip 1.0; {table.setting.runs} runs a method to find "
        "its options.",
        "",
    ]
    unfinished = [row for row in table.rows if not row.complete]
    if unfinished:
        states = ", ".join(f"{row.name} ({_progress(row, table.setting)})" for row in unfinished)
        lines += [f"**Not finished: {states}.** `python -m celo2.meta.evaluate` goes on.", ""]
    rows = []
    for row in table.complete:
        search = row.search
        assert search is not None and search.best is not None
        edges = row.contender.lattice.at_edge(search.best)
        tuned = " ".join(f"{option} {value:.3g}{' (edge)' * (option in edges)}" for option, value in search.best)
        cells = []
        for other in ("muon", "adamw"):
            difference = None if other == row.name else table.difference(row.name, other)
            cells.append("-" if difference is None else f"{difference:+.4f}")
        rows.append([row.name, tuned, f"{row.mean:.4f}", *cells])
    if rows:
        lines += markdown_table(["method", "best options", "loss", "minus muon", "minus adamw"], rows)
    return lines


def _progress(row: Row, setting: Setting) -> str:
    if row.finals:
        return f"{len(row.finals)} of {len(SEEDS)} seeds"
    return f"{len(row.search.done) if row.search is not None else 0} of {setting.runs} runs"


def _claims(tables: Sequence[Table]) -> list[str]:
    """Say of each trained theta in which settings it is better than its start and than the tuned optimizer."""
    lines = ["### What learning gained", ""]
    rows = []
    for ours, opponents in OPPONENTS.items():
        for theirs in opponents:
            for table in tables:
                difference = table.difference(ours, theirs)
                if difference is not None:
                    low, high = difference.value - difference.half_width, difference.value + difference.half_width
                    verdict = "better" if high < 0 else "**worse**" if low > 0 else "no difference is seen"
                    rows.append([ours, theirs, table.text, table.name, f"{difference:+.4f}", verdict])
    if not rows:
        return [*lines, "Nothing is complete yet.", ""]
    header = ["theta", "beside", "text", "setting", "paired difference of the loss", "the theta is"]
    return [*lines, *markdown_table(header, rows)]


def _searches(tables: Sequence[Table]) -> list[str]:
    """List the runs of each search, in order."""
    rows = []
    for table in tables:
        for row in table.rows:
            for number, point in enumerate(row.search.done if row.search is not None else (), start=1):
                assert row.search is not None
                tuned = " ".join(f"{option} {value:.3g}" for option, value in point)
                loss = f"{row.search.losses[point]:.4f}" + " (best)" * (point == row.search.best)
                rows.append([table.text, table.name, row.name, str(number), tuned, loss])
    if not rows:
        return []
    header = ["text", "setting", "method", "run", "options", "loss on the split for choosing"]
    return ["## The searches", "", *markdown_table(header, rows)]


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


def draw(tables: Sequence[Table], folder: Path) -> None:
    """Draw the mean validation curves of every text and setting into `folder`."""
    from matplotlib.figure import Figure

    shown = [table for table in tables if table.complete]
    texts = list(dict.fromkeys(table.text for table in shown))
    names = list(dict.fromkeys(table.name for table in shown))
    figure = Figure(figsize=(5 * len(names), 4 * len(texts)), layout="constrained")
    axes = figure.subplots(len(texts), len(names), squeeze=False)
    for table in shown:
        axis = axes[texts.index(table.text)][names.index(table.name)]
        for row in table.complete:
            runs = np.array([record["curve"] for record in row.finals.values()])
            (line,) = axis.plot(runs[0, :, 0], runs[..., 1].mean(0), label=f"{row.name} ({row.mean.value:.3f})")
            axis.fill_between(
                runs[0, :, 0], runs[..., 1].min(0), runs[..., 1].max(0), alpha=0.2, color=line.get_color()
            )
        lowest = table.complete[0].mean.value
        axis.set(xlabel="step", ylabel="validation loss, nats a byte", ylim=(lowest - 0.05, lowest + 0.7))
        axis.set_title(f"{table.text}, {table.name}", parse_math=False)
        _legend(axis)
        axis.grid(alpha=0.3)
    write_png(figure, folder / CURVES, dpi=100)


def write(
    path: Path,
    folder: Path,
    tables: Sequence[Table],
    horizons: Sequence[Record],
    thetas: Sequence[Theta],
    facts: Mapping[str, str],
) -> None:
    """Write the page at `path` and its picture into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[str] = []
    if any(table.complete for table in tables):
        attempt("picture", lambda: draw(tables, folder))
        pictures = [f"![validation curves]({folder.name}/{CURVES})", ""]
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
        "## Language models",
        "",
        *pictures,
        *_model_section(tables),
        "## Horizon",
        "",
        *_horizon_section(horizons),
        *_searches(tables),
    ]
    write_atomic(path, ["\n".join(lines).encode()])
