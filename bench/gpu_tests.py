"""The kernels' tests in several processes at once: most of their time goes into compiling, one kernel after another.

    python bench/gpu_tests.py --out DIR --seconds N

It is a section of `gpu_check.py`, and the plugin of pytest that takes one process's share of the tests. What has failed
is on record when the tests are stopped, too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import gpu_page
import pytest

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ("-v", "-rs", "--tb=short", "-p", "no:cacheprovider", "-m", "kernels")
FOLDERS = ("tests/kernels", "tests/celo2/test_golden.py")
# compiles for machines that are not here, which a GPU does not make more interesting
LEFT_OUT = "not specialisation and not compiled_code"
MOST_PROCESSES = 6
# seconds after which a test's stacks are printed
HANGS = 60
SHARE = "CELO2_CHECK_SHARE"
LINE = re.compile(r"(?P<test>\S+::.+?) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
# statuses of pytest: all passed, some failed, nothing to run
ENDS = (0, 1, 5)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep this process's share of the tests that were asked for: every so many-th."""
    index, processes = map(int, os.environ[SHARE].split("/"))
    items[:] = items[index::processes]


class Run:
    """The processes, and what they have said of each test."""

    def __init__(self, out: Path, processes: int, dry: bool) -> None:
        self.out, self.dry = out, dry
        self.outcomes: dict[str, str] = {}
        self.printing = threading.Lock()
        chosen = "golden or constants" if dry else LEFT_OUT
        command = [sys.executable, "-m", "pytest", *OPTIONS, *FOLDERS, "-k", chosen]
        command += ["-o", f"faulthandler_timeout={HANGS}", "-p", "gpu_tests"]
        self.processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, SHARE: f"{index}/{processes}", "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            for index in range(processes)
        ]
        self.readers = [threading.Thread(target=self._read, args=(process,)) for process in self.processes]
        for reader in self.readers:
            reader.daemon = True
            reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if found := LINE.match(line):
                self.outcomes[found["test"]] = found["outcome"]
            with self.printing:
                print(line, end="", flush=True)

    def wait(self, seconds: float) -> None:
        """Wait for all of them, or until the time is over."""
        end = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        for reader in self.readers:
            reader.join(max(0.0, min(2.0, end - time.monotonic())))

    def say(self) -> None:
        """Record counts, the names of failed tests, and processes that broke down or were stopped."""
        counts = Counter(self.outcomes.values())
        failed = [test for test, outcome in self.outcomes.items() if outcome in ("FAILED", "ERROR")]
        statuses = [process.poll() for process in self.processes]
        running = sum(status is None for status in statuses)
        broken = sorted({status for status in statuses if status is not None and status not in ENDS})
        record: dict[str, Any] = {"failed": failed[:40], "passed": not (failed or broken or running)}
        # a dry run may skip all of them, where the interpreter does not run
        some = bool(self.outcomes) if self.dry else counts["PASSED"] > 0
        record["passed"] = record["passed"] and some
        if broken:
            record["error"] = f"pytest ended with status {', '.join(map(str, broken))}; its output is in tests.txt"
        elif running:
            record["error"] = f"stopped with {running} of {len(statuses)} processes at work"
        elif not some:
            record["error"] = "no test was run"
        what = f"{counts['PASSED']} passed, {counts['SKIPPED']} skipped, {len(failed)} failed"
        gpu_page.append(self.out, {"section": "tests", "what": what, "processes": len(statuses), **record})


class Stopped(BaseException):
    """SIGTERM: the time is over."""


def stop(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Stopped


def main() -> int:
    """Run the tests; returns 0, also where some failed: the record says so."""
    parser = argparse.ArgumentParser(description="The kernels' tests, as a section of bench/gpu_check.py.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    cores = len(os.sched_getaffinity(0))
    run = Run(arguments.out, 1 if arguments.dry else max(1, min(MOST_PROCESSES, cores // 2)), arguments.dry)
    with contextlib.suppress(Stopped):
        run.wait(arguments.seconds - 1)
    run.say()
    for process in run.processes:
        process.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
