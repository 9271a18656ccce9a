"""Average the last thetas of a meta-training run: what its last steps differ in is noise.

    python -m celo2.meta.average runs/meta/celo2-lm --last 4 --out celo2-lm.safetensors

Nothing is chosen among them; `celo2.meta.evaluate --also` judges the mean. It takes one run: another seed starts from
other random weights, and the mean of two such thetas is neither.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from celo2.meta.train import THETA
from celo2.pretrain import options
from celo2.pretrain.terminal import unfailing_streams
from celo2.theta import NAMES, Theta


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Average the last thetas of a meta-training run.")
    parser.add_argument("run", type=options.path, help="folder of a finished meta-training run")
    parser.add_argument(
        "--last", type=options.whole_number(1), default=4, metavar="N", help="thetas of its checkpoints (default: 4)"
    )
    parser.add_argument("--out", type=options.path, help="where the mean goes (default: RUN/mean.safetensors)")
    return parser.parse_args(argv)


def step_of(path: Path) -> int:
    """Return the outer step of a checkpoint's theta, `theta-0000250.safetensors`."""
    return int(path.stem.removeprefix("theta-"))


def average(run: Path, last: int) -> Theta:
    """Return the mean of a run's last thetas. Raises FileNotFoundError for a folder without, or not finished."""
    card = dict(Theta.load(run / THETA).card)
    paths = sorted(run.glob("theta-*.safetensors"), key=step_of)[-last:]
    if not paths:
        raise FileNotFoundError(f"{run} has no theta-*.safetensors, of a checkpoint")
    thetas = [Theta.load(path).arrays for path in paths]
    arrays = {name: np.mean([theta[name] for theta in thetas], axis=0, dtype=np.float64) for name in NAMES}
    steps = ", ".join(str(step_of(path)) for path in paths)
    card["outer_steps"] = f"{card['outer_steps']}, mean of the thetas after {steps}"
    return Theta.from_arrays(arrays, card | {"selection": "none: late thetas averaged"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for a user's mistake."""
    arguments = parse_arguments(argv)
    out = arguments.out or arguments.run / "mean.safetensors"
    try:
        with unfailing_streams():
            theta = average(arguments.run, arguments.last)
            theta.save(out)
            print(f"{theta.card['outer_steps']} -> {out} ({theta.label})")
            return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
