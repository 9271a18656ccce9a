"""NVIDIA's tools in `gpu_check.py`: how compute-sanitizer and ncu are called, and what is read from their output."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gpu_page


class Tool(NamedTuple):
    """A program that runs a section under it: its options, the section, the file of its output, its environment."""

    program: str
    options: tuple[str, ...]
    section: str
    file: str
    environment: dict[str, str]


# PyTorch's own kernels are left out, and what comes before the program says that it should begin
_KERNELS = "regex:(gradient|feature|learned|apply|factors|normalisers|control|sum_|vector_u|symmetric|small_ortho)"
_SECTIONS = ("SpeedOfLight", "Occupancy", "MemoryWorkloadAnalysis", "LaunchStats")
_COUNT = ("--csv", "--clock-control", "none", "--profile-from-start", "off", "-k", _KERNELS, "-c", "32")
TOOLS = {
    "sanitizer": Tool(
        "compute-sanitizer",
        ("--tool", "memcheck"),
        "small_step",
        "sanitizer.txt",
        # in one large block of PyTorch's own an access beyond a tensor would still be in bounds
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    ),
    "ncu": Tool(
        "ncu",
        (*_COUNT, *(option for section in _SECTIONS for option in ("--section", section))),
        "step_for_counters",
        "ncu.csv",
        {},
    ),
}


def search_path(environment: Mapping[str, str]) -> str:
    """Return PATH with the folders of CUDA's tools after it: they often are on none."""
    cuda = [environment.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    folders = [str(Path(folder) / "bin") for folder in cuda if folder]
    folders += [str(path.parent) for path in sorted(Path("/opt/nvidia").glob("nsight-compute/*/ncu"), reverse=True)]
    return os.pathsep.join([environment.get("PATH", os.defpath), *folders])


def command(name: str, program: Sequence[str], path: str) -> tuple[list[str] | None, str]:
    """Return the command of a tool and the file for its output; None and the reason where the tool is not."""
    tool = TOOLS[name]
    found = shutil.which(tool.program, path=path)
    if found is None:
        return None, f"{tool.program} is not installed"
    return [found, *tool.options, *program], tool.file


def say(out: Path, section: str, what: str, **values: Any) -> None:
    gpu_page.append(out, {"section": section, "what": what, **values})


def note_sanitizer(out: Path) -> None:
    """Record how many errors the sanitizer has counted."""
    path = out / TOOLS["sanitizer"].file
    if not path.exists():
        return
    found = re.findall(r"ERROR SUMMARY: (\d+) error", path.read_text(errors="replace"))
    if found:
        say(out, "sanitizer", "errors", value=int(found[-1]), limit=0, passed=int(found[-1]) == 0)
    else:
        missing = f"it has printed no summary; its output is in {path.name}"
        say(out, "sanitizer", "errors", passed=False, error=missing)


# of ncu's hundreds of figures
COUNTERS = {
    "Duration": "us",
    "DRAM Throughput": "DRAM %",
    "Compute (SM) Throughput": "SM %",
    "Achieved Occupancy": "occupancy %",
    "Registers Per Thread": "registers",
    "L2 Hit Rate": "L2 hits %",
}


def note_counters(out: Path) -> None:
    """Record the counters of each kernel, of its longest launch, from ncu's table."""
    path = out / TOOLS["ncu"].file
    if not path.exists():
        return
    text = path.read_text(errors="replace")
    if "ERR_NVGPUCTRPERM" in text:
        say(out, "ncu", "skipped", reason="the driver lets only administrators read counters (ERR_NVGPUCTRPERM)")
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
        say(out, "ncu", "counters", kernel=kernel, counters=counters)
    if not longest and "ERR_NVGPUCTRPERM" not in text:
        say(out, "ncu", "counters", error=f"ncu has printed no table; its output is in {path.name}")


NOTES = {"sanitizer": note_sanitizer, "ncu": note_counters}
