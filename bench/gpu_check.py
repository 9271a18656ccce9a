"""On a machine with a GPU: the kernels' tests and benchmarks, and one report of them.

    make gpu-check

Runs `pytest -m kernels` (compiled, not interpreted) and `pytest bench/`, and writes `docs/gpu/DEVICE.md`.
"""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", *arguments]
    print("$", " ".join(command[1:]), flush=True)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(result.stdout[-4000:], flush=True)
    return result.returncode, result.stdout


def main() -> int:
    """Run everything; returns 0 when all tests passed, 2 without a GPU."""
    if not torch.cuda.is_available():
        print("error: no GPU that PyTorch can use; `make report` compiles the kernels without one", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name()
    failed, tests = run("-q", "-m", "kernels", "tests")
    broken, benches = run("-q", "bench/test_kernels.py")
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    path = ROOT / "docs" / "gpu" / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}"
    lines = [
        f"# {device}",
        "",
        f"Written by `make gpu-check` on {datetime.date.today()}, {versions}, git {revision}.",
        "",
        "## Tests of the kernels" + (" (failed)" if failed else ""),
        "",
        "```",
        *tests.splitlines()[-40:],
        "```",
        "",
        "## Benchmarks" + (" (failed)" if broken else ""),
        "",
        "```",
        *benches.splitlines()[-80:],
        "```",
    ]
    path.write_text("\n".join(lines) + "\n")
    print(f"-> {path.relative_to(ROOT)}")
    return 1 if failed or broken else 0


if __name__ == "__main__":
    sys.exit(main())
