"""The transformer of the inner tasks: its data, its gradients, and the rule on its stacked matrices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from celo2.meta.inner_optimizer import InnerOptimizer
from celo2.meta.learned_rule import ThetaBatch, flatten
from celo2.meta.recipes import get_recipe
from celo2.meta.tasks import TaskFamily
from celo2.meta.transformer import CONTEXT, VOCABULARY, ByteWindows, Transformer
from celo2.pretrain.model import GPT, GPTConfig
from celo2.reference import MatrixState, matrix_update

NETWORK = Transformer()


def draw(problems, scale=1.0, dtype=torch.float64):
    """Weights of `problems` starts over the scale."""
    starts = [NETWORK.initial_weights(np.random.default_rng(seed)) for seed in range(problems)]
    return {name: torch.from_numpy(np.stack([start[name] for start in starts])).to(dtype) / scale for name in starts[0]}


def draw_batch(particles, batch=2):
    windows = torch.randint(VOCABULARY, (particles, batch, CONTEXT + 1), dtype=torch.uint8)
    return windows[..., :-1], windows[..., 1:]


def test_a_text_is_windows_that_share_a_byte():
    # 70 different bytes, the higher the rarer
    tokens = np.repeat(np.arange(70), np.arange(70, 0, -1)).astype(np.uint16)
    np.random.default_rng(0).shuffle(tokens)
    text = ByteWindows.of_text("counting", tokens)
    assert text.inputs.shape == text.targets.shape == ((len(tokens) - 1) // CONTEXT, CONTEXT)
    np.testing.assert_array_equal(text.inputs[1:, 0], text.targets[:-1, -1])
    # the commonest bytes are classes of their own, in their order, the others one
    read = np.minimum(tokens, VOCABULARY - 1)
    np.testing.assert_array_equal(text.inputs.ravel(), read[: text.inputs.size])
    assert ByteWindows.of_text("counting", tokens).sha256 == text.sha256 != ByteWindows("other", text.windows).sha256


def test_texts_that_are_refused():
    with pytest.raises(ValueError, match="text 'short' has 32 bytes: give more than 32"):
        ByteWindows.of_text("short", np.zeros(32, np.uint16))
    with pytest.raises(ValueError, match=r"windows \(4, 32\), expected \[n, 33\]"):
        ByteWindows("narrow", np.zeros((4, 32), np.uint8))
    with pytest.raises(ValueError, match=r"classes must be 0 .. 63"):
        ByteWindows("wide", np.full((4, 33), 64, np.uint8))
    with pytest.raises(ValueError, match="data set 'few' has 7 examples, a batch needs 8"):
        TaskFamily([ByteWindows("few", np.zeros((7, 33), np.uint8))], seed=0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_those_of_a_loop_over_problems(scale, shared):
    weights, scales = draw(4, scale), torch.full((4,), scale, dtype=torch.float64)
    inputs, targets = draw_batch(2)
    share = None
    if shared:
        # the first window of the first particle counts alone
        share = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    loss, gradients = NETWORK.loss_and_gradients(lambda function: function)(weights, scales, inputs, targets, share)
    leaves = {name: x.clone().requires_grad_() for name, x in weights.items()}
    if shared:
        inputs, targets = (torch.stack([x[0, [0, 0]], x[1]]) for x in (inputs, targets))
    expected = NETWORK.reference_loss(leaves, scales, inputs, targets)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=0)
    for name, gradient in zip(leaves, torch.autograd.grad(expected.sum(), list(leaves.values())), strict=True):
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-8, atol=1e-12, msg=name)


def test_it_is_the_modern_model_of_the_harness():
    model = GPT(GPTConfig("modern", 2, 2, 16, CONTEXT, VOCABULARY)).double()
    weights = draw(1)
    square, wide = weights["square"][0], weights["wide"][0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.token_embedding.weight[:VOCABULARY] = weights["embedding"][0]
        model.lm_head.weight[:VOCABULARY] = weights["head"][0]
        for layer, block in enumerate(model.blocks):
            block.attention.qkv.weight.copy_(square[4 * layer : 4 * layer + 3].flatten(0, 1))
            block.attention.out.weight.copy_(square[4 * layer + 3])
            block.mlp.squared = True
            block.mlp.up.weight.copy_(wide[2 * layer].mT)
            block.mlp.down.weight.copy_(wide[2 * layer + 1])
    inputs, targets = draw_batch(1, batch=3)
    expected = model(inputs[0].long(), targets[0].long()).detach().double()
    both = {name: x.repeat(2, *[1] * (x.ndim - 1)) for name, x in weights.items()}
    loss, _ = NETWORK.loss_and_gradients(lambda function: function)(both, torch.ones(2).double(), inputs, targets, None)
    torch.testing.assert_close(loss, expected.expand(2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("variant", ["celo2", "celo2-base"])
def test_every_matrix_moves_as_the_oracle_says(random_theta, variant):
    """Also those that are tall in [out, in]: up, which is kept transposed."""
    recipe = replace(get_recipe(variant), inner_clip_norm=None)
    optimizer = InnerOptimizer(recipe, NETWORK, compiled=False)
    thetas = [random_theta(seed) for seed in range(2)]
    vectors = torch.from_numpy(np.stack([flatten(theta) for theta in thetas])).double()
    state = optimizer.zeros(2, torch.device("cpu"), torch.float64)
    for name, x in draw(2).items():
        state[name].copy_(x)
    state["scale"].fill_(1.0)
    oracles = {}
    for _ in range(3):
        before = {name: state[name].clone() for name in NETWORK.shapes}
        inputs, targets = draw_batch(1)
        _, gradients = NETWORK.loss_and_gradients(lambda function: function)(
            before, state["scale"], inputs, targets, None
        )
        lr = torch.tensor([1e-3, 2e-3], dtype=torch.float64)
        optimizer.step(state, inputs, targets, ThetaBatch.from_vectors(vectors), lr=lr)
        for name in NETWORK.matrices:
            for problem, theta in enumerate(thetas):
                arrays = theta.tensors(torch.float64, torch.device("cpu"))
                for i, (p, g) in enumerate(zip(before[name][problem], gradients[name][problem], strict=True)):
                    # up in PyTorch's layout
                    tall = name == "wide" and i % 2 == 0
                    p, g = (p.mT, g.mT) if tall else (p, g)
                    key = name, problem, i
                    oracle = oracles.get(key) or MatrixState.zeros_like(p)
                    step, oracles[key] = matrix_update(arrays, p, g, oracle, orthogonalize=variant == "celo2")
                    moved = (before[name] - state[name])[problem, i] / lr[problem]
                    torch.testing.assert_close(moved.mT if tall else moved, step, rtol=1e-7, atol=1e-7)
    # embedding and head are Adam's in both variants
    for name in NETWORK.side:
        assert f"{name}/row_factor" not in state and state[f"{name}/momentum_fast"].any()
        moved = (before[name] - state[name]).abs().amax((1, 2))
        momentum, v = state[f"{name}/momentum_fast"], state[f"{name}/second_moment"]
        expected = 20 * lr * (momentum * torch.rsqrt(v + 1e-8)).abs().amax((1, 2))
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=0)


def test_a_start_is_at_a_uniform_guess():
    loss = NETWORK.reference_loss(draw(4, dtype=torch.float32), torch.ones(4), *draw_batch(2))
    assert ((loss > 4.1) & (loss < 5.0)).all() and NETWORK.loss_clip == pytest.approx(1.5 * np.log(64))
