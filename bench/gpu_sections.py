"""One section of `gpu_check.py`, in a process of its own: python bench/gpu_sections.py NAME --out DIR --seconds N."""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

import gpu_correct
import gpu_speed
import gpu_training
from gpu_lab import Lab


def main() -> int:
    """Run it; returns 0, also where a check did not pass: its record says so; 1 when it could not go on."""
    parser = argparse.ArgumentParser(description="One section of bench/gpu_check.py.")
    parser.add_argument("name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--section", help="what its records are filed under (default: NAME)")
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    modules = (gpu_correct, gpu_speed, gpu_training)
    section = next(found for module in modules if (found := getattr(module, arguments.name, None)) is not None)
    lab = Lab(arguments.section or arguments.name, arguments.out, arguments.seconds, arguments.dry)
    try:
        section(lab)
    except Exception as error:
        traceback.print_exc()
        lab.say(f"{arguments.name} has failed", error=repr(error)[:600])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
