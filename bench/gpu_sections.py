"""One section of `gpu_check.py`, in a process of its own: python bench/gpu_sections.py NAME --out DIR --seconds N."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gpu_correct
import gpu_speed
import gpu_training
from gpu_lab import Lab


def main() -> int:
    """Run it; returns 0, also where a check did not pass: its record says so."""
    parser = argparse.ArgumentParser(description="One section of bench/gpu_check.py.")
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    modules = (gpu_correct, gpu_speed, gpu_training)
    section = next(found for module in modules if (found := getattr(module, arguments.name, None)) is not None)
    section(Lab(arguments.name, arguments.out, arguments.seconds, arguments.dry))
    return 0


if __name__ == "__main__":
    sys.exit(main())
