"""What `celo2.meta.evaluate` compares: settings, texts, and the methods with the options that their users tune.

Every method has as many runs in a setting, over its own options. They are chosen on one split of a text and one seed,
and compared on another split with other seeds, the same for all methods.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from celo2.meta.language_model import SELECTION, Method, Settings
from celo2.meta.outer_trainer import initial_theta
from celo2.meta.search import Axis, Lattice
from celo2.pretrain.prepare_data import prepare, prepare_embedded
from celo2.pretrain.sources import TextFiles
from celo2.pretrain.sweep_points import log_spaced
from celo2.theta import Theta, load_weights

SEARCH_SEED = 0
SEEDS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Setting:
    """A model and a length of training, and how many runs a method has to find its options.

    The search starts where that of the setting `after` ended, else where the method's axes say.
    """

    settings: Settings
    runs: int
    after: str | None = None


SETTINGS = {
    "short": Setting(SELECTION, 12),
    "medium": Setting(Settings(eval_every=200), 6, "short"),
    # two neighbours of the rate that was best at 800 steps
    "long": Setting(Settings(steps=2400, eval_every=600), 3, "medium"),
}


def standard_library(folder: Path) -> Path:
    """Prepare the source of Python's standard library as bytes; it is on every machine, of its own Python."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    files = [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]
    prepare(TextFiles(tuple(files)), "bytes", folder)
    return folder


# folders of byte shards
TEXTS: dict[str, Callable[[], Path]] = {
    "wikipedia": lambda: prepare_embedded("bytes", Path("data/wikipedia-bytes")),
    "python": lambda: standard_library(Path("data/python-bytes")),
}


@dataclass(frozen=True)
class Contender:
    """A method with its options, and what its row says of it."""

    method: Method
    lattice: Lattice
    what: str

    @property
    def name(self) -> str:
        return self.method.name


def _rates(start: float) -> tuple[float, ...]:
    """A hundredth to a hundred times the start, four a decade."""
    rates = log_spaced(start * 1e-2, start * 1e2, 17)
    return tuple(start if abs(rate / start - 1) < 1e-2 else rate for rate in rates)


LATTICES = {
    "celo2": Lattice(
        (Axis("lr", _rates(1.8e-3), 1.8e-3), Axis("adam_lr_mult", (2.5, 5.0, 10.0, 20.0, 40.0, 80.0), 20.0))
    ),
    # it has no AdamW side
    "celo2-base": Lattice((Axis("lr", _rates(5e-4), 5e-4), Axis("weight_decay", (0.0, 0.1, 0.3, 1.0, 3.0), 0.0))),
}
ADAMW = Lattice(
    (
        Axis("lr", _rates(3e-3), 3e-3),
        Axis("beta2", (0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999), 0.95),
        Axis("weight_decay", (0.0, 0.01, 0.03, 0.1, 0.3), 0.0),
    )
)
MUON = Lattice(
    (
        Axis("lr", _rates(0.02), 0.02),
        Axis("momentum", (0.7, 0.8, 0.85, 0.9, 0.95, 0.98), 0.9),
        Axis("adam_lr", _rates(0.02), 0.02),
    )
)


def start_of_celo2() -> Theta:
    """Return where the meta-training of the bundled `celo2` started."""
    card = {"name": "start", "variant": "celo2", "orthogonalize": "true"}
    return Theta.from_arrays(initial_theta(0, "muon").arrays, card)


def contenders() -> list[Contender]:
    """Return the rows that must be there: trained thetas, their start, closed forms, tuned Muon and tuned AdamW."""

    def learned(name: str, variant: str, weights: str | Theta, what: str) -> Contender:
        return Contender(Method(name, variant, load_weights(weights)), LATTICES[variant], what)

    return [
        learned("celo2", "celo2", "celo2", "bundled beside it: meta-trained on images"),
        learned("celo2-lm", "celo2", "celo2-lm", "the default: meta-trained on a small byte transformer"),
        learned("start", "celo2", start_of_celo2(), "where the meta-training of both began: Muon's direction"),
        learned("nesterov", "celo2", "nesterov", "the same direction as a closed form"),
        Contender(Method("muon", "muon"), MUON, "`torch.optim.Muon`, and AdamW for the rest"),
        learned("celo2-base", "celo2-base", "celo2-base", "the bundled theta, without Newton-Schulz"),
        learned("adam", "celo2-base", "adam", "Adam's direction as a closed form"),
        Contender(Method("adamw", "adamw"), ADAMW, "fused `torch.optim.AdamW`"),
    ]


def also(weights: str) -> Contender:
    """Return a row for other weights: a file, a folder of a run, or a hub id. Raises as `load_weights`."""
    theta = load_weights(weights)
    opt = theta.variant if theta.orthogonalize else "celo2-base"
    return Contender(Method(weights, opt, theta), LATTICES[opt], f"`{weights}`, {theta.label}")
