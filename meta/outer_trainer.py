"""The outer loop: PES gradients, averaged over ranks, move theta by AdamW; checkpoints that resume to the bit.

The particles of a run are split over ranks, of every family a contiguous block, and every rank moves the same theta. A
checkpoint holds the trajectories of all ranks, so a run continues on another number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from celo2.files import write_atomic
from celo2.meta.compilation import compile_ahead, count_regions, processes_for
from celo2.meta.draws import Ahead
from celo2.meta.gradient_estimator import PES
from celo2.meta.inner_optimizer import rehearse
from celo2.meta.learned_rule import COLUMNS, flatten, unflatten
from celo2.meta.mixed_step import trajectories
from celo2.meta.network import Examples
from celo2.meta.randomness import Purpose, generator, truncated_normal
from celo2.meta.recipes import Recipe
from celo2.meta.tasks import TaskMix
from celo2.meta.truncated_step import Arrays
from celo2.pretrain.device import device_name
from celo2.theta import GROUP_COLUMNS, NESTEROV, OUTPUTS, Theta

FORMAT = "celo2-meta-checkpoint-v1"
KEEP = 2
# what one outer step leaves in the curve
CURVE = ("meta_loss", "imitation", "gradient_norm", "lr", "horizon", "non_finite")


# what the random rest of the MLP weighs in the direction of a theta that starts at an expert
REST = 0.1


def initial_theta(seed: int, start: str = "random", hidden: int = 8) -> Theta:
    """Draw theta as the paper does: truncated normals over sqrt(30) and sqrt(8), biases zero.

    With `start` an expert, `muon` or `adam`, one pair of ReLUs carries the expert's direction (fast momentum in
    Nesterov form, for `adam` times q) through both layers, and the random rest of the last layer is scaled to a tenth.
    """
    rng = generator(seed, Purpose.THETA)
    arrays: dict[str, NDArray[np.float64]] = {
        f"w0__{group}": truncated_normal(rng, (columns, hidden)) / math.sqrt(COLUMNS)
        for group, columns in enumerate(GROUP_COLUMNS)
    }
    arrays |= {"b0": np.zeros(hidden), "b1": np.zeros(hidden), "b2": np.zeros(OUTPUTS)}
    arrays["w1"] = truncated_normal(rng, (hidden, hidden)) / math.sqrt(hidden)
    arrays["w2"] = truncated_normal(rng, (hidden, OUTPUTS)) / math.sqrt(hidden)
    if start != "random":
        momentum, gradient = ("w0__3", "w0__0") if start == "muon" else ("w0__5", "w0__8")
        carriers, signs = slice(0, 2), np.array([1.0, -1.0])
        for group in range(len(GROUP_COLUMNS)):
            arrays[f"w0__{group}"][:, carriers] = 0
        arrays[momentum][0, carriers] = NESTEROV["momentum"] * signs
        arrays[gradient][0, carriers] = NESTEROV["gradient"] * signs
        # the pair hears nothing else, and nothing else hears it
        arrays["w1"][carriers], arrays["w1"][:, carriers] = 0, 0
        arrays["w1"][carriers, carriers] = np.eye(2)
        arrays["w2"] *= REST
        arrays["w2"][carriers, 0] = signs
    return Theta.from_arrays(arrays)


class OuterTrainer:
    """A meta-training run: `step()` takes one outer step, `save` and `resume` make it durable.

    With `torch.distributed` initialised, this rank takes its part of every family's particles; their number must be a
    multiple of the world size. What ranks add up lies on the host, so `group`, by default that of all ranks, must be
    able to send from there (gloo). With `ahead`, so many processes make the draws of the steps that follow, until
    `close`. `start` is where theta starts in place of what the recipe says. Raises ValueError for a family that does
    not divide, a start of another size, or a resume that does not fit.
    """

    def __init__(
        self,
        recipe: Recipe,
        data_sets: Sequence[Examples],
        *,
        seed: int = 0,
        device: torch.device | None = None,
        compiled: bool = True,
        backend: str = "torch",
        group: dist.ProcessGroup | None = None,
        ahead: int = 0,
        start: Theta | None = None,
    ) -> None:
        self.recipe, self.seed = recipe, seed
        self._group = group
        self.device = device or torch.device("cpu")
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.family = TaskMix(data_sets, seed=seed, particles=recipe.particles, scale_range=recipe.scale_range)
        self.total = self.family.total_particles
        self.truncated_step = trajectories(
            recipe,
            self.family,
            rank=self.rank,
            world=self.world,
            device=self.device,
            compiled=compiled,
            backend=backend,
        )
        self.start = start
        theta = initial_theta(seed, recipe.start, recipe.hidden) if start is None else start
        units = sorted({len(theta.arrays["b0"]), len(theta.arrays["b1"])})
        if units != [recipe.hidden]:
            raise ValueError(f"start {theta.label} has {units} hidden units, the recipe {recipe.hidden}")
        first = torch.from_numpy(flatten(theta))
        self._parameter = torch.nn.Parameter(first)
        self._adamw = torch.optim.AdamW(
            [self._parameter],
            lr=recipe.outer_lr,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=recipe.outer_weight_decay,
            foreach=False,
        )
        self.estimator = PES(recipe, self.truncated_step, first.numel(), self._sum_over_ranks)
        self._ahead = Ahead(self.estimator.own_draws, ahead) if ahead else None
        if self._ahead is not None:
            self.estimator.draws = self._ahead
        self.outer_step = 0
        self.notes: list[str] = []
        """What of the setting was another when the checkpoint was written that this run goes on from."""
        self._compiled = compiled
        self._curve: list[tuple[float, ...]] = []

    def close(self) -> None:
        """End the processes that make draws ahead; a further step starts others."""
        if self._ahead is not None:
            self._ahead.close()

    @property
    def curve(self) -> NDArray[np.float64]:
        """What each outer step left, [steps, figures], in the order of `CURVE`."""
        return self.recent(len(self._curve))

    def recent(self, steps: int) -> NDArray[np.float64]:
        """Return the last rows of the curve, at most `steps`."""
        return np.array(self._curve[-steps:], dtype=np.float64).reshape(-1, len(CURVE))

    @property
    def theta(self) -> Theta:
        """Theta as it is now; its card says how the recipe's variant is used."""
        variant = self.recipe.variant
        card = {"variant": variant, "orthogonalize": "true" if variant == "celo2" else "false"}
        return unflatten(self._parameter.detach().numpy().copy(), self.recipe.hidden, card)

    @property
    def inner_steps_per_outer(self) -> int:
        """Inner steps of one outer step over all ranks, both signs."""
        return 2 * self.total * self.recipe.window

    def _sum_over_ranks(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.world == 1:
            return values
        sums = values.copy()
        dist.all_reduce(torch.from_numpy(sums), group=self._group)
        return sums

    # compilation

    def count_regions(self) -> int:
        """Return how many regions the inner step compiles: none where the kernel takes all."""
        return count_regions(self.truncated_step.rehearse)

    def compile(self) -> None:
        """Compile the inner step ahead, in several processes where that is faster; the trajectories stay."""
        elsewhere = partial(rehearse, self.recipe, self.truncated_step.rehearsals, self.device)
        compile_ahead(self.truncated_step.rehearse, elsewhere, processes_for(self.device))

    def gradient(self) -> tuple[NDArray[np.float64], dict[str, float]]:
        """Unroll one window; return the gradient [347], averaged over all particles, and the figures of the curve."""
        estimate = self.estimator.estimate(self._parameter.detach().numpy(), self.outer_step)
        figures = [estimate.loss, estimate.imitation, estimate.horizon, float(estimate.non_finite)]
        sums = self._sum_over_ranks(np.concatenate([estimate.gradient, figures]))
        size = estimate.gradient.size
        mean = sums / self.total
        loss, imitation, horizon, _ = mean[size:]
        return mean[:size], {
            "meta_loss": loss,
            "imitation": imitation,
            "gradient_norm": float(np.linalg.norm(mean[:size])),
            "lr": self.recipe.lr(self.outer_step),
            "horizon": horizon,
            "non_finite": sums[-1],
        }

    def step(self) -> dict[str, float]:
        """Take one outer step; return meta_loss (mean of both signs), gradient_norm, lr, horizon and non_finite."""
        gradient, figures = self.gradient()
        if self.recipe.outer_clip_norm is not None:
            gradient = gradient * min(1.0, self.recipe.outer_clip_norm / max(figures["gradient_norm"], 1e-30))
        self._parameter.grad = torch.from_numpy(gradient.astype(np.float32))
        self._adamw.param_groups[0]["lr"] = figures["lr"]
        self._adamw.step()
        self.outer_step += 1
        self._curve.append(tuple(figures[name] for name in CURVE))
        return figures

    # checkpoints

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with: recipe, seed, data, and the theta that it starts from, if it is given."""
        identity = {"recipe": self.recipe.identity, "seed": self.seed, "data": self.family.fingerprint}
        return identity if self.start is None else identity | {"start": self.start.sha256}

    def setting(self) -> dict[str, Any]:
        """What changes the numbers of a run by rounding alone."""
        return {
            "compiled": self._compiled,
            "device": device_name(self.device),
            "ranks": self.world,
            "torch": str(torch.__version__),
        }

    def _gather(self, arrays: Arrays) -> Arrays:
        """Concatenate the arrays of all ranks along the particles, axis 1, on rank 0."""
        if self.world == 1:
            return arrays
        parts: list[Any] | None = [None] * self.world if self.rank == 0 else None
        dist.gather_object(arrays, parts, group=self._group)
        if parts is None:
            return {}
        return {name: np.concatenate([part[name] for part in parts], axis=1) for name in arrays}

    def save(self, out_dir: Path) -> Path:
        """Write the checkpoint and the theta of this outer step into `out_dir`, atomically; keep the last two.

        Every rank must call it. Raises OSError, with older checkpoints intact, when the disk refuses.
        """
        path = out_dir / f"checkpoint-{self.outer_step:07d}.safetensors"
        arrays = self._gather(self.truncated_step.state_dict() | self.estimator.state_dict())
        if self.rank == 0:
            arrays |= {"theta": self._parameter.detach().numpy(), "curve": self.curve}
            for name, value in self._adamw.state[self._parameter].items():
                arrays[f"adamw/{name}"] = value.numpy()
            contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            card = {
                "format": FORMAT,
                "outer_step": str(self.outer_step),
                "identity": json.dumps(self.identity()),
                "setting": json.dumps(self.setting()),
                "sha256": _digest(contiguous, self.outer_step),
            }
            write_atomic(path, [save_safetensors(contiguous, metadata=card)])
            self.theta.save(out_dir / f"theta-{self.outer_step:07d}.safetensors")
            for old in sorted(out_dir.glob("checkpoint-*.safetensors"))[:-KEEP]:
                old.unlink()
        return path

    def load(self, path: Path) -> None:
        """Continue from a checkpoint. Raises ValueError when it is damaged or belongs to another run."""
        arrays, card = _read(path)
        theirs, mine = json.loads(card["identity"]), json.loads(json.dumps(self.identity()))
        if theirs != mine:
            differing = sorted(
                {key for key in mine.keys() | theirs.keys() if key != "recipe" and theirs.get(key) != mine.get(key)}
                | {key for key in mine["recipe"] if theirs.get("recipe", {}).get(key) != mine["recipe"][key]}
            )
            raise ValueError(
                f"{path} belongs to another run: {', '.join(differing) or 'recipe'} differ; use another --out-dir, or "
                "the same recipe, data, seed and number of steps"
            )
        there, here = json.loads(card.get("setting", "{}")), self.setting()
        self.notes = [f"{k} is {v!r} there and {here[k]!r} here" for k, v in there.items() if here.get(k, v) != v]
        particles = self.truncated_step.share(arrays)
        self.truncated_step.load_state_dict(particles)
        self.estimator.load_state_dict(particles)
        self._parameter.data.copy_(torch.from_numpy(arrays["theta"]))
        moments = {name: torch.from_numpy(arrays[f"adamw/{name}"]) for name in ("step", "exp_avg", "exp_avg_sq")}
        self._adamw.state[self._parameter] = moments
        self._curve = [tuple(row) for row in arrays["curve"].astype(np.float64).tolist()]
        self.outer_step = int(card["outer_step"])

    def resume(self, out_dir: Path) -> Path | None:
        """Continue from the newest readable checkpoint of `out_dir`; None when there is none.

        A damaged one is skipped with a warning. Raises ValueError when all are damaged, or the newest readable one
        belongs to another run.
        """
        paths = sorted(out_dir.glob("checkpoint-*.safetensors"), reverse=True)
        damaged = []
        for path in paths:
            try:
                _read(path)
            except ValueError as error:
                warnings.warn(f"skipped: {error}", stacklevel=2)
                damaged.append(path)
                continue
            self.load(path)
            return path
        if damaged:
            raise ValueError(
                f"no checkpoint in {out_dir} is readable ({len(damaged)} damaged): remove them to start over"
            )
        return None


def _digest(arrays: Arrays, outer_step: int) -> str:
    digest = hashlib.sha256(str(outer_step).encode())
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].shape}{arrays[name].dtype}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _read(path: os.PathLike[str]) -> tuple[Arrays, dict[str, str]]:
    data = Path(path).read_bytes()
    try:
        arrays = load_safetensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        card = header["__metadata__"]
        if card["format"] != FORMAT:
            raise ValueError(f"format {card['format']!r}, expected {FORMAT!r}")
        if card["sha256"] != _digest(arrays, int(card["outer_step"])):
            raise ValueError("its contents do not match its hash")
    except (ValueError, KeyError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
    return arrays, card
