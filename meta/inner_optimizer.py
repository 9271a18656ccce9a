"""The optimizer of the inner problems: what PES perturbs, and the expert it may imitate.

State is one flat dictionary of tensors with the problem axis first (`hidden_weight`, `hidden_weight/momentum_fast`,
..., `scale`, `iteration`), so that starting, storing and restoring a trajectory is copying rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from celo2.meta.compilation import region
from celo2.meta.images import PIXELS
from celo2.meta.learned_rule import (
    ThetaBatch,
    advance_moments,
    factor_moments,
    matrix_direction,
    theta_size,
    vector_contribution,
    vector_direction,
)
from celo2.meta.network import loss_and_gradients
from celo2.meta.recipes import Recipe
from celo2.meta.tasks import BATCH, MATRICES, SHAPES, VECTORS
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
    """Adam for vectors p [P, n], in place: betas 0.9 and 0.95; without correction eps stands inside the root."""
    momentum.lerp_(g, 1 - MOMENTUM_DECAYS[0])
    v.mul_(SECOND_MOMENT_DECAY).add_((1 - SECOND_MOMENT_DECAY) * g * g)
    if bias_correction:
        t = iteration[:, None] + 1
        m_hat = momentum / (1 - MOMENTUM_DECAYS[0] ** t)
        v_hat = v / (1 - SECOND_MOMENT_DECAY**t)
        p.sub_(lr[:, None] * m_hat / (v_hat.sqrt() + ADAM_EPS))
    else:
        p.sub_(lr[:, None] * momentum * torch.rsqrt(v + RMS_EPS))


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


class InnerOptimizer:
    """Celo2 or Celo2-base on the inner network with one theta a problem, as a recipe sets it.

    With `compiled` the elementwise regions go through `torch.compile`; without, the same code runs eagerly.
    """

    def __init__(self, recipe: Recipe, *, compiled: bool = True) -> None:
        self.recipe = recipe
        self.orthogonalize = recipe.variant == "celo2"
        wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = region if compiled else lambda function: function
        self._loss_and_gradients = wrap(loss_and_gradients)
        self._clip = wrap(clip_gradients)
        self._factor_moments, self._advance_moments = wrap(factor_moments), wrap(advance_moments)
        self._contribution, self._matrix_direction = wrap(vector_contribution), wrap(matrix_direction)
        self._vector_direction, self._adam, self._move = wrap(vector_direction), wrap(adam_step), wrap(move)
        if not recipe.normalize_update:
            self._move = wrap(move_raw)
        self._expert_direction, self._imitate = wrap(self._propose), wrap(_imitation)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of a trajectory's tensors, without the problem axis."""
        shapes: dict[str, tuple[int, ...]] = dict(SHAPES)
        for name in MATRICES:
            m, n = SHAPES[name]
            shapes |= {f"{name}/{moment}": (m, n) for moment in (*MOMENTA, "second_moment")}
            shapes |= {f"{name}/row_factor": (3, m), f"{name}/column_factor": (3, n)}
        for name in VECTORS:
            (n,) = SHAPES[name]
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
        images = torch.zeros(problems // 2, BATCH, PIXELS, device=device)
        labels = torch.zeros(problems // 2, BATCH, dtype=torch.int64, device=device)
        theta = ThetaBatch.from_vectors(
            torch.zeros(problems, theta_size(self.recipe.hidden), device=device), self.recipe.hidden
        )
        self.step(self.zeros(problems, device), images, labels, theta)

    def step(
        self,
        state: State,
        images: Tensor,
        labels: Tensor,
        theta: ThetaBatch,
        *,
        lr: Tensor | None = None,
        expert_weight: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Take one inner step in place; return the loss [P] before it, and with an expert 1 - cosine to it [P].

        `images` [N, B, 64] and `labels` [N, B] are shared by the two signs of a particle (P = 2 N). `lr` is [P], by
        default the recipe's `inner_lr` for all. `expert_weight` is the part of the step that the expert takes.
        """
        recipe = self.recipe
        if lr is None:
            lr = torch.full_like(state["scale"], recipe.inner_lr)
        loss, gradients = self._loss_and_gradients(
            {name: state[name] for name in SHAPES}, state["scale"], images, labels
        )
        if recipe.inner_clip_norm is not None:
            clipped = self._clip(list(gradients.values()), recipe.inner_clip_norm)
            gradients = dict(zip(gradients, clipped, strict=True))
        updates, experts = [], []
        for name in MATRICES:
            p, g = state[name], gradients[name]
            direction = self._direction(state, name, g, theta)
            expert = None
            if recipe.expert is not None:
                momenta = [state[f"{name}/{moment}"] for moment in MOMENTA]
                expert = self._expert_direction(g, momenta, state[f"{name}/second_moment"], state["iteration"])
                if recipe.expert == "muon":
                    expert = newton_schulz(expert)
                experts.append(expert)
            if self.orthogonalize:
                direction = newton_schulz(direction)
            if expert is None:
                self._move(p, direction, lr)
            else:
                updates.append(direction)
        imitation = None
        if experts:
            matrices = [state[name] for name in MATRICES]
            imitation = self._imitate(matrices, updates, experts, lr, lr.new_full((), expert_weight))
        for name in VECTORS:
            p, g = state[name], gradients[name]
            v = state[f"{name}/second_moment"]
            if self.orthogonalize:
                momentum, adam_lr = state[f"{name}/{MOMENTA[0]}"], recipe.adam_lr_mult * lr
                self._adam(p, g, momentum, v, state["iteration"], adam_lr, recipe.bias_correction)
            else:
                direction = self._vector_direction(
                    p,
                    g,
                    [state[f"{name}/{moment}"] for moment in MOMENTA],
                    v,
                    state[f"{name}/factor"],
                    theta.vector,
                    theta.bias0,
                    theta.hidden,
                    theta.bias1,
                    theta.output,
                    theta.bias2,
                )
                self._move(p, direction, lr)
        state["iteration"] += 1
        return loss, imitation

    def _direction(self, state: State, name: str, g: Tensor, theta: ThetaBatch) -> Tensor:
        p, v = state[name], state[f"{name}/second_moment"]
        momenta = [state[f"{name}/{moment}"] for moment in MOMENTA]
        row_factor, column_factor = state[f"{name}/row_factor"], state[f"{name}/column_factor"]
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
        """Return the expert's direction [P, m, n] before Newton-Schulz; the accumulators include this step."""
        t = _expand(iteration, g) + 1
        # Nesterov's form of the fast momentum: a slow one trails on the short runs that judge a theta
        beta = MOMENTUM_DECAYS[0]
        momentum = beta * momenta[0] / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        if self.recipe.expert == "muon":
            return momentum
        return momentum / ((v / (1 - SECOND_MOMENT_DECAY**t)).sqrt() + ADAM_EPS)


def rehearse(recipe: Recipe, problems: int, device: torch.device) -> None:
    """Rehearse a step of the compiled optimizer of a recipe, in whatever process."""
    InnerOptimizer(recipe).rehearse(problems, device)


def _imitation(
    matrices: list[Tensor], directions: list[Tensor], experts: list[Tensor], lr: Tensor, expert_weight: Tensor
) -> Tensor:
    """Move the matrices by the blend of learned and expert steps, both of RMS lr; return 1 - cosine [P] of the two."""
    dot = square = expert_square = lr.new_zeros(())
    for p, direction, expert in zip(matrices, directions, experts, strict=True):
        u = direction * torch.rsqrt(direction.square().mean((1, 2), keepdim=True) + NORM_EPS)
        e = expert * torch.rsqrt(expert.square().mean((1, 2), keepdim=True) + NORM_EPS)
        p.sub_(_expand(lr, p) * ((1 - expert_weight) * u + expert_weight * e))
        dot = dot + (u * e).sum((1, 2))
        square = square + u.square().sum((1, 2))
        expert_square = expert_square + e.square().sum((1, 2))
    return 1 - dot * torch.rsqrt(square * expert_square + 1e-30)
