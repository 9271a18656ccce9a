"""Inner steps a second of meta-training: the compiled path against features written out, in one run.

The other path is what one would write first: autograd for the network, the 30 features of every element materialised,
the MLP as batched products. Both advance the same 64 trajectories; the gate is that their losses agree.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from celo2.meta.inner_optimizer import InnerOptimizer, State
from celo2.meta.learned_rule import ThetaBatch
from celo2.meta.network import MATRICES, SHAPES, VECTORS, reference_loss
from celo2.meta.recipes import get_recipe
from celo2.newton_schulz import newton_schulz
from celo2.reference import NORM_EPS, RMS_EPS, MatrixState, matrix_columns
from celo2.tables import format_table
from celo2.theta import GROUP_COLUMNS

PAIRS = 32
ROUNDS = 7
SLOTS = 10
INNER_STEPS = 320_000_000  # of the full recipe: 100,001 outer steps, 64 trajectories, 50 slots


def start() -> tuple[State, Tensor, Tensor, Tensor]:
    """Return the state of 64 fresh trajectories of scale 1, a batch for each pair, and 64 theta vectors."""
    torch.manual_seed(0)
    state = InnerOptimizer(get_recipe("celo2")).zeros(2 * PAIRS, torch.device("cpu"))
    for name in MATRICES:
        state[name].normal_(0, SHAPES[name][1] ** -0.5)
    state["scale"].fill_(1.0)
    return state, torch.rand(PAIRS, 64, 64), torch.randint(10, (PAIRS, 64)), 0.3 * torch.randn(2 * PAIRS, 347)


class WrittenOut:
    """The same inner step with autograd and materialised features."""

    def __init__(self, vectors: Tensor) -> None:
        rows, units = sum(GROUP_COLUMNS), 8
        self.first, self.bias0, self.hidden, self.bias1, last, self.bias2 = (
            piece.contiguous()
            for piece in vectors.split([rows * units, units, units * units, units, units * 3, 3], dim=1)
        )
        self.first = self.first.view(-1, rows, units)
        self.hidden = self.hidden.view(-1, units, units)
        self.last = last.view(-1, units, 3)
        self.states = {name: MatrixState.zeros_like(torch.zeros(len(vectors), *SHAPES[name])) for name in MATRICES}

    def step(self, state: State, images: Tensor, labels: Tensor) -> Tensor:
        weights = {name: state[name].detach().requires_grad_() for name in SHAPES}
        s = state["scale"][:, None, None]
        pixels, repeated = images.repeat(2, 1, 1), labels.repeat(2, 1)
        hidden = torch.relu(
            torch.baddbmm(s * weights["hidden_bias"][:, None], pixels, (s * weights["hidden_weight"]).mT)
        )
        logits = torch.baddbmm(s * weights["output_bias"][:, None], hidden, (s * weights["output_weight"]).mT)
        loss = torch.nn.functional.cross_entropy(logits.mT, repeated, reduction="none").mean(1)
        loss.sum().backward()
        with torch.no_grad():
            for name in MATRICES:
                p, g = weights[name].detach(), weights[name].grad
                assert g is not None
                columns, self.states[name] = matrix_columns(p, g, self.states[name])
                columns = columns * torch.rsqrt(columns.square().mean((-3, -2), keepdim=True) + NORM_EPS)
                x = torch.relu(torch.baddbmm(self.bias0[:, None], columns.flatten(1, 2), self.first))
                x = torch.relu(torch.baddbmm(self.bias1[:, None], x, self.hidden))
                direction = torch.baddbmm(self.bias2[:, None], x, self.last)[..., 0].view_as(p)
                direction = newton_schulz(direction)
                direction = direction * torch.rsqrt(direction.square().mean((-2, -1), keepdim=True) + NORM_EPS)
                state[name].sub_(1e-3 * direction)
            for name in VECTORS:
                g = weights[name].grad
                assert g is not None
                momentum, v = state[f"{name}/momentum_fast"], state[f"{name}/second_moment"]
                momentum.lerp_(g, 0.1)
                v.lerp_(g * g, 0.05)
                state[name].sub_(0.02 * momentum * torch.rsqrt(v + RMS_EPS))
        return loss.detach()


def test_inner_steps(benchmark: BenchmarkFixture, report: list[str]) -> None:
    torch.set_flush_denormal(True)
    state, images, labels, vectors = start()
    other_state = {name: x.clone() for name, x in state.items()}
    theta = ThetaBatch.from_vectors(vectors)
    optimizer, written_out = InnerOptimizer(get_recipe("celo2")), WrittenOut(vectors)
    paths: dict[str, Callable[[], Tensor]] = {
        "compiled": lambda: optimizer.step(state, images, labels, theta)[0],
        "features written out, eager": lambda: written_out.step(other_state, images, labels),
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
            for _ in range(SLOTS):
                path()
            times[name] = (time.perf_counter() - begun) / SLOTS
        rounds.append(times)

    benchmark.pedantic(advance_each, rounds=ROUNDS)
    rows: list[tuple[str, ...]] = []
    for name in paths:
        median = statistics.median(times[name] for times in rounds)
        ratio = statistics.median(times["features written out, eager"] / times[name] for times in rounds)
        rate = 2 * PAIRS / median
        benchmark.extra_info[name] = {"inner_steps_per_second": rate, "times_eager": ratio}
        rows.append((name, f"{1e3 * median:.2f}", f"{rate:,.0f}", f"{ratio:.1f}", f"{INNER_STEPS / rate / 3600:.1f}"))
    report.append(f"meta-training, celo2: {2 * PAIRS} trajectories a slot, median of {ROUNDS} rounds of {SLOTS} slots")
    header = ("path", "ms a slot", "inner steps/s", "times eager", "hours of the full recipe")
    report.extend(format_table(header, rows).splitlines())


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_written_out_loss_is_the_networks(scale: float) -> None:
    """The baseline's forward pass is the network's at other scales too, so that the comparison is of the same work."""
    state, images, labels, vectors = start()
    state["scale"].fill_(scale)
    for name in SHAPES:
        state[name].div_(scale)
    expected = reference_loss({name: state[name] for name in SHAPES}, state["scale"], images, labels)
    torch.testing.assert_close(WrittenOut(vectors).step(state, images, labels), expected, rtol=1e-4, atol=1e-5)
