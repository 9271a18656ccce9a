"""Antithetic persistent evolution strategies (PES): the gradient of the meta-loss with respect to theta.

Source: Vicol, Metz and Sohl-Dickstein 2021 (arXiv 2112.13835), with the bookkeeping of Celo2's code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from celo2.meta.draws import Drawn, Draws
from celo2.meta.mixed_step import Trajectories
from celo2.meta.recipes import Recipe
from celo2.meta.truncated_step import Arrays, Unroll

Reduce = Callable[[NDArray[np.float64]], NDArray[np.float64]]
# root mean square that the imitation's differences are brought to, task by task
IMITATION_RMS = 0.01


@dataclass(frozen=True)
class Estimate:
    """Sums over this rank's particles: divide by the particles of the whole run."""

    gradient: NDArray[np.float64]
    loss: float
    imitation: float
    horizon: float
    non_finite: int


def pes_gradients(
    deltas: NDArray[np.float64],
    mask: NDArray[np.bool_],
    done: NDArray[np.bool_],
    accumulator: NDArray[np.float64],
    perturbation: NDArray[np.float64],
    std: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each particle's gradient [n, d] and its next accumulator [n, d].

    `deltas` [K, n] are loss+ - loss-, `mask` marks the slots that took a step, `done` the last slot of a trajectory.
    From that slot on a difference belongs to the present perturbation alone; before it, to the sum of all perturbations
    of the trajectory.
    """
    past_end = np.logical_or.accumulate(done, axis=0)
    accumulator = accumulator + perturbation
    weights = deltas * mask / mask.sum(0)
    before, after = (weights * ~past_end).sum(0)[:, None], (weights * past_end).sum(0)[:, None]
    gradients = (before * accumulator + after * perturbation) / (2 * std**2)
    return gradients, np.where(past_end[-1][:, None], perturbation, accumulator)


class PES:
    """The GradientEstimator of a run: perturbs theta for each particle, unrolls a window, accumulates perturbations."""

    def __init__(
        self, recipe: Recipe, truncated_step: Trajectories, dimension: int, reduce: Reduce | None = None
    ) -> None:
        self.recipe, self.truncated_step = recipe, truncated_step
        self.accumulator = np.zeros((len(truncated_step.particles), dimension))
        self.own_draws = Draws(
            seed=truncated_step.family.seed,
            particles=tuple(truncated_step.particles),
            dimension=dimension,
            std=recipe.std,
            window=recipe.window,
            families=truncated_step.batches,
        )
        self.draws: Callable[[int], Drawn] = self.own_draws
        """What an outer step draws; `celo2.meta.draws.Ahead` gives the same, sooner."""
        # sums over ranks; only the imitation needs it, whose scale is a task's
        self._reduce = reduce or (lambda x: x)

    def estimate(self, theta: NDArray[np.float32], outer_step: int) -> Estimate:
        """Advance every trajectory by one window with theta +- its perturbation; return the sums of this rank."""
        drawn = self.draws(outer_step)
        xi = drawn.perturbations.astype(np.float64)
        signed = np.concatenate([theta + xi, theta - xi]).astype(np.float32)
        unroll = self.truncated_step.unroll(torch.from_numpy(signed), outer_step, drawn.batches)
        deltas = self._deltas(unroll, outer_step)
        plan = unroll.plan
        gradients, self.accumulator = pes_gradients(deltas, plan.mask, plan.done, self.accumulator, xi, self.recipe.std)
        steps = plan.mask.sum(0)
        imitation = 0.0
        if unroll.imitation is not None:
            imitation = float((unroll.imitation.mean(1).sum(0) / steps).sum())
        return Estimate(
            gradient=np.nan_to_num(gradients.sum(0), nan=0.0, posinf=0.0, neginf=0.0),
            loss=float(((unroll.losses.mean(1) * plan.weight).sum(0) / steps).sum()),
            imitation=imitation,
            horizon=float(self.truncated_step.iteration.sum()),
            non_finite=unroll.non_finite,
        )

    def _deltas(self, unroll: Unroll, outer_step: int) -> NDArray[np.float64]:
        """Return loss+ - loss- [K, n], blended with the imitation's where the recipe has an expert."""
        task = (unroll.losses[:, 0] - unroll.losses[:, 1]) * unroll.plan.weight
        if unroll.imitation is None:
            return task
        weight = self.recipe.imitation_weight(outer_step)
        direction = unroll.imitation[:, 0] - unroll.imitation[:, 1]
        family = self.truncated_step.family
        owner = np.array([p // family.particles for p in self.truncated_step.particles])
        sums = np.zeros((2, len(family.tasks)))
        np.add.at(sums[0], owner, (direction**2).sum(0))
        np.add.at(sums[1], owner, unroll.plan.mask.sum(0))
        sums = self._reduce(sums)
        rms = np.sqrt(sums[0] / np.maximum(sums[1], 1) + 1e-24)
        return weight * IMITATION_RMS * direction / rms[owner] + (1 - weight) * task

    def state_dict(self) -> Arrays:
        """Return the accumulators of each family, [1, n, 347]."""
        parts = self.truncated_step.parts
        return {f"{prefix}pes/accumulator": self.accumulator[None, part] for prefix, part in parts.items()}

    def load_state_dict(self, arrays: Arrays) -> None:
        """Continue from the arrays of `state_dict`; raises ValueError for another shape."""
        for name, mine in self.state_dict().items():
            found = arrays.get(name)
            if found is None or found.shape != mine.shape:
                raise ValueError(f"{name}: expected {mine.shape}, found {getattr(found, 'shape', None)}")
        self.accumulator = np.concatenate([arrays[name][0] for name in self.state_dict()])
