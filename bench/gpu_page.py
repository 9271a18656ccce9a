"""The records of `gpu_check.py`, and the page that they make: python bench/gpu_page.py DIR --out FILE."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

Record = dict[str, Any]
TITLES = {
    "correct": "Is it right",
    "tests": "Tests of the kernels",
    "training": "A training step of GPT-2 124M",
    "step_times": "A step of the optimizer",
    "graphs": "A step replayed from a CUDA graph",
    "phases": "The kernels of a step",
    "newton_schulz": "Newton-Schulz, beside torch.bmm",
    "first_step": "The first step",
    "sweep": "Tiles and warps",
    "sanitizer": "compute-sanitizer",
    "ncu": "Hardware counters",
    "meta": "Meta-training",
    "meta_train": "The paper's meta-training",
    "language_model": "A language model on the embedded text",
}
NOTES = {
    "step_times": "`ms` is one step of a loop of steps, `host ms` until a call returns. Parameters and attention heads "
    "are the harness's; gradients are float32. AdamW and Muon are PyTorch's, without "
    "clipping; `adamw, harness` clips. Predictions: bytes over the data sheet's bandwidth, or "
    "instructions over its issue rate where that is longer, and Newton-Schulz at the peak of the tensor cores.",
    "graphs": "The device alone, without the host's time.",
    "phases": "Microseconds of one step. Bandwidth is of the bytes that a phase must move.",
    "training": "16 sequences of 1024 tokens, bfloat16 autocast, no torch.compile. Predictions: forward and "
    "backward at the rate of `celo2.pretrain.machines`, and the optimizer's step, without clipping.",
    "newton_schulz": "Five iterations in float16; `torch` is the standard form through `torch.bmm`, `in_batches` the "
    "Gram form without one program a matrix. A symmetric product is our kernel's, beside `torch.bmm`.",
    "sweep": "Microseconds of each kernel for `celo2-base` on GPT-2 124M; the best of each column is bold.",
    "language_model": "Equal steps, seeds and batches, each optimizer with three learning rates; validation loss.",
}


# the environment variable with the time at which a run began
BEGUN = "CELO2_CHECK_BEGUN"


def append(out: Path, record: Record) -> str:
    """Append a record to `out`/records.jsonl, on the disk before this returns; returns the line.

    It has the time, and in `t` the seconds since the run began.
    """
    now = time.time()
    clock = {"time": round(now, 2), "t": round(now - float(os.environ.get(BEGUN, now)), 1)}
    line = json.dumps({**clock, **record}, default=str)
    with (out / "records.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    return line


def read(out: Path) -> list[Record]:
    """Return the records of a folder; a line that a killed process left unfinished is dropped."""
    records = []
    path = out / "records.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def failures(records: Iterable[Record]) -> list[str]:
    """Return what went wrong, a line each."""
    found = []
    for record in records:
        name = f"{record['section']}: {record['what']}"
        if record.get("passed") is False:
            limit = f" (limit {number(record['limit'])})" if "limit" in record else ""
            value = f" {number(record['value'])}" if "value" in record else ""
            names = f" {', '.join(record['failed'])}" if record.get("failed") else ""
            found.append(f"{name}{value}{limit}{names}{' ' + one_line(record['error']) if 'error' in record else ''}")
        elif "error" in record:
            found.append(f"{name}: {one_line(record['error'])}")
    return found


def revision(root: Path) -> str:
    """Return the commit of a checkout without asking git, which may not be there."""
    folder = root / ".git"
    try:
        if folder.is_file():
            folder = Path(folder.read_text(encoding="utf-8").partition("gitdir: ")[2].strip())
        head = (folder / "HEAD").read_text(encoding="utf-8").strip()
        name = head.partition("ref: ")[2]
        if not name:
            return head
        common = folder / "commondir"
        base = folder / common.read_text(encoding="utf-8").strip() if common.exists() else folder
        for path in (folder / name, base / name):
            if path.exists():
                return path.read_text(encoding="utf-8").strip()
        packed = (base / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next(line.split()[0] for line in packed if line.endswith(f" {name}"))
    except (OSError, StopIteration):
        return "unknown"


def versions() -> Record:
    """Return the versions of what a run depends on."""
    import torch

    found = {name: metadata.version(name) for name in ("triton", "numpy")}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **found,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def one_line(text: str) -> str:
    """Return a text, an error of CUDA's perhaps, on one line."""
    return " ".join(text.split())


def without_paths(text: str) -> str:
    """Return a text, an error's perhaps, without the folders of the machine on which it was written."""
    return re.sub(r"(?<![\w.:])/(?:[\w.@+-]+/)+(?=[\w.-])", ".../", text)


def number(value: Any) -> str:
    """Format a value: four digits, and a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (abs(value) >= 1000 and value == value and abs(value) != float("inf")):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


# columns of a section's table, in this order, where a record has them
COLUMNS = {
    "value": "measured",
    "unit": "",
    "predicted": "predicted",
    "ratio_predicted": "measured / predicted",
    "limit": "limit",
    "passed": "passed",
    "host_ms": "host ms",
    "times_adamw": "times fused AdamW",
    "ps": "ps a parameter",
    "bytes": "bytes an element",
    "tb_s": "TB/s",
    "of_sheet": "of the data sheet",
    "launches": "launches",
    "first_s": "first step, s",
    "ms": "ms a step",
    "passes_ms": "forward and backward, ms",
    "optimizer_ms": "optimizer, ms",
    "share": "optimizer's share",
    "mfu": "MFU",
    "peak_gib": "peak GiB",
    "torch_ms": "torch.bmm, ms",
    "ratio": "ours / torch.bmm",
    "tflops": "TFLOP/s",
    "product_ms": "product, ms",
    "bmm_ms": "bmm, ms",
    "inner_steps": "inner steps/s",
    "pairs": "pairs",
    "tasks": "tasks",
    "steps": "steps",
    "step_s": "s a step",
    "step": "step",
}


def section_lines(name: str, records: list[Record]) -> list[str]:
    """Return the lines of one section: its figures, what failed or was left out, and how long it took."""
    lines = [f"## {TITLES.get(name, name)}", ""]
    if name in NOTES:
        lines += [NOTES[name], ""]
    if name == "sweep":
        lines += _sweep([record for record in records if "kernels" in record])
    if name == "ncu":
        lines += _counters([record for record in records if "counters" in record])
    rows = [r for r in records if ("value" in r or "passed" in r) and r["what"] != "end"]
    for record in rows:
        if isinstance(record.get("predicted"), (int, float)) and record["predicted"] and record.get("value"):
            record["ratio_predicted"] = record["value"] / record["predicted"]
    present = [key for key in COLUMNS if any(record.get(key) is not None for record in rows)]
    if name == "step_times" and "ms" in present:
        present.remove("ms")
    if all(record.get("passed") in (None, True) for record in rows) and name == "training":
        present = [key for key in present if key != "passed"]
    if rows:
        body = [[record["what"], *(_cell(key, record) for key in present)] for record in rows]
        lines += [*table(["", *(COLUMNS[key] for key in present)], body), ""]
    for record in records:
        if "reason" in record:
            lines += [
                f"- {record['what']}: {record['reason']}" + (f" (next: {record['next']})" if "next" in record else "")
            ]
        if "error" in record:
            lines += [f"- **{record['what']}**: {one_line(record['error'])}"]
        if record.get("failed"):
            lines += [f"- failed: {', '.join(record['failed'])}"]
    ends = [record["seconds"] for record in records if record["what"] == "end" and "seconds" in record]
    if lines[-1]:
        lines += [""]
    if ends:
        lines += [f"{ends[-1]:.0f} s.", ""]
    elif not any(record["what"] == "skipped" for record in records):
        lines += ["It did not end.", ""]
    return lines


def _cell(key: str, record: Record) -> str:
    value = record.get(key)
    if key in ("share", "mfu", "of_sheet") and value is not None:
        return f"{value:.1%}"
    if key == "passed" and value is not None:
        return "yes" if value else "**no**"
    return number(value)


def _sweep(records: list[Record]) -> list[str]:
    kernels = list(dict.fromkeys(kernel for record in records for kernel in record["kernels"]))
    if not kernels:
        return []
    best = {kernel: min(r["kernels"].get(kernel, float("inf")) for r in records) for kernel in kernels}
    rows = []
    for record in records:
        cells = [record["kernels"].get(kernel) for kernel in kernels]
        marks = ["**" if cell == best[kernel] else "" for cell, kernel in zip(cells, kernels, strict=True)]
        rows.append([record["what"], *(f"{mark}{number(cell)}{mark}" for mark, cell in zip(marks, cells, strict=True))])
    fastest = [
        f"- {kernel}: {next(r['what'] for r in records if r['kernels'].get(kernel) == best[kernel])}"
        for kernel in kernels
    ]
    return [*table(["", *kernels], rows), "", "The fastest:", "", *fastest, ""]


def _counters(records: list[Record]) -> list[str]:
    names = list(dict.fromkeys(name for record in records for name in record["counters"]))
    if not names:
        return []
    rows = [[record["kernel"], *(number(record["counters"].get(name)) for name in names)] for record in records]
    return [*table(["kernel", *names], rows), ""]


def write(out: Path, page: Path) -> None:
    """Write the page of a folder's records, whole or not at all."""
    records = read(out)
    by_section: dict[str, list[Record]] = {}
    for record in records:
        by_section.setdefault(record["section"], []).append(record)
    run = by_section.pop("run", [{}])
    begin, environment = run[0], by_section.pop("environment", [])
    found: Record = {**begin, **next((record for record in environment if record["what"] == "versions"), {})}
    device = found.get("device", "unknown")
    date = datetime.datetime.fromtimestamp(begin.get("time", time.time()), datetime.UTC).date()
    dry = begin.get("dry", False)
    runtime = f"HIP {found['hip']}" if found.get("hip") else f"CUDA {found.get('cuda')}"
    lines = [f"# {'Dry run' if dry else device}", ""]
    if dry:
        lines += [f"**A dry run on {device}: it shows that the program runs. No figure here is a measurement.**", ""]
    lines += [
        f"Written by `{begin.get('command', 'make gpu-check')}` on {date}, git {begin.get('revision')}: PyTorch "
        f"{found.get('torch')}, {runtime}, Triton {found.get('triton')}, NumPy {found.get('numpy')}, Python "
        f"{found.get('python')}. All records are in `{out.name}/records.jsonl`.",
        "",
    ]
    bad = failures(records)
    lines += ["## Failures", "", *([f"- {line}" for line in bad] or ["None."]), ""]
    if left_out := [f"- {r['section']}: {r['reason']}" for r in records if r["what"] == "skipped" and "reason" in r]:
        lines += ["## Left out", "", *left_out, ""]
    if environment:
        lines += ["## The machine", ""]
        figures = [record for record in environment if "value" in record]
        rows = [(r["what"], number(r["value"]), r["unit"], number(r["predicted"])) for r in figures]
        lines += [*table(("", "measured", "", "data sheet"), rows), ""]
        tools = [f"{'' if there else 'no '}{name}" for name, there in found.get("tools", {}).items()]
        lines += [f"- {key}: {found[key]}" for key in ("cores", "tf32", "backend", "interpreter") if key in found]
        lines += [f"- tools: {', '.join(tools)}"] if tools else []
        lines += [f"- taken from the environment: {', '.join(begin['unset'])}"] if begin.get("unset") else []
        lines += [f"- {record['query']}: {record['found']}" for record in environment if record["what"] == "driver"]
        lines += [""]
    for name, those in by_section.items():
        lines += section_lines(name, those)
    page.parent.mkdir(parents=True, exist_ok=True)
    temporary = page.with_name(f".{page.name}.tmp")
    temporary.write_text(without_paths("\n".join(lines)), encoding="utf-8")
    temporary.replace(page)


def main() -> int:
    """Write the page of a folder; returns 0, 1 when there are no records."""
    parser = argparse.ArgumentParser(description="Write the page of a run of gpu_check.py.")
    parser.add_argument("folder", type=Path, help="folder with records.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page")
    arguments = parser.parse_args()
    if not read(arguments.folder):
        print(f"error: no records in {arguments.folder}", file=sys.stderr)
        return 1
    write(arguments.folder, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
