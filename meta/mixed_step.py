"""Several networks in one run: their trajectories advance one network after another and are seen as one.

Particles are in the order of the families; on several ranks each takes its part of every family, so that a rank's work
is the others'.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celo2.meta.draws import Batches
from celo2.meta.inner_optimizer import Rehearsal
from celo2.meta.recipes import Recipe
from celo2.meta.tasks import TaskFamily, TaskMix
from celo2.meta.truncated_step import Arrays, Plan, TruncatedStep, Unroll


class MixedStep:
    """The TruncatedSteps of a run's families on this rank, with the interface of one."""

    def __init__(self, steps: Sequence[TruncatedStep], family: TaskMix) -> None:
        self.steps, self.family = steps, family
        self.particles = [particle for step in steps for particle in step.particles]

    @property
    def iteration(self) -> NDArray[np.int64]:
        """Counters [n] of all trajectories."""
        return np.concatenate([step.iteration for step in self.steps])

    @property
    def rehearsals(self) -> list[Rehearsal]:
        """What `torch.compile` compiles for the windows of all families."""
        return [rehearsal for step in self.steps for rehearsal in step.rehearsals]

    def rehearse(self) -> None:
        """Take a step of every network on zeros."""
        for step in self.steps:
            step.rehearse()

    @property
    def parts(self) -> dict[str, slice]:
        """Where each family's particles are among all, by the prefix of its arrays in a checkpoint."""
        ends = np.cumsum([len(step.particles) for step in self.steps]).tolist()
        return {step.prefix: slice(end - len(step.particles), end) for step, end in zip(self.steps, ends, strict=True)}

    @property
    def batches(self) -> tuple[Batches, ...]:
        """The batches of each family."""
        return tuple(batches for step in self.steps for batches in step.batches)

    def unroll(self, theta: Tensor, outer_step: int, batches: Sequence[NDArray[np.int32]] | None = None) -> Unroll:
        """Advance every trajectory by one window under `theta` [2 n, 347], the + perturbations first.

        `batches` are those of each family, where they have been made.
        """
        drawn = [None] * len(self.steps) if batches is None else [[some] for some in batches]
        signed = theta.view(2, len(self.particles), -1)
        unrolls = [
            step.unroll(signed[:, part].flatten(0, 1), outer_step, some)
            for step, part, some in zip(self.steps, self.parts.values(), drawn, strict=True)
        ]
        imitations = [unroll.imitation for unroll in unrolls if unroll.imitation is not None]
        return Unroll(
            losses=np.concatenate([unroll.losses for unroll in unrolls], axis=2),
            imitation=np.concatenate(imitations, axis=2) if imitations else None,
            plan=Plan.joined([unroll.plan for unroll in unrolls]),
            non_finite=sum(unroll.non_finite for unroll in unrolls),
        )

    def state_dict(self) -> Arrays:
        """Return the arrays of all families; their prefixes tell them apart."""
        return {name: array for step in self.steps for name, array in step.state_dict().items()}

    def share(self, arrays: Arrays) -> Arrays:
        """Return this rank's part of the arrays of a checkpoint."""
        return {name: array for step in self.steps for name, array in step.share(arrays).items()}

    def load_state_dict(self, arrays: Arrays) -> None:
        """Continue from the arrays of `state_dict`; raises ValueError for a missing name or another shape."""
        for step in self.steps:
            step.load_state_dict(arrays)


# what the estimator and the outer loop unroll
Trajectories = TruncatedStep | MixedStep


def trajectories(
    recipe: Recipe, mix: TaskMix, *, rank: int, world: int, device: torch.device, compiled: bool, backend: str = "torch"
) -> Trajectories:
    """Start the trajectories of a rank: an equal part of every family's particles.

    Raises ValueError for a family whose particles do not divide over the ranks.
    """

    def begin(family: TaskFamily) -> TruncatedStep:
        total = family.total_particles
        if total % world:
            raise ValueError(f"{total} particles do not split over {world} ranks: use a divisor of {total}")
        share = total // world
        mine = family.numbers[rank * share : (rank + 1) * share]
        return TruncatedStep(recipe, family, mine, device=device, compiled=compiled, backend=backend)

    steps = [begin(family) for family in mix.families]
    return steps[0] if len(steps) == 1 else MixedStep(steps, mix)
