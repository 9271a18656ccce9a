"""Running the points of a sweep: several at once, each in a folder of its own, recorded when it ends.

`OUT/points/ID/` has the run's own files in `run/`, what it printed in `output.txt` and, once it has ended,
`record.json`. Nothing is read from what a run prints but the last line of one that failed: its numbers are those of its
`metrics.jsonl`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from celo2.files import write_atomic
from celo2.pretrain.runlog import METRICS, iterate_metrics
from celo2.pretrain.sweep_points import Point

Record = dict[str, Any]
RECORD = "record.json"
OUTPUT = "output.txt"
RUN = "run"
# seconds that a run has to save after a signal
GRACE = 60.0


def folder_of(out: Path, point: Point) -> Path:
    return out / "points" / point.id


def read_record(out: Path, point: Point) -> Record | None:
    """The record of a point that has ended; None when there is none, or it is damaged and so made again."""
    try:
        record = json.loads((folder_of(out, point) / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("status") in ("done", "failed") else None


def _measured(path: Path) -> tuple[dict[str, float], dict[str, list[float | None]], dict[str, Any]]:
    """The numbers of the `final` record, the curves of the `val` records, and what the newest `run` record names."""
    final: dict[str, float] = {}
    about: dict[str, Any] = {}
    validations: list[dict[str, float]] = []
    for record in iterate_metrics(path):
        if record["kind"] == "run":
            about = {key: record.get(key) for key in ("versions", "device", "theta")}
        elif record["kind"] in ("val", "final"):
            # None: not finite
            numbers = {key: value for key, value in record.items() if value is None or type(value) in (int, float)}
            if record["kind"] == "final":
                final = numbers
            else:
                validations.append(numbers)
    keys = dict.fromkeys(key for numbers in validations for key in numbers)
    return final, {key: [numbers.get(key) for numbers in validations] for key in keys}, about


def _reason(output: Path) -> str:
    """The last line that a run printed."""
    with contextlib.suppress(OSError):
        with open(output, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8192))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        if lines:
            return lines[-1][:500]
    return "it printed nothing"


class Runner:
    """Runs points on `workers` threads, each a process at a time, on a GPU of its own where `gpus` names them.

    `limit` is the seconds a point may take. With `keep_checkpoints=False` those of finished runs are removed.
    """

    def __init__(
        self,
        out: Path,
        *,
        workers: int,
        gpus: Sequence[str] = (),
        launcher: Sequence[str] = (),
        limit: float | None = None,
        keep_checkpoints: bool = False,
        ended: Callable[[Point, Record], None] = lambda point, record: None,
    ) -> None:
        self.out, self.launcher, self.limit, self.keep_checkpoints = out, tuple(launcher), limit, keep_checkpoints
        self.ended = ended
        self.stopped_by = 0
        """The signal that stopped the sweep, 0 for none."""
        self._slots: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for index in range(workers):
            self._slots.put(gpus[index % len(gpus)] if gpus else None)
        self._workers, self._lock = workers, threading.Lock()
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def run(self, points: Sequence[Point]) -> None:
        """Run points to their ends, and record each; returns early, with what runs saved, after `stop`."""
        waiting: queue.SimpleQueue[Point] = queue.SimpleQueue()
        for point in points:
            waiting.put(point)
        errors: list[BaseException] = []

        def work() -> None:
            while not self.stopped_by and not errors:
                try:
                    point = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    self.run_point(point)
                except BaseException as error:  # for the thread that waits
                    errors.append(error)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(self._workers, len(points)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                # a signal's handler runs between two waits
                thread.join(0.2)
        if errors:
            raise errors[0]

    def run_point(self, point: Point) -> Record | None:
        """Run one point to its end and record it; None when the sweep was stopped meanwhile."""
        folder = folder_of(self.out, point)
        run, output = folder / RUN, folder / OUTPUT
        folder.mkdir(parents=True, exist_ok=True)
        gpu = self._slots.get()
        environment = dict(os.environ)
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        threads = max(1, (os.cpu_count() or 1) // self._workers)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        command = point.command(run, self.launcher)
        started = time.monotonic()
        try:
            status, late = self._wait(command, output, environment)
        finally:
            self._slots.put(gpu)
        final, curve, about = _measured(run / METRICS)
        if self.stopped_by and (status != 0 or not final):
            return None
        record: Record = {"id": point.id, "settings": dict(point.settings), "status": "done", "exit": status}
        if status != 0 or not final:
            record["status"] = "failed"
            record["reason"] = (
                f"it took more than {self.limit:.0f} s" if late else _reason(output) if status else "no final record"
            )
        seconds = time.monotonic() - started
        record |= {"seconds": seconds, "metrics": final, "curve": curve, "command": command, **about}
        write_atomic(folder / RECORD, [(json.dumps(record, indent=1) + "\n").encode()])
        if record["status"] == "done" and not self.keep_checkpoints:
            for checkpoint in run.glob("step-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)
        self.ended(point, record)
        return record

    def _wait(self, command: list[str], output: Path, environment: dict[str, str]) -> tuple[int, bool]:
        """Run a command; return its exit status and whether it took too long."""
        with open(output, "ab") as file:
            # a session of its own: the terminal's Ctrl-C comes through `stop` alone
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment, start_new_session=True
            )
        with self._lock:
            self._running[process.pid] = process
        if self.stopped_by:
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(self.limit), False
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                _kill(process)
            return process.wait() or 1, True
        finally:
            with self._lock:
                del self._running[process.pid]

    def stop(self, number: int) -> None:
        """Ask what runs to save and stop; the second time, end it."""
        again, self.stopped_by = bool(self.stopped_by), number
        # without the lock: a handler may interrupt the thread that has it
        for process in list(self._running.values()):
            if again:
                _kill(process)
            else:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def array_script(count: int, arguments: Sequence[str], out: Path, sbatch: Sequence[str]) -> str:
    """A Slurm script whose task N runs point N; `arguments` are the sweep's, `sbatch` further `#SBATCH` lines."""
    command = [sys.executable, "-m", "celo2.pretrain.sweep"]
    lines = [
        "#!/bin/bash",
        "#SBATCH --job-name=celo2-sweep",
        f"#SBATCH --array=0-{count - 1}",
        f"#SBATCH --output={out}/slurm-%A_%a.txt",
        "#SBATCH --signal=B:TERM@120",
        *(f"#SBATCH {line}" for line in sbatch),
        "# a task that has its record ends at once; the points of --best are known when the others have ended",
        f"cd {shlex.quote(os.getcwd())} || exit 1",
        f'exec {shlex.join(command)} --point "$SLURM_ARRAY_TASK_ID" {shlex.join(arguments)}',
    ]
    return "\n".join(lines) + "\n"
