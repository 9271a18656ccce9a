"""How a theta behaves far beyond the horizon it was trained on: long unrolls of the inner tasks at three scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from celo2.meta.images import ImageSet
from celo2.meta.inner_optimizer import InnerOptimizer
from celo2.meta.learned_rule import ThetaBatch, flatten
from celo2.meta.network import MATRICES, initial_weights
from celo2.meta.randomness import Purpose, generator
from celo2.meta.recipes import Recipe
from celo2.meta.tasks import TaskFamily
from celo2.theta import Theta

SCALES = (1e-3, 1.0, 1e3)
STEPS = 20_000
# decay of the averaged loss whose draw-up is measured, and steps that the final loss is averaged over
AVERAGE_DECAY = 0.99
FINAL_STEPS = 500


def unroll(
    theta: Theta, image_sets: Sequence[ImageSet], *, steps: int = STEPS, seed: int = 0, compiled: bool = True
) -> list[dict[str, Any]]:
    """Train the inner network for `steps` on every task at every scale, from two starts; return one record each.

    A record has the final loss (mean of the last 500 steps), the largest draw-up of the averaged loss over its running
    minimum, the number of losses that were not finite, and the root mean square of the matrices in network coordinates.
    The optimizer is the meta-training's: a constant rate of 1e-3, no decay, no gradient clip.
    """
    recipe = Recipe(name="horizon", variant=theta.variant)
    optimizer = InnerOptimizer(recipe, compiled=compiled)
    # one particle a task and scale; its two signs are two starts on the same batches
    family = TaskFamily(image_sets, seed=seed, particles=len(SCALES))
    n = family.total_particles
    state = optimizer.zeros(2 * n, torch.device("cpu"))
    scales = np.tile(SCALES, len(image_sets))
    for problem in range(2 * n):
        start = initial_weights(generator(seed, Purpose.PROBE, problem))
        for name, weights in start.items():
            state[name][problem] = torch.from_numpy(weights) / scales[problem % n]
    state["scale"].copy_(torch.from_numpy(np.tile(scales, 2)))
    images, labels = family.bank(torch.device("cpu"))
    theta_batch = ThetaBatch.from_vectors(torch.from_numpy(flatten(theta)).expand(2 * n, -1))

    average = np.full(2 * n, np.nan)
    lowest, drawup = np.full(2 * n, np.inf), np.zeros(2 * n)
    non_finite, total = np.zeros(2 * n, int), np.zeros(2 * n)
    batches = family.batches(range(n))
    # blocks of them, so that a long unroll holds no more than one of them
    for first in range(0, steps, recipe.window):
        count = min(recipe.window, steps - first)
        indices = torch.from_numpy(batches.of(first, count))
        for t in range(count):
            picked = indices[t].flatten()
            loss_P, _ = optimizer.step(
                state, images[picked].view(n, -1, images.shape[1]), labels[picked].view(n, -1), theta_batch
            )
            loss = loss_P.double().numpy()
            finite = np.isfinite(loss)
            non_finite += ~finite
            average = np.where(np.isnan(average), loss, AVERAGE_DECAY * average + (1 - AVERAGE_DECAY) * loss)
            lowest = np.where(finite, np.minimum(lowest, average), lowest)
            drawup = np.where(finite, np.maximum(drawup, average - lowest), np.inf)
            if first + t >= steps - FINAL_STEPS:
                total += loss
    size = sum(state[name][0].numel() for name in MATRICES)
    square = sum(state[name].double().square().sum((1, 2)) for name in MATRICES)
    rms = (torch.sqrt(torch.as_tensor(square) / size) * state["scale"].double()).numpy()
    return [
        {
            "theta": theta.name,
            "sha256": theta.sha256,
            "task": image_sets[(problem % n) // len(SCALES)].name,
            "scale": float(scales[problem % n]),
            "start": problem // n,
            "steps": steps,
            "final_loss": float(total[problem] / min(steps, FINAL_STEPS)),
            "drawup": float(drawup[problem]),
            "non_finite": int(non_finite[problem]),
            "weight_rms": float(rms[problem]),
        }
        for problem in range(2 * n)
    ]
