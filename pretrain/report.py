"""A page that compares runs of the trainer: a table, the figures, and means over seeds.

    python -m celo2.pretrain.report runs/nano-celo2 runs/nano-adamw --out runs/comparison

A run is its folder or its `metrics.jsonl`, ended or under way. The page is `report.md` with PNG files beside it, and
`report.html`, one file with the pictures inside.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from celo2.files import write_atomic
from celo2.pretrain import options, require
from celo2.pretrain.comparison import BITS, Comparison, Log, names_of, read_log
from celo2.pretrain.page import Page
from celo2.pretrain.report_figures import draw_norms, draw_rates, draw_training, draw_validation, norm_kinds
from celo2.pretrain.runlog import METRICS, REPORT, duration, quantity
from celo2.pretrain.sweep_report import comparison_rows
from celo2.pretrain.terminal import unfailing_streams

HTML = "report.html"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="report", description="Compare runs of the trainer in one page with pictures; the first is the reference."
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=options.path,
        metavar="RUN",
        help=f"a run's folder, or its {METRICS}; ended or under way",
    )
    parser.add_argument(
        "--out", type=options.path, metavar="DIR", help="folder of the page (default: comparison, beside the runs)"
    )
    parser.add_argument(
        "--target", type=float, metavar="X", help="the loss to reach (default: that of the worst run that has ended)"
    )
    parser.add_argument("--title", type=options.given, help="of the page (default: the folder's name)")
    arguments = parser.parse_args(argv)
    if arguments.target is not None and not math.isfinite(arguments.target):
        parser.error(f"--target {arguments.target}: must be a finite number")
    return arguments


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def _summary(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """A row a run: what differs, how far it is, and what came out."""
    loss = "bits per byte" if comparison.metric == BITS else "loss"
    header = ["run", *comparison.differing, "steps", "tokens", f"last {loss}", f"lowest {loss}"]
    header += ["" if comparison.metric == BITS else "bits per byte", "time", "tokens/s", "optimizer", "MFU"]
    header += ["memory", "skipped"]
    rows = []
    for log in comparison.logs:
        share, mfu, memory = (log.median(key) for key in ("optimizer_share", "mfu", "memory_gib"))
        if math.isnan(share):
            # a log from before it was written down
            share = log.median("optimizer_ms") / log.median("step_ms")
        cells = [log.name, *(log.settings.get(key, "") or "-" for key in comparison.differing)]
        cells += [
            f"{log.step:,}" + ("" if log.finished else f" of {log.steps:,}"),
            quantity(log.step * log.batch_tokens),
        ]
        cells += [_number(log.last(comparison.metric), ".4f"), _number(log.least(comparison.metric), ".4f")]
        cells += [_number(log.last(BITS), ".4f"), duration(log.seconds[-1] if log.seconds else 0.0)]
        speed = log.median("tokens_per_s")
        cells += [quantity(speed) if math.isfinite(speed) else "-", _number(share, ".1%"), _number(mfu, ".1%")]
        cells += [f"{memory:.2f} GiB" if math.isfinite(memory) else "-", f"{sum(log.train.get('skipped', [])):.0f}"]
        rows.append(cells)
    # a number that no run has, and bits per byte where they are the metric already
    kept = [i for i, name in enumerate(header) if name and (name != "MFU" or any(row[i] != "-" for row in rows))]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _at_equal(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """A row a run: the loss after as many tokens as all have, and the tokens to the target, beside the first run."""
    first = comparison.tokens_to_target(comparison.logs[0])
    header = ["run", f"after {quantity(comparison.common_tokens)} tokens", "minus the first"]
    header += [f"tokens to {_number(comparison.target, '.4f')}", "steps", "speed-up over the first"]
    base = comparison.at_common_tokens(comparison.logs[0])
    rows = []
    for log in comparison.logs:
        value, tokens = comparison.at_common_tokens(log), comparison.tokens_to_target(log)
        cells = [log.name, _number(value, ".4f"), _number(value - base, "+.4f")]
        cells += ["not reached" if tokens is None else quantity(tokens)]
        cells += ["-" if tokens is None else f"{tokens / log.batch_tokens:,.0f}"]
        rows.append([*cells, f"{first / tokens:.2f}x" if first and tokens else "-"])
    return header, rows


def write_page(comparison: Comparison, out: Path, title: str) -> Page:
    """Write `report.md`, `report.html` and the figures into a folder; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    page = Page(title)
    page.bullets([f"Warning: {warning}" for warning in comparison.warnings()])
    page.table(*_summary(comparison))
    page.text(
        "Times are of the training steps alone; tokens/s, the optimizer's part of a step, MFU and memory (of the first "
        "process: on a GPU the most so far, on a CPU what the process had) are medians over the steps."
    )
    if comparison.common_tokens > 0:
        page.heading("At equal tokens, and to a target")
        page.table(*_at_equal(comparison))
        what = "bits per byte" if comparison.metric == BITS else "loss"
        page.text(
            f"Of the validation {what}, on straight lines between validations. The target, without --target, is "
            "what the worst of the runs that have ended ended at; the speed-up is tokens to it, the first run's over "
            "this one's."
        )
    findings = comparison.findings()
    if findings is not None:
        page.heading("Over seeds")
        (method, count, _, *rest), rows = comparison_rows(findings)
        page.table([method, count, "setting", *rest], rows)
        page.text(
            "Runs that have ended and differ by their seed alone are one row: mean and 95% interval (Student's t) of "
            "what they ended at; differences and speed-ups are paired by seed."
        )
    figures = [("validation loss", draw_validation), ("training loss", draw_training), ("rates", draw_rates)]
    if norm_kinds(comparison):
        figures.append(("norms", draw_norms))
    for what, draw in figures:
        path = out / f"{what.split()[0]}.png"
        draw(comparison, path)
        page.picture(what, path)
    about = comparison.logs[0].about
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    page.text(f"{comparison.logs[0].name} was made on {about.get('device')}, with {versions}. The runs:")
    page.bullets([f"{log.name}: {log.path}" for log in comparison.logs])
    write_atomic(out / REPORT, [page.markdown().encode()])
    write_atomic(out / HTML, [page.html().encode()])
    return page


def report(arguments: argparse.Namespace) -> int:
    require("matplotlib", "scipy")
    paths: list[Path] = []
    for path in arguments.runs:
        if (path / HTML).is_file() and not (path / METRICS).exists():
            # as `runs/*` names it
            print(f"{path}: a report, left out")
        else:
            paths.append(path)
    if not paths:
        raise ValueError("no run is left: give folders of runs")
    logs: list[Log] = [read_log(path, name) for path, name in zip(paths, names_of(paths), strict=True)]
    comparison = Comparison(logs, arguments.target)
    folders = [log.path.resolve().parent for log in logs]
    out: Path = arguments.out or Path(os.path.relpath(os.path.commonpath([f.parent for f in folders]))) / "comparison"
    if (out / METRICS).exists():
        raise ValueError(f"--out {out} is the folder of a run, whose own {REPORT} would be lost: give another")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder")
    write_page(comparison, out, arguments.title or f"{out.resolve().name}: {len(logs)} run{'s' * (len(logs) > 1)}")
    for warning in comparison.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    for log in logs:
        state = "" if log.finished else f" of {log.steps}: not ended"
        print(
            f"{log.name} | step {log.step}{state} | {comparison.metric} {_number(log.last(comparison.metric), '.4f')}"
        )
    print(f"-> {out / REPORT}, {out / HTML}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a mistake in it or a damaged log is one line on standard error and exit status 1."""
    arguments = parse_arguments(argv)
    try:
        with unfailing_streams():
            return report(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
