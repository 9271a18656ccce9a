"""What a step collects: each parameter with its gradient and state, as this rank has them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from celo2.matrices import MatrixView
from celo2.phases import Matrices
from celo2.state import MOMENTUM_KEYS
from celo2.theta import Theta


class MatrixJob(NamedTuple):
    """A parameter of the learned rule with two axes or more; `position` is its place in the optimizer."""

    group: int
    parameter: Tensor
    matrices: Matrices
    state: dict[str, Tensor]
    theta: Theta
    position: int


class VectorJob(NamedTuple):
    """A parameter of the learned rule with fewer axes."""

    group: int
    parameter: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    theta: Theta
    position: int


def matrices_of(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], view: MatrixView) -> Matrices:
    """View a parameter, its gradient and its state as batches of matrices; only the gradient may be copied."""
    order = view.order(parameter)
    try:
        if order is None and view.order(gradient) is not None:
            raise ValueError("its columns lie in another order")
        g = view.matrices(gradient, order)
    except ValueError:
        copy = gradient.contiguous() if order is None else torch.empty_like(parameter, dtype=gradient.dtype)
        g = view.matrices(copy if order is None else copy.copy_(gradient), order)
    fast, medium, slow = (view.matrices(state[name]) for name in MOMENTUM_KEYS)
    factors = [view.factors(state[name], g.shape[0]) for name in ("row_factor", "column_factor")]
    v = view.matrices(state["second_moment"])
    return Matrices(view.matrices(parameter), g, (fast, medium, slow), v, *factors)
