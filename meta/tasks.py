"""Inner problems: a Task is an image set with an order of batches, a TaskFamily draws the start of a trajectory on it.

Every task trains the same network, 64-32-10 with ReLU on 8 x 8 pictures, so that all trajectories advance as one batch.
Weights are in PyTorch's layout, [out, in].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celo2.meta.images import CLASSES, PIXELS, ImageSet, fingerprint
from celo2.meta.randomness import Purpose, generator

HIDDEN = 32
BATCH = 64
# shapes of the four tensors of the inner network, in the order of its layers
SHAPES: dict[str, tuple[int, ...]] = {
    "hidden_weight": (HIDDEN, PIXELS),
    "hidden_bias": (HIDDEN,),
    "output_weight": (CLASSES, HIDDEN),
    "output_bias": (CLASSES,),
}
MATRICES = ("hidden_weight", "output_weight")
VECTORS = ("hidden_bias", "output_bias")
# the normalised loss is clipped here: 1.5 times the loss of a uniform guess
LOSS_CLIP = 1.5 * math.log(CLASSES)

Weights = dict[str, NDArray[np.float32]]


class Task:
    """One image set and the order of its batches: shuffled epochs of whole batches, one stream for all particles.

    At inner step `t` of a run, particle `i` of `n` takes batch `n t + i` of the stream. The order is a function of the
    seed alone. Raises ValueError when the set is smaller than a batch.
    """

    def __init__(self, image_set: ImageSet, index: int, seed: int) -> None:
        if len(image_set.images) < BATCH:
            raise ValueError(f"image set {image_set.name!r} has {len(image_set.images)} images, a batch needs {BATCH}")
        self.image_set, self.index, self.seed = image_set, index, seed
        self.batches_per_epoch = len(image_set.images) // BATCH
        self._epoch = lru_cache(maxsize=2)(self._shuffle)

    @property
    def name(self) -> str:
        return self.image_set.name

    def _shuffle(self, epoch: int) -> NDArray[np.int64]:
        order = generator(self.seed, Purpose.DATA_ORDER, self.index, epoch).permutation(len(self.image_set.images))
        return order[: self.batches_per_epoch * BATCH].reshape(-1, BATCH)

    def batches(self, start: int, count: int) -> NDArray[np.int64]:
        """Return the image indices [count, 64] of batches `start` .. `start + count - 1` of the stream."""
        pieces = []
        while count > 0:
            epoch, position = divmod(start, self.batches_per_epoch)
            piece = self._epoch(epoch)[position : position + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces)


def normalised_loss(loss: NDArray[np.float64]) -> NDArray[np.float64]:
    """Clip a loss to [0, 1.5 ln 10]; NaN and infinity become the upper bound."""
    return np.clip(np.nan_to_num(loss, nan=LOSS_CLIP, posinf=LOSS_CLIP), 0.0, LOSS_CLIP)


def initial_weights(rng: np.random.Generator) -> Weights:
    """Draw the network's start: weights truncated at two standard deviations, z / sqrt(fan_in); biases zero."""
    weights = {}
    for name, shape in SHAPES.items():
        weights[name] = np.zeros(shape, np.float32)
        if name in MATRICES:
            weights[name] = (truncated_normal(rng, shape) / math.sqrt(shape[1])).astype(np.float32)
    return weights


def truncated_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Draw standard normals conditioned on [-2, 2], by drawing again what falls outside (no correction of variance)."""
    values = rng.standard_normal(shape)
    while (outside := np.abs(values) > 2).any():
        values[outside] = rng.standard_normal(int(outside.sum()))
    return values


class TaskFamily:
    """The tasks of a meta-training run with reparametrisation augmentation (level global).

    A trajectory starts at weights w0 / s and minimises f(s w): s is log-uniform in `scale_range`, one number for all
    tensors, constant over the trajectory. `particles` trajectories run on each task; particle `p` of the whole run
    belongs to task `p // particles`.
    """

    def __init__(
        self,
        image_sets: Sequence[ImageSet],
        *,
        seed: int,
        particles: int = 8,
        scale_range: tuple[float, float] = (1e-3, 1e3),
    ) -> None:
        if not image_sets:
            raise ValueError("a task family needs at least one image set")
        if not 0 < scale_range[0] <= scale_range[1]:
            raise ValueError(f"scale_range={scale_range}: expected 0 < low <= high")
        self.tasks = [Task(image_set, index, seed) for index, image_set in enumerate(image_sets)]
        self.seed, self.particles, self.scale_range = seed, particles, scale_range
        self.fingerprint = fingerprint(image_sets)
        sizes = [len(image_set.images) for image_set in image_sets]
        self._offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])

    @property
    def total_particles(self) -> int:
        return len(self.tasks) * self.particles

    def image_bank(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return images [N, 64] float32 and labels [N] of all tasks, one after another: what `batches` points into."""
        images = np.concatenate([task.image_set.images for task in self.tasks])
        labels = np.concatenate([task.image_set.labels for task in self.tasks])
        return torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)

    def batches(self, first_step: int, steps: int, particles: range) -> NDArray[np.int64]:
        """Return indices into the image bank, [steps, len(particles), 64], for the steps from `first_step` on."""
        columns = []
        for index, task in enumerate(self.tasks):
            mine = [p - index * self.particles for p in particles if p // self.particles == index]
            if mine:
                stream = task.batches(first_step * self.particles, steps * self.particles)
                stream = stream.reshape(steps, self.particles, BATCH)[:, mine]
                columns.append(stream + self._offsets[index])
        return np.concatenate(columns, axis=1)

    def sample(self, particle: int, occasion: int) -> tuple[float, Weights]:
        """Draw the scale s and the start w0 / s of the trajectory that `particle` begins at outer step `occasion`."""
        rng = generator(self.seed, Purpose.TRAJECTORY, particle, occasion)
        low, high = np.log(self.scale_range)
        scale = float(np.exp(rng.uniform(low, high)))
        return scale, {name: w / np.float32(scale) for name, w in initial_weights(rng).items()}
