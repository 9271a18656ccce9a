"""Average late thetas of one or several meta-training runs: what their last steps and their seeds differ in is noise.

    python -m celo2.meta.average runs/meta/seed-0 runs/meta/seed-1 --last 4 --out celo2-lm.safetensors

The runs must be of one recipe. Nothing is chosen among their thetas; `celo2.meta.evaluate --also` judges the mean.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from celo2.meta.train import THETA
from celo2.pretrain import options
from celo2.pretrain.terminal import unfailing_streams
from celo2.theta import NAMES, Theta

# of a card: what the runs must have alike, and what adds up
ALIKE = ("recipe", "variant", "orthogonalize", "data")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Average late thetas of meta-training runs.")
    parser.add_argument("runs", type=options.path, nargs="+", metavar="RUN", help="folder of a meta-training run")
    parser.add_argument(
        "--last",
        type=options.whole_number(1),
        default=4,
        metavar="N",
        help="of each run, its last N thetas (default: 4)",
    )
    parser.add_argument("--out", type=options.path, required=True, help="where the mean goes")
    return parser.parse_args(argv)


def step_of(path: Path) -> int:
    """Return the outer step of a checkpoint's theta, `theta-0000250.safetensors`."""
    return int(path.stem.removeprefix("theta-"))


def mean(thetas: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[np.float64]]:
    """Return the mean of several thetas, array by array, in float64."""
    return {name: np.mean([arrays[name] for arrays in thetas], axis=0, dtype=np.float64) for name in NAMES}


def average(runs: Sequence[Path], last: int) -> Theta:
    """Return the mean of the last thetas of every run; each run weighs the same.

    Raises FileNotFoundError for a folder without thetas or without their card, ValueError for runs that differ in
    recipe or data.
    """
    means, cards, steps = [], [], []
    for run in runs:
        cards.append(dict(Theta.load(run / THETA).card))
        paths = sorted(run.glob("theta-*.safetensors"), key=step_of)[-last:]
        if not paths:
            raise FileNotFoundError(f"{run} has no theta-*.safetensors: give --save-every to celo2.meta.train")
        means.append(mean([Theta.load(path).arrays for path in paths]))
        steps.append([step_of(path) for path in paths])
    for name in ALIKE:
        values = sorted({card.get(name, "none") for card in cards})
        if len(values) > 1:
            raise ValueError(f"the runs differ in {name}: {', '.join(values)}")
    described = [
        f"{', '.join(map(str, some))} of {card['outer_steps']}" for some, card in zip(steps, cards, strict=True)
    ]
    card = cards[0] | {
        "seed": ", ".join(card["seed"] for card in cards),
        "outer_steps": f"mean of the thetas after {'; '.join(dict.fromkeys(described))}",
        "inner_steps": str(sum(int(card["inner_steps"]) for card in cards)),
        "seconds": f"{sum(float(card['seconds']) for card in cards):.0f}",
        "selection": "none: late thetas averaged",
    }
    return Theta.from_arrays(mean(means), card)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for a user's mistake."""
    arguments = parse_arguments(argv)
    try:
        with unfailing_streams():
            theta = average(arguments.runs, arguments.last)
            theta.save(arguments.out)
            print(f"{theta.card['outer_steps']}, seeds {theta.card['seed']} -> {arguments.out} ({theta.label})")
            return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
