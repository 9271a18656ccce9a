"""Check and measure everything that only a GPU can say, on a node that has nothing but PyTorch and Triton.

    make gpu-check SYSTEM=1
    python3 bench/gpu_check.py --minutes 8

Needs no network, no installation, no git: it runs this checkout. Each section is a process with a time budget, so one
that fails or hangs leaves the others alone. Records go to `records.jsonl` as they are made, and the page is written
again after every section; what was done stays, whatever ends the run. `--dry` goes through all of it on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import gpu_page

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
# of a file of text; a sanitizer or a failing test can fill a disk
LARGEST = 1_000_000
FILES = ("records.jsonl", "log.txt", "tests.txt", "sanitizer.txt", "ncu.csv", "page.md")
TESTS = ("-q", "-m", "kernels", "tests/kernels", "tests/celo2/test_golden.py", "--tb=short", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Section:
    """What runs, how many seconds it may take of eight minutes, and below how many it is not begun."""

    name: str
    seconds: float
    least: float
    what: str


SECTIONS = (
    Section("environment", 25, 5, "versions, tools, bandwidth of a copy, rate of a matrix product"),
    Section("correct", 60, 20, "golden vectors, float64 oracle, CUDA graph, sharded kernels on one rank"),
    Section("tests", 110, 30, "pytest -m kernels"),
    Section("training", 60, 20, "a training step of GPT-2 124M by optimizer"),
    Section("step_times", 80, 20, "a step of every optimizer at GPT-2 124M and GPT-3 XL"),
    Section("phases", 25, 10, "every kernel of a step: time, bandwidth, prediction"),
    Section("newton_schulz", 20, 10, "Newton-Schulz by shape, beside torch.bmm"),
    Section("first_step", 50, 20, "a first step with an empty cache of kernels"),
    Section("graphs", 25, 10, "a step replayed from a CUDA graph"),
    Section("sweep", 45, 15, "tiles and warps"),
    Section("sanitizer", 60, 20, "compute-sanitizer on small steps"),
    Section("ncu", 60, 20, "hardware counters of each kernel"),
    Section("meta", 40, 20, "windows a second of meta-training"),
    Section("language_model", 90, 30, "the 30m model on the embedded text: celo2, muon, adamw"),
)


class Stopped(Exception):
    """A signal that ends the run."""

    def __init__(self, number: int) -> None:
        self.number = number


class Check:
    """A run: the folder it writes to, the environment of its processes, and the time that is left."""

    def __init__(self, out: Path, page: Path, minutes: float, dry: bool) -> None:
        self.out, self.page, self.dry = out, page, dry
        self.scale = minutes / 8
        self.deadline = time.monotonic() + 60 * minutes
        self.child: subprocess.Popen[bytes] | None = None
        out.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (out / name).unlink(missing_ok=True)

    def say(self, section: str, what: str, **values: Any) -> None:
        gpu_page.append(self.out, {"section": section, "what": what, **values})

    def write_page(self) -> None:
        """Write the page anew; the sections are worth more than a page that does not know what to make of a record."""
        try:
            gpu_page.write(self.out, self.page)
        except Exception as error:
            self.say("run", "page", error=repr(error))

    def run(self, section: Section, environment: dict[str, str]) -> None:
        """Run a section within its budget, and say how it ended."""
        left = self.deadline - time.monotonic()
        seconds = min(section.seconds * self.scale, left)
        if left < section.least * min(self.scale, 1):
            self.say(section.name, "skipped", reason=f"{left:.0f} s are left, it needs {section.least:.0f}")
            return
        command, name = self.command(section.name, seconds)
        if command is None:
            self.say(section.name, "skipped", reason=name)
            return
        show(f"\n== {section.name}: {section.what} ({seconds:.0f} s)")
        begun = time.monotonic()
        status, over = self.spawn(command, environment, seconds, self.out / name)
        values: dict[str, Any] = {"seconds": round(time.monotonic() - begun, 1), "status": status}
        if over:
            values["error"] = f"stopped after its {seconds:.0f} s"
        elif status and section.name not in ("tests", "sanitizer", "ncu"):
            values["error"] = f"ended with status {status}; its last lines are in {name}"
        self.say(section.name, "end", **values)

    def command(self, name: str, seconds: float) -> tuple[list[str] | None, str]:
        """Return the command of a section and the file for what it prints; None and the reason where it cannot run."""
        options = ["--out", str(self.out), "--seconds", f"{seconds:.1f}", *(["--dry"] if self.dry else [])]
        program = [sys.executable, str(BENCH / "gpu_sections.py")]
        if name == "tests":
            if importlib.util.find_spec("pytest") is None:
                return None, "pytest is not installed"
            some = ["-k", "golden or constants"] if self.dry else []
            many = ["-n", "8"] if importlib.util.find_spec("xdist") is not None and not self.dry else []
            result = f"--junitxml={self.junit}"
            return [sys.executable, "-m", "pytest", *TESTS, *some, *many, result], "tests.txt"
        if name == "sanitizer":
            tool = shutil.which("compute-sanitizer")
            if tool is None:
                return None, "compute-sanitizer is not installed"
            return [tool, "--tool", "memcheck", *program, "small_step", *options], "sanitizer.txt"
        if name == "ncu":
            tool = shutil.which("ncu")
            if tool is None:
                return None, "ncu is not installed"
            sections = ("SpeedOfLight", "Occupancy", "MemoryWorkloadAnalysis", "LaunchStats")
            # the warm-up's launches are skipped: ten and Newton-Schulz a batch
            kernels = "regex:(gradient|feature|learned|apply|factors|normalisers|control|sum_)"
            which = ["--csv", "--clock-control", "none", "-k", kernels, "-s", "30", "-c", "24"]
            named = [option for section in sections for option in ("--section", section)]
            return [tool, *which, *named, *program, "step_for_counters", *options], "ncu.csv"
        return [*program, name, *options], "log.txt"

    @property
    def junit(self) -> Path:
        return Path(tempfile.gettempdir()) / f"celo2-gpu-check-{os.getpid()}.xml"

    def spawn(
        self, command: Sequence[str], environment: dict[str, str], seconds: float, file: Path
    ) -> tuple[int, bool]:
        """Run a command as a group of processes; its output goes to a file and to the screen as it comes.

        Returns its exit status, and whether it was stopped.
        """
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.child = child
        assert child.stdout is not None
        reader = threading.Thread(target=_copy, args=(child.stdout, file), daemon=True)
        reader.start()
        over = False
        try:
            child.wait(seconds + 2)
        except subprocess.TimeoutExpired:
            over = True
        finally:
            self.stop()
        reader.join(5)
        return child.returncode, over

    def stop(self) -> None:
        """End the running section and everything that it started."""
        child, self.child = self.child, None
        if child is None:
            return
        # the second for what has outlived the first, and for its children
        for number, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(patience)


def _copy(stream: IO[bytes], path: Path) -> None:
    """Copy lines to a file, up to its largest size, and their beginnings to the screen."""
    with path.open("ab") as file:
        for line in stream:
            if file.tell() < LARGEST:
                file.write(line)
                file.flush()
            text = line.decode(errors="replace").rstrip()
            if not text.startswith("{"):
                show(text[:200])


def show(text: str) -> None:
    """Print a line; a terminal that is gone does not end the run."""
    with contextlib.suppress(OSError, ValueError):
        print(text, flush=True)


def note_tests(check: Check) -> None:
    """Record which tests failed, from pytest's own report."""
    if not check.junit.exists():
        return
    with contextlib.suppress(xml.etree.ElementTree.ParseError):
        cases = list(xml.etree.ElementTree.parse(check.junit).getroot().iter("testcase"))
        bad = [case.get("name") for case in cases if any(case.find(kind) is not None for kind in ("failure", "error"))]
        skipped = sum(case.find("skipped") is not None for case in cases)
        passed = len(cases) - len(bad) - skipped
        check.say("tests", f"{passed} passed, {skipped} skipped, {len(bad)} failed", passed=not bad, failed=bad[:40])
    check.junit.unlink()


def note_sanitizer(check: Check) -> None:
    """Record how many errors the sanitizer has counted."""
    path = check.out / "sanitizer.txt"
    found = re.findall(r"ERROR SUMMARY: (\d+) error", path.read_text(errors="replace")) if path.exists() else []
    if found:
        check.say("sanitizer", "errors", value=int(found[-1]), limit=0, passed=int(found[-1]) == 0)


# of ncu's hundreds of figures
COUNTERS = {
    "Duration": "us",
    "DRAM Throughput": "DRAM %",
    "Compute (SM) Throughput": "SM %",
    "Achieved Occupancy": "occupancy %",
    "Registers Per Thread": "registers",
    "L2 Hit Rate": "L2 hits %",
}


def note_counters(check: Check) -> None:
    """Record the counters of each kernel, of its longest launch, from ncu's table."""
    path = check.out / "ncu.csv"
    if not path.exists():
        return
    text = path.read_text(errors="replace")
    if "ERR_NVGPUCTRPERM" in text:
        check.say("ncu", "skipped", reason="the driver lets only administrators read counters (ERR_NVGPUCTRPERM)")
    lines = text.splitlines()
    start = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[tuple[str, str], dict[str, float]] = {}
    for row in csv.DictReader(lines[start:]):
        name, value = COUNTERS.get(row.get("Metric Name") or ""), (row.get("Metric Value") or "").replace(",", "")
        with contextlib.suppress(ValueError):
            if name is not None:
                scale = {"ns": 1e-3, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3}.get(row.get("Metric Unit") or "", 1.0)
                launches.setdefault((row["Kernel Name"], row["ID"]), {})[name] = float(value) * scale
    longest: dict[str, dict[str, float]] = {}
    for (kernel, _), counters in launches.items():
        if counters.get("us", 0) >= longest.get(kernel, {}).get("us", 0):
            longest[kernel] = counters
    for kernel, counters in longest.items():
        check.say("ncu", "counters", kernel=kernel, counters=counters)
    if not longest and "ERR_NVGPUCTRPERM" not in text:
        check.say("ncu", "counters", error="ncu has printed no table; its output is in ncu.csv")


NOTES = {"tests": note_tests, "sanitizer": note_sanitizer, "ncu": note_counters}


def environment_of(layout: Path, dry: bool) -> dict[str, str]:
    """Lay this checkout out as it would be installed, and return the environment in which `celo2` is that."""
    package = layout / "celo2"
    package.mkdir()
    for source in (*(ROOT / "celo2").iterdir(), *(ROOT / name for name in ("kernels", "meta", "pretrain"))):
        (package / source.name).symlink_to(source)
    environment = {**os.environ, "PYTHONPATH": f"{layout}{os.pathsep}{BENCH}", "PYTHONSAFEPATH": "1"}
    environment |= {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if dry:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return environment


def parse_arguments() -> argparse.Namespace:
    description = "Check and measure the kernels on a GPU; writes records and a page, whatever ends the run."
    names = ", ".join(section.name for section in SECTIONS)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all of it (default: 8)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the records (default: $OUT, or docs/gpu/DEVICE)"
    )
    parser.add_argument("--sections", metavar="A,B", help=f"only these, in their order: {names}")
    parser.add_argument("--dry", action="store_true", help="go through everything on a CPU at small sizes")
    parser.add_argument("--list", action="store_true", help="print the sections and stop")
    arguments = parser.parse_args()
    if not 0 < arguments.minutes < 24 * 60:
        parser.error(f"--minutes {arguments.minutes}: give more than 0")
    known = {section.name for section in SECTIONS}
    arguments.wanted = arguments.sections.split(",") if arguments.sections else [section.name for section in SECTIONS]
    if unknown := [name for name in arguments.wanted if name not in known]:
        parser.error(f"--sections {unknown[0]}: there are {names}")
    return arguments


def main() -> int:
    """Run the sections; returns 0 when all is right, 1 when something failed, 2 without a GPU, 128 + N for a signal."""
    arguments = parse_arguments()
    if arguments.list:
        for section in SECTIONS:
            print(f"{section.name:15} {section.seconds:4.0f} s  {section.what}")
        return 0
    for package in ("torch", "triton", "numpy", "safetensors"):
        if importlib.util.find_spec(package) is None:
            print(f"error: {package} is not installed for {sys.executable}", file=sys.stderr)
            return 1
    import torch

    has_gpu = torch.cuda.is_available()
    missing = "error: no GPU that PyTorch can use"
    if not has_gpu and not arguments.dry:
        print(
            f"{missing}; --dry goes through everything on the CPU, `make report` compiles the kernels", file=sys.stderr
        )
        return 2
    dry = arguments.dry
    name = "dry run on a CPU" if dry else torch.cuda.get_device_name()
    if dry:
        # a GPU that is here stays unused
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out = arguments.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "docs" / "gpu" / slug)
    page = out / "page.md" if arguments.out or os.environ.get("OUT") else out.parent / f"{slug}.md"
    check = Check(out.resolve(), page.resolve(), arguments.minutes, dry)
    check.say("run", "begin", device=name, dry=dry, minutes=arguments.minutes, revision=gpu_page.revision(ROOT))

    def end(number: int, _: object) -> None:
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    status = 0
    with tempfile.TemporaryDirectory(prefix="celo2-") as layout:
        try:
            environment = environment_of(Path(layout), dry)
            for section in SECTIONS:
                if section.name not in arguments.wanted:
                    continue
                check.run(section, environment)
                if section.name in NOTES:
                    NOTES[section.name](check)
                check.write_page()
        except Stopped as stopped:
            check.stop()
            check.say("run", "stopped", error=f"by {signal.Signals(stopped.number).name}")
            status = 128 + stopped.number
    failures = gpu_page.failures(gpu_page.read(check.out))
    check.say("run", "end", failures=len(failures))
    check.write_page()
    show(f"\n{len(failures)} failures; -> {os.path.relpath(check.page)}")
    for failure in failures[:20]:
        show(f"  {failure}")
    if status:
        return status
    if not has_gpu or dry:
        print(f"{missing}: this was a dry run, and no figure in it is a measurement", file=sys.stderr)
        return 2
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
