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
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import gpu_page
import gpu_tools

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
# of a file of text; a sanitizer or a failing test can fill a disk
LARGEST = 1_000_000
FILES = ("records.jsonl", "log.txt", "tests.txt", "sanitizer.txt", "ncu.csv", "page.md")


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
    Section("meta", 75, 20, "windows a second of meta-training"),
    Section("meta_train", 120, 40, "the paper's meta-training by the kernel, as far as time goes: thetas"),
    Section("language_model", 90, 30, "the 30m model on the embedded text: celo2, muon, adamw"),
)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal that ends the run; not an error, which the page's writer would take for its own."""

    def __init__(self, number: int) -> None:
        self.number = number


class Check:
    """A run: the folder it writes to, the environment of its processes, and the time that is left."""

    def __init__(self, out: Path, page: Path, minutes: float, dry: bool) -> None:
        self.out, self.page, self.dry = out, page, dry
        # half of its time is of use to a section, a tenth is not: in a short run the last ones are left out instead
        self.scale = minutes / 8 if dry else max(minutes / 8, 0.5)
        self.deadline = time.monotonic() + 60 * minutes
        self.child: subprocess.Popen[bytes] | None = None
        os.environ[gpu_page.BEGUN] = str(time.time())
        out.mkdir(parents=True, exist_ok=True)
        records = out / FILES[0]
        if records.exists():
            # one run back: figures that took minutes of a GPU are not lost to a second call
            records.replace(out / "records.previous.jsonl")
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
        command, name = self.command(section.name, seconds, environment["PATH"])
        if command is None:
            self.say(section.name, "skipped", reason=name)
            return
        show(f"\n== {section.name}: {section.what} ({seconds:.0f} s)")
        begun = time.monotonic()
        if section.name in gpu_tools.TOOLS:
            environment = {**environment, **gpu_tools.TOOLS[section.name].environment}
        status, over = self.spawn(command, environment, seconds, self.out / name)
        values: dict[str, Any] = {"seconds": round(time.monotonic() - begun, 1), "status": status}
        if over:
            values["error"] = f"stopped after its {seconds:.0f} s"
        elif status and section.name not in gpu_tools.TOOLS:
            values["error"] = f"ended with status {status}; its last lines are in {name}"
        self.say(section.name, "end", **values)

    def command(self, name: str, seconds: float, path: str) -> tuple[list[str] | None, str]:
        """Return the command of a section and the file for what it prints; None and the reason where it cannot run."""
        options = ["--out", str(self.out), "--seconds", f"{seconds:.1f}", *(["--dry"] if self.dry else [])]
        program = [sys.executable, str(BENCH / "gpu_sections.py")]
        if name == "tests":
            if importlib.util.find_spec("pytest") is None:
                return None, "pytest is not installed"
            return [sys.executable, str(BENCH / "gpu_tests.py"), *options], "tests.txt"
        if name in gpu_tools.TOOLS:
            return gpu_tools.command(name, [*program, gpu_tools.TOOLS[name].section, *options], path)
        return [*program, name, *options], "log.txt"

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


# settings of the environment that would have other kernels or another precision tested than the defaults
OVERRIDES = ("TRITON_INTERPRET", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE")


def environment_of(layout: Path, dry: bool) -> dict[str, str]:
    """Lay this checkout out as it would be installed, and return the environment in which `celo2` is that."""
    package = layout / "celo2"
    package.mkdir()
    for source in (*(ROOT / "celo2").iterdir(), *(ROOT / name for name in ("kernels", "meta", "pretrain"))):
        (package / source.name).symlink_to(source)
    scratch = layout / "tmp"
    scratch.mkdir()
    environment = {key: value for key, value in os.environ.items() if key not in OVERRIDES}
    # modules of a cluster may have put PyTorch itself on the path
    paths = [str(layout), str(BENCH), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    environment |= {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(scratch)}
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(scratch / "inductor"))
    home = Path(environment.get("TRITON_HOME") or os.path.expanduser("~"))
    cache = next((path for path in (home / ".triton" / "cache", home / ".triton", home) if path.exists()), home)
    if not os.access(cache, os.W_OK):
        environment.setdefault("TRITON_CACHE_DIR", str(scratch / "triton"))
    environment["PATH"] = gpu_tools.search_path(environment)
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


def ignore_signals() -> None:
    """Let nothing end this process before it has written its page."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def command_line(arguments: argparse.Namespace) -> str:
    """Return the command of this run, without its folder: it belongs to a machine."""
    words = ["python3 bench/gpu_check.py", f"--minutes {arguments.minutes:g}"]
    words += [f"--sections {arguments.sections}"] if arguments.sections else []
    return " ".join([*words, *(["--dry"] if arguments.dry else [])])


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
    begin: dict[str, Any] = {"device": "a CPU" if dry else name, "dry": dry, "minutes": arguments.minutes}
    begin |= {"revision": gpu_page.revision(ROOT), "command": command_line(arguments), **gpu_page.versions()}
    begin["unset"] = {name: os.environ[name] for name in OVERRIDES if name in os.environ}
    check.say("run", "begin", **begin)

    def end(number: int, _: object) -> None:
        raise Stopped(number)

    for number in SIGNALS:
        signal.signal(number, end)
    status = 0
    with tempfile.TemporaryDirectory(prefix="celo2-", ignore_cleanup_errors=True) as layout:
        try:
            environment = environment_of(Path(layout), dry)
            for section in SECTIONS:
                if section.name not in arguments.wanted:
                    continue
                check.run(section, environment)
                if note := gpu_tools.NOTES.get(section.name):
                    note(check.out)
                check.write_page()
        except Stopped as stopped:
            ignore_signals()
            check.stop()
            check.say("run", "stopped", error=f"by {signal.Signals(stopped.number).name}")
            status = 128 + stopped.number
        finally:
            ignore_signals()
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
