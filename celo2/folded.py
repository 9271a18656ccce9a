"""Theta laid out for the folded rule, for PyTorch, for the kernels, and for many thetas at once.

Of the 30 columns that enter the first layer, 12 depend on a row or a column only. They become one vector for each row
and each column, added to the bias, and the normalisers of all fold into the weights: `celo2.phases`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from celo2.theta import GROUP_COLUMNS, Theta

# the 18 per-element columns in the order used here, as rows of the 30-row first layer in the paper's order:
# g m0 m1 m2 | the same four times q | g rf_k cf_k | m_k rf_k cf_k | clip(g) p v q
ELEMENT_ROWS = (0, 3, 4, 5, 14, 7, 8, 9, 11, 12, 13, 27, 28, 29, 1, 2, 6, 10)
# R_k and rsqrt(R_k + eps) of the shorter axis, C_k and rsqrt(C_k + eps) of the longer one
SHORT_ROWS = (15, 16, 17, 21, 22, 23)
LONG_ROWS = (18, 19, 20, 24, 25, 26)
ELEMENT_COLUMNS = len(ELEMENT_ROWS)
# a vector has the first nine groups only
VECTOR_COLUMNS = sum(GROUP_COLUMNS[:9])


class FirstLayer(NamedTuple):
    """The first layer's weights [..., 30, h] by what they multiply."""

    element: Tensor  # [..., 18, h]
    short: Tensor  # [..., 6, h]
    long: Tensor  # [..., 6, h]
    vector: Tensor  # [..., 15, h]: of a vector

    @classmethod
    def of(cls, weights: Tensor) -> FirstLayer:
        """Lay out weights [..., 30, h] in the paper's order of columns, of one theta or of many."""
        element, short, long = (
            weights.index_select(-2, torch.tensor(rows, device=weights.device))
            for rows in (ELEMENT_ROWS, SHORT_ROWS, LONG_ROWS)
        )
        return cls(element, short, long, weights[..., :VECTOR_COLUMNS, :].contiguous())


def first_layer(theta: Theta) -> FirstLayer:
    """Return the first layer of a theta, float32 on the host."""
    groups = [theta.arrays[f"w0__{group}"] for group in range(len(GROUP_COLUMNS))]
    return FirstLayer.of(torch.from_numpy(np.concatenate(groups)))


@dataclass(frozen=True)
class FoldedTheta:
    """Theta for `celo2.phases`: `x_TH` is [inputs, hidden], its transpose `[hidden, inputs]`."""

    element: Tensor  # [18, h]
    short: Tensor  # [6, h]
    long: Tensor  # [6, h]
    bias0: Tensor  # [h]
    hidden: Tensor  # [k, h]
    bias1: Tensor  # [k, 1]
    output: Tensor  # [1, k]
    bias2: float

    @classmethod
    def from_theta(cls, theta: Theta, dtype: torch.dtype, device: torch.device) -> FoldedTheta:
        arrays = theta.tensors(dtype, device)
        element, short, long, _ = (weights.to(device, dtype) for weights in first_layer(theta))
        return cls(
            element=element,
            short=short,
            long=long,
            bias0=arrays["b0"],
            hidden=arrays["w1"].T.contiguous(),
            bias1=arrays["b1"][:, None],
            output=arrays["w2"][:, :1].T.contiguous(),
            bias2=float(theta.arrays["b2"][0]),
        )


@cache
def direction_scale(theta: Theta) -> float:
    """Return the power of two that brings the directions of a theta to a root mean square of about 1.

    Neither Newton-Schulz nor the update sees a direction's scale, float16 does: its range is 6e-8 to 65504. Taken from
    inputs that are normal, as the columns are scaled to be.
    """
    arrays = {name: array.astype(np.float64) for name, array in theta.arrays.items()}
    first = np.concatenate([arrays[f"w0__{group}"] for group in range(len(GROUP_COLUMNS))])
    x = np.random.default_rng(0).standard_normal((1024, len(first)))
    hidden = np.maximum(x @ first + arrays["b0"], 0) @ arrays["w1"] + arrays["b1"]
    d = np.maximum(hidden, 0) @ arrays["w2"][:, 0] + arrays["b2"][0]
    square = np.square(d).mean()
    return float(2.0 ** -np.round(np.log2(square) / 2)) if square > 0 else 1.0


class KernelTheta(NamedTuple):
    """Theta as constants of the kernels' code, and the part that the normalisers' kernel reads from memory."""

    element: tuple[float, ...]
    vector: tuple[float, ...]
    first_bias: tuple[float, ...]
    hidden: tuple[float, ...]
    bias: tuple[float, ...]
    output: tuple[float, ...]
    output_bias: float
    first_layer: NDArray[np.float32]

    @classmethod
    def of(cls, theta: Theta, scale: float = 1.0) -> KernelTheta:
        """Lay out a theta; its direction is multiplied by `scale`."""
        arrays, layer = theta.arrays, first_layer(theta)

        def flat(array: NDArray[np.float32]) -> tuple[float, ...]:
            return tuple(float(value) for value in array.reshape(-1))

        return cls(
            element=flat(layer.element.numpy()),
            vector=flat(layer.vector.numpy()),
            first_bias=flat(arrays["b0"]),
            hidden=flat(arrays["w1"]),
            bias=flat(arrays["b1"]),
            output=flat(scale * arrays["w2"][:, 0]),
            output_bias=scale * float(arrays["b2"][0]),
            first_layer=np.concatenate([layer.short.numpy(), layer.long.numpy(), arrays["b0"][None]]),
        )
