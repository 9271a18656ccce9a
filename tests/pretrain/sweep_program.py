"""A program for the tests of sweeps: a loss with a known optimum, which fails or waits where it is told to."""

import argparse
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

OPTIMUM = {"celo2": 1e-3, "adamw": 4e-3}
OFFSET = {"celo2": 0.0, "adamw": 0.5}

parser = argparse.ArgumentParser()
parser.add_argument("--opt", required=True)
parser.add_argument("--lr", type=float, default=1.0)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--fail-above", type=float, default=math.inf)
parser.add_argument("--wait", type=Path)
parser.add_argument("--out-dir", type=Path, required=True)
parser.add_argument("--resume", choices=("auto",), required=True)
arguments = parser.parse_args()
arguments.out_dir.mkdir(parents=True, exist_ok=True)
(arguments.out_dir / "step-00000010").mkdir(exist_ok=True)
with open(arguments.out_dir / "starts", "a") as file:
    file.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES', '')} {os.environ['OMP_NUM_THREADS']}\n")


def save(number: int, frame: object) -> None:
    (arguments.out_dir / "saved").touch()
    sys.exit(0 if number == signal.SIGTERM else 130)


signal.signal(signal.SIGTERM, save)
if arguments.wait is not None:
    (arguments.out_dir / "waiting").touch()
    while not arguments.wait.exists():
        time.sleep(0.05)
if arguments.lr > arguments.fail_above:
    print("something else on the way")
    print("error: the loss is not finite", file=sys.stderr)
    sys.exit(1)
distance = math.log10(arguments.lr / OPTIMUM[arguments.opt])
loss = 2.0 + OFFSET[arguments.opt] + distance**2 + 0.01 * arguments.seed
with open(arguments.out_dir / "metrics.jsonl", "w") as file:
    steps = arguments.steps
    # a straight line from 4 down to the final loss
    line = [{"kind": "val", "step": step, "loss": 4 + (loss - 4) * step / steps} for step in range(0, steps + 1, 10)]
    final = {"kind": "final", "step": steps, "loss": loss, "note": "text stays out"}
    records = [{"kind": "run", "versions": {"torch": "0"}}, *line, final]
    file.writelines(json.dumps(record) + "\n" for record in records)
