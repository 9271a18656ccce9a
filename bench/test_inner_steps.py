"""Inner steps a second of meta-training: the compiled path against features written out, in one run.

Three kinds of inner tasks: images and text train the MLP, and the byte transformer. The other path is what one would
write first: autograd for the network, the 30 features of every element materialised, the MLP of theta as batched
products. Both advance the same trajectories; the gate is that their losses agree.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from celo2.meta.inner_optimizer import InnerOptimizer, State
from celo2.meta.learned_rule import ThetaBatch
from celo2.meta.network import MLP, Network
from celo2.meta.recipes import Recipe, get_recipe
from celo2.meta.tasks import network_of
from celo2.meta.texts import next_byte
from celo2.meta.transformer import ByteWindows, Transformer, loss, rope_tables
from celo2.newton_schulz import newton_schulz
from celo2.reference import NORM_EPS, RMS_EPS, MatrixState, matrix_columns
from celo2.tables import format_table
from celo2.theta import GROUP_COLUMNS

ROUNDS = 7
IMAGES, TEXT, BYTES = "images, MLP", "text, MLP", "bytes, transformer"


@dataclass(frozen=True)
class Kind:
    """A kind of inner tasks: its recipe, how many tasks that has, and the pairs and slots to measure."""

    recipe: Recipe
    tasks: int
    pairs: int
    slots: int

    @property
    def inner_steps(self) -> int:
        """Inner steps of the whole recipe."""
        return self.recipe.outer_steps * self.recipe.window * 2 * self.recipe.particles * self.tasks


KINDS = {
    IMAGES: Kind(get_recipe("celo2"), tasks=4, pairs=32, slots=10),
    TEXT: Kind(get_recipe("celo2-text"), tasks=6, pairs=32, slots=10),
    BYTES: Kind(get_recipe("celo2-lm"), tasks=1, pairs=8, slots=4),
}


@dataclass
class Problems:
    """Fresh trajectories of scale 1, a batch for each pair with the shares of its examples, and theta vectors."""

    network: Network
    state: State
    inputs: Tensor
    targets: Tensor
    share: Tensor | None
    vectors: Tensor


def start(kind: str) -> Problems:
    torch.manual_seed(0)
    pairs = KINDS[kind].pairs
    rng = np.random.default_rng(0)
    # bytes of Zipf's frequencies
    tokens = rng.choice(200, 20_000, p=(1 / np.arange(1, 201)) / (1 / np.arange(1, 201)).sum()).astype(np.uint16)
    network: Network = MLP()
    share = None
    inputs, targets = torch.rand(pairs, 64, 64), torch.randint(10, (pairs, 64))
    if kind != IMAGES:
        text = next_byte("zipf", tokens, pairs * 64) if kind == TEXT else ByteWindows.of_text("zipf", tokens)
        network = network_of(text)
        count = pairs * network.batch
        inputs, targets = (
            torch.from_numpy(x[:count]).view(pairs, network.batch, *x.shape[1:])
            for x in (np.ascontiguousarray(text.inputs), np.ascontiguousarray(text.targets))
        )
    if kind == BYTES:
        # batches of 1 to 8 windows
        counts = torch.arange(network.batch) <= torch.arange(pairs)[:, None] % network.batch
        share = counts / counts.sum(1, keepdim=True)
    state = InnerOptimizer(KINDS[kind].recipe, network).zeros(2 * pairs, torch.device("cpu"))
    for problem in range(2 * pairs):
        for name, weights in network.initial_weights(rng).items():
            state[name][problem] = torch.from_numpy(weights)
    state["scale"].fill_(1.0)
    return Problems(network, state, inputs, targets, share, 0.3 * torch.randn(2 * pairs, 347))


def mlp_loss(weights: dict[str, Tensor], scale: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    s = scale[:, None, None]
    pixels, repeated = images.repeat(2, 1, 1), labels.repeat(2, 1)
    hidden = torch.relu(torch.baddbmm(s * weights["hidden_bias"][:, None], pixels, (s * weights["hidden_weight"]).mT))
    logits = torch.baddbmm(s * weights["output_bias"][:, None], hidden, (s * weights["output_weight"]).mT)
    return torch.nn.functional.cross_entropy(logits.mT, repeated, reduction="none").mean(1)


class WrittenOut:
    """The same inner step with autograd and materialised features."""

    def __init__(self, problems: Problems, recipe: Recipe) -> None:
        self.network, self.recipe = problems.network, recipe
        self.states, self.thetas = {}, {}
        rows, units = sum(GROUP_COLUMNS), 8
        for name in self.network.matrices:
            matrices = problems.state[name].flatten(0, -3)
            self.states[name] = MatrixState.zeros_like(matrices)
            vectors = problems.vectors.repeat_interleave(len(matrices) // len(problems.vectors), 0)
            first, bias0, hidden, bias1, last, bias2 = vectors.split(
                [rows * units, units, units * units, units, units * 3, 3], dim=1
            )
            layers = first.view(-1, rows, units), hidden.view(-1, units, units), last.view(-1, units, 3)
            self.thetas[name] = list(zip(layers, (bias0, bias1, bias2), strict=True))

    def loss(self, weights: dict[str, Tensor], problems: Problems) -> Tensor:
        scale, inputs, targets = problems.state["scale"], problems.inputs, problems.targets
        if isinstance(self.network, Transformer):
            tables = rope_tables(scale.dtype, scale.device)
            return loss(*weights.values(), scale, inputs, targets, problems.share, *tables)
        return mlp_loss(weights, scale, inputs, targets)

    def step(self, problems: Problems) -> Tensor:
        state = problems.state
        weights = {name: state[name].detach().requires_grad_() for name in self.network.shapes}
        losses = self.loss(weights, problems)
        gradients = dict(zip(weights, torch.autograd.grad(losses.sum(), list(weights.values())), strict=True))
        if self.recipe.inner_clip_norm is not None:
            norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
            factor = (self.recipe.inner_clip_norm / norm).clamp_max(1.0)
            gradients = {name: g * factor.view(-1, *[1] * (g.ndim - 1)) for name, g in gradients.items()}
        with torch.no_grad():
            for name in self.network.matrices:
                p, g = state[name].flatten(0, -3), gradients[name].flatten(0, -3)
                columns, self.states[name] = matrix_columns(p, g, self.states[name])
                columns = columns * torch.rsqrt(columns.square().mean((-3, -2), keepdim=True) + NORM_EPS)
                x = columns.flatten(1, 2)
                for layer, (weight, bias) in enumerate(self.thetas[name]):
                    x = torch.baddbmm(bias[:, None], x, weight)
                    x = torch.relu(x) if layer < 2 else x
                direction = newton_schulz(x[..., 0].view_as(p))
                p.sub_(1e-3 * direction * torch.rsqrt(direction.square().mean((-2, -1), keepdim=True) + NORM_EPS))
            for name in (*self.network.side, *self.network.vectors):
                g = gradients[name]
                momentum, v = state[f"{name}/momentum_fast"], state[f"{name}/second_moment"]
                momentum.lerp_(g, 0.1)
                v.lerp_(g * g, 0.05)
                state[name].sub_(0.02 * momentum * torch.rsqrt(v + RMS_EPS))
        return losses.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_inner_steps(benchmark: BenchmarkFixture, report: list[str], kind: str) -> None:
    torch.set_flush_denormal(True)
    problems, others = start(kind), start(kind)
    recipe, slots = KINDS[kind].recipe, KINDS[kind].slots
    theta = ThetaBatch.from_vectors(problems.vectors)
    optimizer, written_out = InnerOptimizer(recipe, problems.network), WrittenOut(others, recipe)
    paths: dict[str, Callable[[], Tensor]] = {
        "compiled": lambda: optimizer.step(
            problems.state, problems.inputs, problems.targets, theta, share=problems.share
        )[0],
        "features written out, eager": lambda: written_out.step(others),
    }
    # the gate, and the warm-up: the first step compiles
    for _ in range(3):
        losses = [path() for path in paths.values()]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    rounds: list[dict[str, float]] = []

    def advance_each() -> None:
        times = {}
        for name, path in paths.items():
            begun = time.perf_counter()
            for _ in range(slots):
                path()
            times[name] = (time.perf_counter() - begun) / slots
        rounds.append(times)

    benchmark.pedantic(advance_each, rounds=ROUNDS)
    trajectories = len(problems.vectors)
    rows: list[tuple[str, ...]] = []
    for name in paths:
        median = statistics.median(times[name] for times in rounds)
        ratio = statistics.median(times["features written out, eager"] / times[name] for times in rounds)
        rate = trajectories / median
        benchmark.extra_info[name] = {"inner_steps_per_second": rate, "times_eager": ratio}
        hours = KINDS[kind].inner_steps / rate / 3600
        rows.append((name, f"{1e3 * median:.2f}", f"{rate:,.0f}", f"{ratio:.1f}", f"{hours:.1f}"))
    report.append(
        f"meta-training, {recipe.name} ({kind}): {trajectories} trajectories a slot, median of {ROUNDS} rounds of "
        f"{slots} slots"
    )
    header = ("path", "ms a slot", "inner steps/s", "times eager", "hours of the full recipe")
    report.extend(format_table(header, rows).splitlines())


@pytest.mark.parametrize("kind", [IMAGES, BYTES])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_written_out_loss_is_the_networks(kind: str, scale: float) -> None:
    """The baseline's forward pass is the network's at other scales too, so that the comparison is of the same work."""
    problems = start(kind)
    problems.share = None
    problems.state["scale"].fill_(scale)
    weights = {name: problems.state[name].div_(scale) for name in problems.network.shapes}
    expected = problems.network.reference_loss(weights, problems.state["scale"], problems.inputs, problems.targets)
    written_out = WrittenOut(problems, KINDS[kind].recipe)
    torch.testing.assert_close(written_out.loss(weights, problems), expected, rtol=1e-4, atol=1e-5)
