"""The inner loop's kernel against the authors' trajectory, and against the path in PyTorch, window by window."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from celo2.meta.fused import FusedLoop
from celo2.meta.images import ImageSet
from celo2.meta.inner_optimizer import InnerOptimizer
from celo2.meta.learned_rule import ThetaBatch, flatten, theta_size
from celo2.meta.recipes import get_recipe
from celo2.meta.tasks import TaskFamily
from celo2.meta.truncated_step import TruncatedStep
from celo2.theta import Theta

GOLDEN_NAMES = {"hidden_weight": "w0", "hidden_bias": "b0", "output_weight": "w1", "output_bias": "b1"}


@pytest.mark.parametrize("variant", ["celo2", "celo2-base"])
def test_golden_trajectory(golden, device, variant):
    vectors = golden("inner_training_trajectory")
    key = variant.replace("-", "_")
    # scale 1 alone: a step of a problem takes a third of a second in the interpreter
    number, steps = list(vectors["scales"]).index(1.0), 60
    recipe = get_recipe(variant)
    optimizer = InnerOptimizer(recipe, compiled=False)
    state, fresh = optimizer.zeros(2, device), optimizer.zeros(1, device)
    state["scale"].fill_(1.0)
    for name, theirs in GOLDEN_NAMES.items():
        state[name].copy_(torch.from_numpy(vectors[f"param/{theirs}"].T.copy()))
    images = torch.from_numpy(vectors["images"][:steps]).float().reshape(-1, 64).to(device)
    labels = torch.from_numpy(vectors["labels"][:steps]).reshape(-1).to(device)
    theta = Theta.from_arrays({name[6:]: value for name, value in vectors.items() if name.startswith("theta/")})
    batch = ThetaBatch.from_vectors(torch.from_numpy(flatten(theta)).expand(2, -1).to(device))
    indices = torch.arange(steps * 64, device=device).view(steps, 1, 64)
    lr = torch.full((steps, 2), recipe.inner_lr, device=device)
    losses, imitation = FusedLoop(recipe, state, fresh, images, labels)(batch, indices, lr, {})
    assert imitation is None
    losses = losses.cpu().numpy()
    np.testing.assert_array_equal(losses[:, 0], losses[:, 1])
    expected = vectors[f"{key}/loss"][number, :steps]
    print(f"{variant}: largest relative difference of a loss {np.abs(losses[:, 0] / expected - 1).max():.1e}")
    np.testing.assert_allclose(losses[:, 0], expected, rtol=2e-6)
    for name, theirs in GOLDEN_NAMES.items():
        final = vectors[f"{key}/final/1/{theirs}"].T
        difference = np.abs(state[name][0].cpu().numpy() - final).max() / np.abs(final).max()
        print(f"{variant}: {name} after {steps} steps, largest difference {difference:.1e} of the largest weight")
        assert difference < 1e-5


def pair_of_steps(recipe, device):
    """Return the same trajectories twice: advanced by PyTorch, and by the kernel."""
    rng = np.random.default_rng(0)
    images = rng.random((200, 64), np.float32)
    images[:, :10] = rng.integers(0, 2, (200, 10))
    sets = [ImageSet("noise", images, rng.integers(10, size=200))]

    def make(backend):
        family = TaskFamily(sets, seed=0, particles=recipe.particles, scale_range=recipe.scale_range)
        return TruncatedStep(recipe, family, range(recipe.particles), device=device, compiled=False, backend=backend)

    return make("torch"), make("triton")


SMALL = {"particles": 1, "window": 4, "length_range": (5, 8), "initial_iterations": 8, "scale_range": (0.1, 10.0)}
CASES = {
    "celo2": {"name": "celo2"},
    "base": {"name": "celo2-base"},
    "clipped": {"name": "celo2", "inner_clip_norm": 0.05, "bias_correction": True},
    "muon": {"name": "celo2-elo", "resume_probability": 0.5},
    "adam": {"name": "celo2-base-elo"},
    "narrow": {"name": "celo2-base", "hidden": 4, "normalize_update": False, "inner_lr": 1e-2},
    "shares": {"name": "celo2-text", "batch_range": (0.1, 0.9), "tasks": ("images",), "length_range": (5, 8)},
}


@pytest.mark.parametrize("case", CASES)
def test_windows_are_those_of_pytorch(device, case):
    changes = dict(CASES[case])
    recipe = replace(get_recipe(changes.pop("name")), **(SMALL | changes))
    plain, fused = pair_of_steps(recipe, device)
    # with seed 0 a unit of `adam` comes within 1e-7 of its ReLU's kink, and rounding decides on which side
    rng = torch.Generator().manual_seed(1)
    # a small MLP: a random one of unit weights has directions of every sign, which is the same to both
    theta = 0.3 * torch.randn(2 * recipe.particles, theta_size(recipe.hidden), generator=rng)
    restarts = 0
    for outer_step in range(3):
        # both from the same state: differences do not add up
        for name, x in fused.state.items():
            x.copy_(plain.state[name])
        expected, ours = plain.unroll(theta, outer_step), fused.unroll(theta, outer_step)
        restarts += len(ours.plan.restarts)
        np.testing.assert_allclose(ours.losses, expected.losses, rtol=2e-4, atol=1e-6)
        assert (expected.imitation is None) == (ours.imitation is None)
        if ours.imitation is not None:
            np.testing.assert_allclose(ours.imitation, expected.imitation, rtol=0, atol=2e-4)
        for name, x in fused.state.items():
            theirs = plain.state[name]
            torch.testing.assert_close(x, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()), msg=name)
    assert restarts


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_diverged_trajectory_is_counted_and_starts_anew(device, clip):
    recipe = replace(get_recipe("celo2"), **(SMALL | {"inner_clip_norm": clip}))
    plain, fused = pair_of_steps(recipe, device)
    theta = 0.3 * torch.randn(2, theta_size(), generator=torch.Generator().manual_seed(0))
    for step in (plain, fused):
        step.state["hidden_weight"][1, 3, 5] = torch.inf
    counted = []
    for outer_step in range(3):
        expected, ours = plain.unroll(theta, outer_step), fused.unroll(theta, outer_step)
        assert ours.non_finite == expected.non_finite
        counted.append(ours.non_finite)
    assert counted[0] and not counted[-1]
    for name, x in fused.state.items():
        assert bool(x.isfinite().all()) == bool(plain.state[name].isfinite().all()), name
