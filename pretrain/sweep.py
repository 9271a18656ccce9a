"""A sweep: a grid of options over the trainer or any program like it, and a report with the figures.

    python -m celo2.pretrain.sweep --out runs/lr --grid "opt=celo2,adamw lr=1e-4..1e-2:7" --best "seed=1,2,3" \
        -- --size nano --steps 300

A point is a process of its own in a folder of its own, so a sweep goes on where it was stopped, a point that fails is
recorded with its reason, and a changed grid keeps what is done. A program is one that takes --out-dir and --resume auto
and writes metrics.jsonl with `val` and `final` records (celo2.pretrain.runlog).
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import torch

from celo2.pretrain import options, require
from celo2.pretrain.device import device_name
from celo2.pretrain.folder_lock import locked
from celo2.pretrain.parallel import World
from celo2.pretrain.runlog import duration
from celo2.pretrain.sweep_points import PROGRAM, Point, make_points, parse_grid
from celo2.pretrain.sweep_report import Findings, Metric, Run, write_report
from celo2.pretrain.sweep_runner import Record, Runner, array_script, read_record
from celo2.pretrain.terminal import unfailing_streams

EPILOG = """what follows -- goes to every point; a first word that is no option is the program: a module
(default: celo2.pretrain.train_gpt) or a Python file

signals: Ctrl-C and SIGTERM let what runs save, and stop; the same command goes on; a second one
ends it at once"""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    argv = list(argv)
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="sweep",
        usage="%(prog)s --out DIR --grid GRID [--grid GRID ...] [--best GRID] [options] [-- [PROGRAM] OPTIONS]",
        description="Run a grid of options over the trainer or another program, and report it with figures.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    grid = parser.add_argument_group("the grid")
    grid.add_argument("--out", type=options.path, required=True, metavar="DIR", help="folder of the sweep")
    grid.add_argument(
        "--grid",
        action="append",
        required=True,
        metavar="GRID",
        help='"opt=celo2,muon lr=1e-5..1e-3:7 seed=0": lists, and ranges low..high:count on a log scale; give it again '
        "for another product",
    )
    grid.add_argument(
        "--best",
        metavar="GRID",
        help='after the grid, at the best setting of each method: "seed=1,2,3"; these runs are what is compared',
    )
    grid.add_argument(
        "--by", default="opt,weights", metavar="OPTIONS", help="what makes a method (default: opt,weights)"
    )
    report = parser.add_argument_group("the report")
    report.add_argument("--metric", default="loss", metavar="NAME", help="of val and final records (default: loss)")
    report.add_argument("--maximize", action="store_true", help="a larger metric is better")
    report.add_argument("--reference", metavar="METHOD", help="what others are compared with (default: the first)")
    report.add_argument(
        "--target", type=float, metavar="X", help="a value to reach: (X - mean) * sqrt(n) of each method"
    )
    report.add_argument("--title", metavar="TEXT", help="of the report (default: the folder's name)")
    report.add_argument("--report", action="store_true", help="only write the report of what has ended")
    run = parser.add_argument_group("running")
    run.add_argument(
        "--workers", type=options.whole_number(1), metavar="N", help="points at once (default: the GPUs, or the cores)"
    )
    run.add_argument(
        "--launcher", type=options.given, metavar="COMMAND", help='as "torchrun --standalone --nproc-per-node 8"'
    )
    run.add_argument("--limit-minutes", type=float, metavar="M", help="a point that takes longer has failed")
    run.add_argument("--retry-failed", action="store_true", help="run the points that failed again")
    run.add_argument("--keep-checkpoints", action="store_true", help="keep those of points that are done")
    run.add_argument("--list", action="store_true", help="print the points and where they stand, and stop")
    run.add_argument("--point", type=options.whole_number(0), metavar="N", help="run point N of the list alone")
    run.add_argument(
        "--slurm", action="store_true", help="print a script of Slurm with a task for each point, and stop"
    )
    run.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help='a line of that script, as "--gres=gpu:8"'
    )
    arguments = parser.parse_args(argv[:split])
    rest = argv[split + 1 :]
    arguments.program = rest.pop(0) if rest and not rest[0].startswith("-") else PROGRAM
    arguments.fixed = rest
    if any(word in ("--out-dir", "--resume") for word in rest):
        parser.error("--out-dir and --resume of the points are the sweep's own; leave them out after --")
    if arguments.limit_minutes is not None and not arguments.limit_minutes > 0:
        parser.error(f"--limit-minutes {arguments.limit_minutes}: must be more than 0")
    return arguments


class Sweep:
    """A grid with its records, and the points that follow from them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.out: Path = arguments.out
        self.program, self.fixed = arguments.program, tuple(arguments.fixed)
        self.metric = Metric(arguments.metric, arguments.maximize)
        self.by = [key.strip().replace("_", "-") for key in arguments.by.split(",") if key.strip()]
        self.reference = arguments.reference
        self.points = make_points(arguments.grid, self.program, self.fixed)
        self.confirming = [] if arguments.best is None else parse_grid(arguments.best)

    def runs(self, points: Sequence[Point]) -> list[Run]:
        """The points that have ended, with their records."""
        found = ((point, read_record(self.out, point)) for point in points)
        return [Run(point, record) for point, record in found if record is not None]

    def best_points(self) -> list[Point]:
        """The points of `--best`, for every method whose grid has ended."""
        findings = Findings(self.runs(self.points), [], self.metric, self.by)
        ended = {run.point for run in findings.grid}
        points = []
        for method in findings.methods:
            whole = [point for point in self.points if point.method(self.by) == method.name]
            if method.best is None or not all(point in ended for point in whole):
                continue
            for changes in self.confirming:
                settings = dict(method.best) | changes
                points.append(Point(self.program, self.fixed, tuple(settings.items())))
        return points

    def all_points(self) -> list[Point]:
        return [*self.points, *(point for point in self.best_points() if point not in self.points)]

    def findings(self) -> Findings:
        grid = self.runs(self.points)
        names = dict.fromkeys(point.method(self.by) for point in self.points)
        if self.reference is not None and self.reference not in names:
            raise ValueError(f"--reference {self.reference}: no such method; choose one of {', '.join(names)}")
        # until it has a run, the first one that has
        reference = self.reference if any(run.point.method(self.by) == self.reference for run in grid) else None
        return Findings(grid, self.runs(self.best_points()), self.metric, self.by, reference)


def _state(record: Record | None, metric: Metric) -> str:
    if record is None:
        return "to do"
    if record["status"] == "failed":
        return f"failed: {record['reason']}"
    value = record["metrics"].get(metric.name)
    return f"{metric.name} {value:.4f}" if value is not None else f"done, without {metric.name}"


def sweep(arguments: argparse.Namespace, argv: Sequence[str], held: ExitStack) -> int:
    require("matplotlib", "scipy", "tqdm")
    from tqdm import tqdm

    plan = Sweep(arguments)
    metric, out = plan.metric, plan.out
    if arguments.program.endswith(".py") and not Path(arguments.program).is_file():
        raise ValueError(f"{arguments.program}: no such program")
    if arguments.slurm:
        without = [word for word in argv if word != "--slurm"]
        print(array_script(len(plan.points), without, out, arguments.sbatch), end="")
        return 0
    if arguments.list:
        for index, point in enumerate(plan.all_points()):
            print(f"{index:>4}  {point}  | {_state(read_record(out, point), metric)}")
        return 0

    gpus = [str(index) for index in range(torch.cuda.device_count())]
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        gpus = [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    launcher = shlex.split(arguments.launcher or "")
    workers = arguments.workers or (1 if launcher else len(gpus) or os.cpu_count() or 1)

    if arguments.point is not None:
        points = plan.all_points()
        if arguments.point >= len(points):
            raise ValueError(f"--point {arguments.point}: the sweep has points 0 to {len(points) - 1}")
        points, workers = [points[arguments.point]], 1
    else:
        points = plan.points
        out.mkdir(parents=True, exist_ok=True)
        # tasks of a cluster share the folder, each with a point of its own
        held.enter_context(locked(out, World(0, 1, 0, 1, torch.device("cpu"))))

    def ended(point: Point, record: Record) -> None:
        tqdm.write(f"{point} | {_state(record, metric)} | {duration(record['seconds'])}")
        bar.update()

    def missing(wanted: Sequence[Point]) -> list[Point]:
        records = [(point, read_record(out, point)) for point in wanted]
        again = arguments.retry_failed
        return [p for p, record in records if record is None or (again and record["status"] == "failed")]

    runner = Runner(
        out,
        workers=workers,
        gpus=[] if launcher else gpus,
        launcher=launcher,
        limit=None if arguments.limit_minutes is None else 60 * arguments.limit_minutes,
        keep_checkpoints=arguments.keep_checkpoints,
        ended=ended,
    )

    def stop(number: int, frame: FrameType | None) -> None:
        runner.stop(number)

    status = 0
    if not arguments.report:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        # a closed terminal does not end a sweep
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        todo = missing(points)
        print(
            f"sweep: {len(points)} points of {plan.program}, {len(points) - len(todo)} ended, {len(todo)} to do, "
            f"{min(workers, max(1, len(todo)))} at once; {device_name(torch.device('cpu'))}"
        )
        with tqdm(total=len(todo), unit="point", disable=None) as bar:
            runner.run(todo)
            if arguments.point is None and plan.confirming and not runner.stopped_by:
                todo = missing(plan.best_points())
                bar.total += len(todo)
                runner.run(todo)
        if runner.stopped_by:
            print(f"{signal.Signals(runner.stopped_by).name}: what ran is saved; the same command goes on")
            status = 130 if runner.stopped_by == signal.SIGINT else 0
    if arguments.point is not None:
        return status
    findings = plan.findings()
    facts = {
        "program": shlex.join([plan.program, *plan.fixed]),
        "points": f"{len(findings.grid)} of {len(plan.points)} ended",
    }
    write_report(out, findings, arguments.title or out.name, facts, arguments.target)
    for method in findings.methods:
        if method.best is not None:
            best = " ".join(f"{key}={value}" for key, value in method.best)
            print(f"best: {best} | {metric.name} {method.value(method.best):.4f}")
    print(f"-> {out / 'report.md'}")
    failed = sum(run.record["status"] == "failed" for run in findings.all)
    if failed:
        print(f"{failed} runs failed: their reasons are in the report; --retry-failed runs them again")
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a mistake in it is one line on standard error and exit status 1."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse_arguments(argv)
    try:
        with unfailing_streams(), ExitStack() as held:
            return sweep(arguments, argv, held)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
