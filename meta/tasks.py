"""Inner problems: a Task is a data set with an order of batches, a TaskFamily draws the start of a trajectory on it.

Every task of a family trains the same network, so that all its trajectories advance as one batch of problems. A run's
tasks are one family, or a TaskMix of several; particles are numbered over the whole run, family after family.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celo2.meta.draws import Batches, Stream, batches_of
from celo2.meta.images import ImageSet
from celo2.meta.network import MLP, Examples, Network, Weights
from celo2.meta.randomness import Purpose, generator
from celo2.meta.transformer import ByteWindows, Transformer

# the network that a kind of data set trains
NETWORKS: dict[type[Any], Network] = {ImageSet: MLP(), ByteWindows: Transformer()}


class Task:
    """One data set and the stream of its batches (`celo2.meta.draws`).

    Raises ValueError when the set is smaller than a batch.
    """

    def __init__(self, data_set: Examples, index: int, seed: int) -> None:
        self.data_set, self.index = data_set, index
        self.stream = Stream(len(data_set.inputs), network_of(data_set).batch, index, seed)
        if self.size < self.stream.batch:
            raise ValueError(f"data set {self.name!r} has {self.size} examples, a batch needs {self.stream.batch}")

    @property
    def size(self) -> int:
        return self.stream.size

    @property
    def name(self) -> str:
        return self.data_set.name


def network_of(data_set: Examples) -> Network:
    """Return the network that a data set trains."""
    return NETWORKS[type(data_set)]


def normalised_loss(loss: NDArray[np.float64], clip: float) -> NDArray[np.float64]:
    """Clip a loss to [0, clip]; NaN and infinity become the upper bound."""
    return np.clip(np.nan_to_num(loss, nan=clip, posinf=clip), 0.0, clip)


class TaskFamily:
    """Tasks of one network with reparametrisation augmentation (level global).

    A trajectory starts at weights w0 / s and minimises f(s w): s is log-uniform in `scale_range`, one number for all
    tensors, constant over the trajectory. `particles` trajectories run on each task; particle `p` of the whole run
    belongs to task `p // particles` of the whole run, and this family's tasks begin at number `first_task`.
    """

    def __init__(
        self,
        data_sets: Sequence[Examples],
        *,
        seed: int,
        particles: int = 8,
        scale_range: tuple[float, float] = (1e-3, 1e3),
        first_task: int = 0,
    ) -> None:
        if not data_sets:
            raise ValueError("a task family needs at least one data set")
        if not 0 < scale_range[0] <= scale_range[1]:
            raise ValueError(f"scale_range={scale_range}: expected 0 < low <= high")
        self.network = network_of(data_sets[0])
        assert all(network_of(data_set) is self.network for data_set in data_sets)
        self.tasks = [Task(data_set, first_task + i, seed) for i, data_set in enumerate(data_sets)]
        self.seed, self.particles, self.scale_range = seed, particles, scale_range
        self.fingerprint = _fingerprint(self.tasks)
        self._offsets = np.concatenate([[0], np.cumsum([task.size for task in self.tasks])[:-1]])

    @property
    def numbers(self) -> range:
        """Numbers of this family's particles in the whole run."""
        first = self.tasks[0].index * self.particles
        return range(first, first + self.total_particles)

    @property
    def total_particles(self) -> int:
        return len(self.tasks) * self.particles

    def bank(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return inputs [n, ...] and targets [n, ...] of all tasks, one after another: what `batches` points into."""
        inputs = np.concatenate([task.data_set.inputs for task in self.tasks])
        targets = np.concatenate([task.data_set.targets for task in self.tasks])
        return torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)

    def batches(self, particles: Sequence[int]) -> Batches:
        """Return the batches of some of its particles: rows of the bank."""
        streams = [(task.stream, int(offset)) for task, offset in zip(self.tasks, self._offsets, strict=True)]
        return batches_of(streams, particles, self.particles)

    def sample(self, particle: int, occasion: int) -> tuple[float, Weights]:
        """Draw the scale s and the start w0 / s of the trajectory that `particle` begins at outer step `occasion`."""
        rng = generator(self.seed, Purpose.TRAJECTORY, particle, occasion)
        low, high = np.log(self.scale_range)
        scale = float(np.exp(rng.uniform(low, high)))
        return scale, {name: w / np.float32(scale) for name, w in self.network.initial_weights(rng).items()}


class TaskMix:
    """The families of a run, one a network in the order in which the networks first appear among `data_sets`.

    Every particle counts the same in the meta-gradient, in nats: a next byte of 64 classes begins at ln 64, an image
    at ln 10, so the transformer's differences are of a scale 1.8 times the images'. Raises ValueError for no data set.
    """

    def __init__(
        self, data_sets: Sequence[Examples], *, seed: int, particles: int = 8, scale_range: tuple[float, float]
    ) -> None:
        groups: dict[Network, list[Examples]] = {}
        for data_set in data_sets:
            groups.setdefault(network_of(data_set), []).append(data_set)
        self.families: list[TaskFamily] = []
        # an empty group says what is missing
        for group in groups.values() or [[]]:
            first = sum(len(family.tasks) for family in self.families)
            self.families.append(
                TaskFamily(group, seed=seed, particles=particles, scale_range=scale_range, first_task=first)
            )
        self.tasks = [task for family in self.families for task in family.tasks]
        self.seed, self.particles = seed, particles
        self.fingerprint = _fingerprint(self.tasks)

    @property
    def total_particles(self) -> int:
        return len(self.tasks) * self.particles


def _fingerprint(tasks: Iterable[Task]) -> str:
    """Hash of the names and the contents of several tasks' data, in order."""
    return hashlib.sha256("".join(task.data_set.sha256 for task in tasks).encode()).hexdigest()
