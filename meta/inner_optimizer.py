"""The optimizer of the inner problems: what PES perturbs, and the expert it may imitate.

State is one flat dictionary of tensors with the problem axis first (`hidden_weight`, `hidden_weight/momentum_fast`,
..., `scale`, `iteration`), so that starting, storing and restoring a trajectory is copying rows. Matrices of one shape
may be one tensor [P, count, m, n]: the rule then takes them as P * count problems.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from celo2.meta.compilation import region
from celo2.meta.elementwise import advance_moments, matrix_direction
from celo2.meta.learned_rule import (
    ThetaBatch,
    factor_moments,
    theta_size,
    vector_contribution,
    vector_direction,
)
from celo2.meta.network import MLP, Network
from celo2.meta.recipes import Recipe
from celo2.newton_schulz import newton_schulz
from celo2.reference import MOMENTUM_DECAYS, NORM_EPS, RMS_EPS, SECOND_MOMENT_DECAY

State = dict[str, Tensor]
ADAM_EPS = 1e-8
MOMENTA = ("momentum_fast", "momentum_medium", "momentum_slow")


def move(p: Tensor, direction: Tensor, lr: Tensor) -> None:
    """p <- p - lr d / rms(d) per problem, in place; `lr` is [P]."""
    axes = tuple(range(1, p.ndim))
    update = direction * torch.rsqrt(direction.square().mean(axes, keepdim=True) + NORM_EPS)
    p.sub_(_expand(lr, p) * update)


def move_raw(p: Tensor, direction: Tensor, lr: Tensor) -> None:
    """p <- p - lr d per problem, in place: the ablation without the output's RMS."""
    p.sub_(_expand(lr, p) * direction)


def adam_step(
    p: Tensor, g: Tensor, momentum: Tensor, v: Tensor, iteration: Tensor, lr: Tensor, bias_correction: bool
) -> None:
    """Adam for tensors p [P, ...], in place: betas 0.9 and 0.95; without correction eps stands inside the root."""
    momentum.lerp_(g, 1 - MOMENTUM_DECAYS[0])
    v.mul_(SECOND_MOMENT_DECAY).add_((1 - SECOND_MOMENT_DECAY) * g * g)
    if bias_correction:
        t = _expand(iteration, p) + 1
        m_hat = momentum / (1 - MOMENTUM_DECAYS[0] ** t)
        v_hat = v / (1 - SECOND_MOMENT_DECAY**t)
        p.sub_(_expand(lr, p) * m_hat / (v_hat.sqrt() + ADAM_EPS))
    else:
        p.sub_(_expand(lr, p) * momentum * torch.rsqrt(v + RMS_EPS))


def clip_gradients(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    """Scale each problem's gradient to at most `max_norm` over all tensors; a non-finite one becomes zero."""
    square = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0)
    scale = (max_norm * torch.rsqrt(square)).clamp_max(1.0)
    finite = torch.isfinite(square)
    return [
        torch.where(_expand(finite, g), g * _expand(scale, g), torch.zeros((), dtype=g.dtype, device=g.device))
        for g in gradients
    ]


def _expand(x: Tensor, like: Tensor) -> Tensor:
    return x.view(-1, *(1,) * (like.ndim - 1))


def _folded(x: Tensor) -> Tensor:
    """View [P, count, m, n] as [P * count, m, n]; [P, m, n] stays as it is."""
    return x.flatten(0, -3)


class InnerOptimizer:
    """Celo2 or Celo2-base on an inner network, by default the MLP, with one theta a problem, as a recipe sets it.

    With `compiled` the elementwise regions go through `torch.compile`; without, the same code runs eagerly.
    """

    def __init__(self, recipe: Recipe, network: Network | None = None, *, compiled: bool = True) -> None:
        self.recipe, self.network = recipe, network or MLP()
        self.orthogonalize = recipe.variant == "celo2"
        wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = region if compiled else lambda function: function
        self._loss_and_gradients = self.network.loss_and_gradients(wrap)
        self._clip = wrap(clip_gradients)
        self._factor_moments, self._advance_moments = wrap(factor_moments), wrap(advance_moments)
        self._contribution, self._matrix_direction = wrap(vector_contribution), wrap(matrix_direction)
        self._vector_direction, self._adam, self._move = wrap(vector_direction), wrap(adam_step), wrap(move)
        if not recipe.normalize_update:
            self._move = wrap(move_raw)
        self._expert_direction, self._imitate = wrap(self._propose), wrap(_imitation)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of a trajectory's tensors, without the problem axis."""
        network = self.network
        shapes: dict[str, tuple[int, ...]] = dict(network.shapes)
        for name in network.matrices:
            *stack, m, n = network.shapes[name]
            shapes |= {f"{name}/{moment}": (*stack, m, n) for moment in (*MOMENTA, "second_moment")}
            shapes |= {f"{name}/row_factor": (*stack, 3, m), f"{name}/column_factor": (*stack, 3, n)}
        for name in network.side:
            shapes |= {f"{name}/{moment}": network.shapes[name] for moment in (MOMENTA[0], "second_moment")}
        for name in network.vectors:
            (n,) = network.shapes[name]
            moments = MOMENTA[:1] if self.orthogonalize else MOMENTA
            shapes |= {f"{name}/{moment}": (n,) for moment in (*moments, "second_moment")}
            if not self.orthogonalize:
                shapes[f"{name}/factor"] = (3, n)
        return shapes | {"scale": (), "iteration": ()}

    def zeros(self, problems: int, device: torch.device, dtype: torch.dtype = torch.float32) -> State:
        """Return the state of `problems` trajectories with every tensor zero."""
        shapes = self.state_shapes()
        return {name: torch.zeros(problems, *shape, dtype=dtype, device=device) for name, shape in shapes.items()}

    def rehearse(self, problems: int, device: torch.device) -> None:
        """Take a step on zeros: what steps of that many problems compile, this compiles."""
        inputs, targets = self.network.blank(problems // 2, device)
        share = None
        if self.recipe.batch_range != (1.0, 1.0):
            share = torch.zeros(targets.shape[:2], device=device)
        theta = ThetaBatch.from_vectors(
            torch.zeros(problems, theta_size(self.recipe.hidden), device=device), self.recipe.hidden
        )
        self.step(self.zeros(problems, device), inputs, targets, theta, share=share)

    def step(
        self,
        state: State,
        inputs: Tensor,
        targets: Tensor,
        theta: ThetaBatch,
        *,
        lr: Tensor | None = None,
        share: Tensor | None = None,
        expert_weight: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Take one inner step in place; return the loss [P] before it, and with an expert 1 - cosine to it [P].

        A batch, such as images [N, B, 64] and labels [N, B], is shared by the two signs of a particle (P = 2 N).
        `share` [N, B] is what its examples weigh, by default the same. `lr` is [P], by default the recipe's `inner_lr`
        for all. `expert_weight` is the part of the step that the expert takes.
        """
        recipe, network = self.recipe, self.network
        if lr is None:
            lr = torch.full_like(state["scale"], recipe.inner_lr)
        loss, gradients = self._loss_and_gradients(
            {name: state[name] for name in network.shapes}, state["scale"], inputs, targets, share
        )
        if recipe.inner_clip_norm is not None:
            clipped = self._clip(list(gradients.values()), recipe.inner_clip_norm)
            gradients = dict(zip(gradients, clipped, strict=True))
        updates, experts = [], []
        for name in network.matrices:
            p, g = state[name], gradients[name]
            direction = self._direction(state, name, g, theta)
            if self.orthogonalize:
                direction = newton_schulz(direction)
            if recipe.expert is None:
                count = direction.shape[0] // p.shape[0]
                self._move(_folded(p), direction, lr.repeat_interleave(count) if count > 1 else lr)
                continue
            momenta = [state[f"{name}/{moment}"] for moment in MOMENTA]
            expert = self._expert_direction(g, momenta, state[f"{name}/second_moment"], state["iteration"])
            experts.append(newton_schulz(expert) if recipe.expert == "muon" else expert)
            updates.append(direction.view_as(p))
        imitation = None
        if experts:
            matrices = [state[name] for name in network.matrices]
            imitation = self._imitate(matrices, updates, experts, lr, lr.new_full((), expert_weight))
        adam_lr = recipe.adam_lr_mult * lr
        for name in (*network.side, *(network.vectors if self.orthogonalize else ())):
            momentum, v = state[f"{name}/{MOMENTA[0]}"], state[f"{name}/second_moment"]
            self._adam(state[name], gradients[name], momentum, v, state["iteration"], adam_lr, recipe.bias_correction)
        for name in () if self.orthogonalize else network.vectors:
            direction = self._vector_direction(
                state[name],
                gradients[name],
                [state[f"{name}/{moment}"] for moment in MOMENTA],
                state[f"{name}/second_moment"],
                state[f"{name}/factor"],
                theta.vector,
                theta.bias0,
                theta.hidden,
                theta.bias1,
                theta.output,
                theta.bias2,
            )
            self._move(state[name], direction, lr)
        state["iteration"] += 1
        return loss, imitation

    def _direction(self, state: State, name: str, g: Tensor, theta: ThetaBatch) -> Tensor:
        """Advance a matrix's accumulators; return its direction [P, m, n], of a stack [P * count, m, n]."""
        p, g, v = (_folded(x) for x in (state[name], g, state[f"{name}/second_moment"]))
        momenta = [_folded(state[f"{name}/{moment}"]) for moment in MOMENTA]
        row_factor, column_factor = (_folded(state[f"{name}/{axis}_factor"]) for axis in ("row", "column"))
        theta = theta.repeated(p.shape[0] // state[name].shape[0])
        row_scale, column_scale = self._factor_moments(g, row_factor, column_factor)
        scales = self._advance_moments(p, g, momenta, v, row_scale, column_scale)
        return self._matrix_direction(
            p,
            g,
            momenta,
            v,
            row_scale,
            column_scale,
            self._contribution(row_factor, theta.short, theta.bias0),
            self._contribution(column_factor, theta.long, torch.zeros_like(theta.bias0)),
            theta.element * scales[..., None],
            theta.hidden,
            theta.bias1,
            theta.output,
            theta.bias2,
        )

    def _propose(self, g: Tensor, momenta: list[Tensor], v: Tensor, iteration: Tensor) -> Tensor:
        """Return the expert's direction, of g's shape, before Newton-Schulz; the accumulators include this step."""
        t = _expand(iteration, g) + 1
        # Nesterov's form of the fast momentum: a slow one trails on the short runs that judge a theta
        beta = MOMENTUM_DECAYS[0]
        momentum = beta * momenta[0] / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        if self.recipe.expert == "muon":
            return momentum
        return momentum / ((v / (1 - SECOND_MOMENT_DECAY**t)).sqrt() + ADAM_EPS)


class Rehearsal(NamedTuple):
    """What compiles in a run: steps of a network with so many problems."""

    network: Network
    problems: int


def rehearse(recipe: Recipe, rehearsals: Sequence[Rehearsal], device: torch.device) -> None:
    """Rehearse a step of the compiled optimizer of each network, in whatever process."""
    for network, problems in rehearsals:
        InnerOptimizer(recipe, network).rehearse(problems, device)


def _imitation(
    matrices: list[Tensor], directions: list[Tensor], experts: list[Tensor], lr: Tensor, expert_weight: Tensor
) -> Tensor:
    """Move the matrices by the blend of learned and expert steps, both of RMS lr; return 1 - cosine [P] of the two."""
    dot = square = expert_square = lr.new_zeros(())
    # a stack's matrices each have an RMS of 1
    for p, direction, expert in zip(matrices, directions, experts, strict=True):
        u = direction * torch.rsqrt(direction.square().mean((-2, -1), keepdim=True) + NORM_EPS)
        e = expert * torch.rsqrt(expert.square().mean((-2, -1), keepdim=True) + NORM_EPS)
        p.sub_(_expand(lr, p) * ((1 - expert_weight) * u + expert_weight * e))
        dot = dot + (u * e).sum(tuple(range(1, u.ndim)))
        square = square + u.square().sum(tuple(range(1, u.ndim)))
        expert_square = expert_square + e.square().sum(tuple(range(1, u.ndim)))
    return 1 - dot * torch.rsqrt(square * expert_square + 1e-30)
