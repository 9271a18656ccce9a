"""Randomness without a state: every draw is a function of the seed, its purpose and its place.

A run resumes to the bit with nothing but its outer step, and a particle draws the same numbers on any number of ranks.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """What a draw is for; part of its key, so that no two purposes share numbers."""

    THETA = 0
    PERTURBATION = 1
    DATA_ORDER = 2
    INITIAL_LENGTH = 3
    INITIAL_ITERATION = 4
    LENGTH = 5
    TRAJECTORY = 6
    RESUME = 7
    SUBSET = 8
    PHOTOGRAPHS = 9
    PROBE = 10
    TEXT = 11
    MEMORY = 12
    RATE = 13
    BATCH = 14


def generator(seed: int, purpose: Purpose, *place: int) -> np.random.Generator:
    """Return the generator of one draw: `place` is for example (particle, outer step)."""
    return np.random.default_rng([seed, int(purpose), *place])


def truncated_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Draw standard normals conditioned on [-2, 2], by drawing again what falls outside (no correction of variance)."""
    values = rng.standard_normal(shape)
    while (outside := np.abs(values) > 2).any():
        values[outside] = rng.standard_normal(int(outside.sum()))
    return values
