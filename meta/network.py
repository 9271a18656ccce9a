"""What inner problems train: the interface of a network, and the small MLP of the paper's tasks.

All problems of a network advance as one batch, so that everything here has the problem axis first: P = 2 N problems,
the + signs first; the two signs of a particle share its batch of B examples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from celo2.meta.images import CLASSES, PIXELS
from celo2.meta.randomness import truncated_normal

Weights = dict[str, NDArray[np.float32]]
# of weights, scale [P], inputs [N, B, ...], targets [N, B, ...] and shares [N, B] or None
LossAndGradients = Callable[
    [dict[str, Tensor], Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, dict[str, Tensor]]
]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


class Examples(Protocol):
    """A named data set: `inputs` [n, ...] and `targets` [n, ...], one example a row, and a hash of both."""

    @property
    def name(self) -> str: ...
    @property
    def inputs(self) -> NDArray[Any]: ...
    @property
    def targets(self) -> NDArray[Any]: ...
    @property
    def sha256(self) -> str: ...


class Network(ABC):
    """The tensors of one problem, which of them the learned rule moves, their start, and their loss and gradients.

    A trajectory minimises f(s w), one scale s for all tensors of w.
    """

    name: str
    """Prefix of its arrays in a checkpoint; the MLP's have none."""
    shapes: dict[str, tuple[int, ...]]
    """Tensors of a problem, in the order of the layers."""
    matrices: tuple[str, ...]
    """Those of the learned rule, [m, n] with m <= n, or stacks of such of one shape [count, m, n]. A matrix that is
    tall in [out, in] is kept transposed: the rule's roles follow the shorter axis, and that must be the first."""
    vectors: tuple[str, ...] = ()
    """Biases: Adam's in `celo2`, the learned rule's in `celo2-base`."""
    side: tuple[str, ...] = ()
    """Tensors that Adam moves in both variants, as AdamW does where theta is used: embeddings and heads."""
    batch: int
    """Examples of a full batch."""
    classes: int

    @property
    def loss_clip(self) -> float:
        """The upper bound of a normalised loss: 1.5 times the loss of a uniform guess."""
        return 1.5 * math.log(self.classes)

    @abstractmethod
    def initial_weights(self, rng: np.random.Generator) -> Weights:
        """Draw the start of one problem, for a scale of 1."""

    @abstractmethod
    def blank(self, particles: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return full batches of zeros for so many particles: what compiles for them compiles for all others."""

    @abstractmethod
    def loss_and_gradients(self, wrap: Wrap) -> LossAndGradients:
        """Return the function that gives the loss [P] and its gradients; `wrap` compiles the regions of tensors in it.

        Shares [N, B] say what each example of a batch weighs, with a sum of 1 a particle; None weighs all the same.
        """

    @abstractmethod
    def reference_loss(self, weights: dict[str, Tensor], scale: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss [P] by a plain forward pass, a problem at a time: what the fast one is tested against."""


HIDDEN = 32
BATCH = 64
# weights are in PyTorch's layout, [out, in]
SHAPES: dict[str, tuple[int, ...]] = {
    "hidden_weight": (HIDDEN, PIXELS),
    "hidden_bias": (HIDDEN,),
    "output_weight": (CLASSES, HIDDEN),
    "output_bias": (CLASSES,),
}
MATRICES = ("hidden_weight", "output_weight")
VECTORS = ("hidden_bias", "output_bias")


class MLP(Network):
    """64-32-10 with ReLU on 64 numbers, such as 8 x 8 pictures: the network of the paper's tasks."""

    name = ""
    shapes = SHAPES
    matrices = MATRICES
    vectors = VECTORS
    batch = BATCH
    classes = CLASSES

    def initial_weights(self, rng: np.random.Generator) -> Weights:
        return initial_weights(rng)

    def blank(self, particles: int, device: torch.device) -> tuple[Tensor, Tensor]:
        images = torch.zeros(particles, BATCH, PIXELS, device=device)
        return images, torch.zeros(particles, BATCH, dtype=torch.int64, device=device)

    def loss_and_gradients(self, wrap: Wrap) -> LossAndGradients:
        return wrap(loss_and_gradients)

    def reference_loss(self, weights: dict[str, Tensor], scale: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        return reference_loss(weights, scale, inputs, targets)


def initial_weights(rng: np.random.Generator) -> Weights:
    """Draw the MLP's start: weights truncated at two standard deviations, z / sqrt(fan_in); biases zero."""
    weights = {}
    for name, shape in SHAPES.items():
        weights[name] = np.zeros(shape, np.float32)
        if name in MATRICES:
            weights[name] = (truncated_normal(rng, shape) / math.sqrt(shape[1])).astype(np.float32)
    return weights


def loss_and_gradients(
    weights: dict[str, Tensor], scale: Tensor, images: Tensor, labels: Tensor, share: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean cross-entropy [P] of f(scale * w) and its hand-written gradients with respect to w.

    `weights` are [P, out, in] and [P, out], `scale` is [P], `images` [N, B, 64] and `labels` [N, B] with N = P / 2.
    `share` [N, B] makes the mean one of given weights. Activations are [P, units, B], so that the softmax and the
    biases run along contiguous images.
    """
    n, batch, _ = images.shape
    s = scale[:, None, None]
    w1, w2 = weights["hidden_weight"], weights["output_weight"]
    b1, b2 = weights["hidden_bias"][..., None], weights["output_bias"][..., None]
    pixels = images.mT
    hidden = torch.cat([torch.bmm(w1[:n], pixels), torch.bmm(w1[n:], pixels)])
    hidden = torch.relu(s * (hidden + b1))  # [P, 32, B]
    logits = s * (torch.bmm(w2, hidden) + b2)  # [P, 10, B]
    log_probability = torch.log_softmax(logits, dim=1)
    # the class is the middle axis: [N, 10, B]
    target = (labels[:, None] == torch.arange(CLASSES, device=labels.device)[:, None]).to(logits.dtype).repeat(2, 1, 1)
    if share is None:
        loss = -(log_probability * target).sum(1).mean(1)
        g_logits = (log_probability.exp() - target) * (s / batch)
    else:
        weight = share.repeat(2, 1)[:, None]
        loss = -(log_probability * target * weight).sum((1, 2))
        g_logits = (log_probability.exp() - target) * (s * weight)
    g_hidden = torch.bmm(w2.mT, g_logits) * (hidden > 0) * s
    gradients = {
        "hidden_weight": torch.cat([torch.bmm(g_hidden[:n], images), torch.bmm(g_hidden[n:], images)]),
        "hidden_bias": g_hidden.sum(2),
        "output_weight": torch.bmm(g_logits, hidden.mT),
        "output_bias": g_logits.sum(2),
    }
    return loss, gradients


def reference_loss(weights: dict[str, Tensor], scale: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Return the loss [P] by the plain forward pass, for autograd: what `loss_and_gradients` is tested against."""
    n = images.shape[0]
    losses = []
    for problem, s in enumerate(scale):
        w = {name: s * tensor[problem] for name, tensor in weights.items()}
        hidden = torch.relu(F.linear(images[problem % n], w["hidden_weight"], w["hidden_bias"]))
        losses.append(F.cross_entropy(F.linear(hidden, w["output_weight"], w["output_bias"]), labels[problem % n]))
    return torch.stack(losses)
