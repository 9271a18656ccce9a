"""The inner optimizer's steps beside the learned rule: rates a problem, Adam's correction, the experts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from celo2.meta.inner_optimizer import InnerOptimizer, adam_step, clip_gradients
from celo2.meta.learned_rule import ThetaBatch, flatten
from celo2.meta.network import MATRICES, SHAPES, VECTORS, loss_and_gradients
from celo2.meta.recipes import get_recipe
from celo2.newton_schulz import newton_schulz


def start(recipe, random_theta):
    optimizer = InnerOptimizer(recipe, compiled=False)
    state = optimizer.zeros(4, torch.device("cpu"))
    for name in MATRICES:
        state[name].normal_(0, 0.1)
    state["scale"].fill_(1.0)
    theta = ThetaBatch.from_vectors(torch.from_numpy(flatten(random_theta())).expand(4, -1))
    return optimizer, state, theta


@pytest.mark.parametrize("variant", ["celo2", "celo2-base"])
@pytest.mark.parametrize("expert", [None, "adam"])
def test_every_problem_moves_by_its_own_rate(random_theta, variant, expert):
    optimizer, state, theta = start(replace(get_recipe(variant), expert=expert), random_theta)
    before = {name: x.clone() for name, x in state.items()}
    lr = torch.tensor([1e-3, 5e-4, 0.0, 2e-3])
    optimizer.step(state, torch.rand(2, 64, 64), torch.randint(10, (2, 64)), theta, lr=lr)
    for name in MATRICES:
        torch.testing.assert_close((state[name] - before[name]).square().mean((1, 2)).sqrt(), lr, rtol=1e-3, atol=0)
    for name in VECTORS:
        moved = (state[name] - before[name]).abs().amax(1)
        assert not moved[2] and moved[[0, 1, 3]].all()
    # both signs of a particle start apart here; the first Adam step is lr 20 m / sqrt(v) = lr 20 0.1 / sqrt(0.05)
    if variant == "celo2":
        limit = lr * 20 * 0.1 / np.sqrt(0.05)
        torch.testing.assert_close(
            (state["output_bias"] - before["output_bias"]).abs().amax(1), limit, rtol=1e-3, atol=0
        )


def test_corrected_adam_is_torchs():
    ours = torch.randn(3, 10)
    theirs = torch.nn.Parameter(ours.clone())
    adam = torch.optim.Adam([theirs], lr=0.02, betas=(0.9, 0.95), eps=1e-8)
    momentum, v = torch.zeros_like(ours), torch.zeros_like(ours)
    for t in range(4):
        theirs.grad = torch.randn(3, 10)
        adam.step()
        iteration = torch.full((3,), float(t))
        adam_step(ours, theirs.grad, momentum, v, iteration, torch.full((3,), 0.02), bias_correction=True)
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_clip_is_global_and_leaves_small_gradients_alone():
    gradients = [
        torch.randn(3, *shape) * torch.tensor([1e-3, 1.0, 1e3]).view(3, *[1] * len(shape)) for shape in SHAPES.values()
    ]
    clipped = clip_gradients(gradients, 1.0)
    flat, short = (torch.cat([g.flatten(1) for g in x], 1) for x in (gradients, clipped))
    torch.testing.assert_close(short[0], flat[0], rtol=0, atol=0)
    torch.testing.assert_close(short, flat / flat.norm(dim=1, keepdim=True).clamp_min(1.0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("variant", "expert"), [("celo2", "muon"), ("celo2-base", "adam")])
def test_an_expert_takes_its_textbook_step(random_theta, variant, expert):
    optimizer, state, theta = start(replace(get_recipe(variant), expert=expert), random_theta)
    averages = {name: [torch.zeros(4, *SHAPES[name], dtype=torch.float64) for _ in range(2)] for name in MATRICES}
    for t in range(1, 5):
        before = {name: state[name].clone() for name in SHAPES}
        images, labels = torch.rand(2, 64, 64), torch.randint(10, (2, 64))
        _, gradients = loss_and_gradients(before, state["scale"], images, labels)
        optimizer.step(state, images, labels, theta, expert_weight=1.0)
        for name in MATRICES:
            g, (m, v) = gradients[name].double(), averages[name]
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.95).add_(0.05 * g * g)
            # Nesterov's look ahead, each part corrected for its own age
            e = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
            e = newton_schulz(e) if expert == "muon" else e / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            e = e / e.square().mean((1, 2), keepdim=True).sqrt()
            torch.testing.assert_close((before[name] - state[name]).double(), 1e-3 * e, rtol=0, atol=2e-6)
