"""A two-layer transformer on bytes as an inner problem: what a language model's matrices see, at a size for one core.

The architecture is `modern` of `celo2.pretrain.model` at width 32: RMSNorm without gain before each part and at the
end, QK-norm, rotary positions, causal attention, no biases, an untied head; but with a squared ReLU, as a tanh is a
sixth of the time here. Matrices of one shape are one stacked tensor, so that the rule and Newton-Schulz run once a
shape.

Shape suffixes: P problems, N particles, B windows of a batch, T tokens, S = B T, D width, H heads, K head dim, V
vocabulary, L layers.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from celo2.meta.network import LossAndGradients, Network, Weights, Wrap
from celo2.meta.randomness import truncated_normal

LAYERS, HEADS, WIDTH = 2, 2, 32
HEAD_DIM = WIDTH // HEADS
CONTEXT = 32
BATCH = 8
VOCABULARY = 64
"""The 63 commonest bytes, 99.3% of the Wikipedia text, and one for the rest: lookups in tables this small are products
with one-hot rows, whose gradients need no scatter, and the head is a twelfth of the hidden matrices and not a third."""
NORM_EPS = 1e-6
ROPE_BASE = 1e4


@dataclass(frozen=True, eq=False)
class ByteWindows:
    """A text in windows [n, 33] uint8 of classes below 64: 32 inputs, each with the class after it as its target.

    Raises ValueError for another shape or class.
    """

    name: str
    windows: NDArray[np.uint8]

    def __post_init__(self) -> None:
        if self.windows.ndim != 2 or self.windows.shape[1] != CONTEXT + 1 or not len(self.windows):
            raise ValueError(f"text {self.name!r}: windows {self.windows.shape}, expected [n, {CONTEXT + 1}]")
        if self.windows.min() < 0 or self.windows.max() >= VOCABULARY:
            raise ValueError(f"text {self.name!r}: classes must be 0 .. {VOCABULARY - 1}")

    @classmethod
    def of_text(cls, name: str, tokens: NDArray[np.integer]) -> ByteWindows:
        """Cut a text [n] of bytes into windows that share one byte, and number its bytes from the commonest on.

        Raises ValueError for a text shorter than a window.
        """
        if len(tokens) <= CONTEXT:
            raise ValueError(f"text {name!r} has {len(tokens)} bytes: give more than {CONTEXT}")
        common = np.argsort(-np.bincount(tokens), kind="stable")[: VOCABULARY - 1]
        classes = np.full(int(tokens.max()) + 1, VOCABULARY - 1, np.uint8)
        classes[common] = np.arange(len(common))
        starts = np.arange(0, len(tokens) - CONTEXT, CONTEXT)
        return cls(name, classes[tokens[starts[:, None] + np.arange(CONTEXT + 1)]])

    @property
    def inputs(self) -> NDArray[np.uint8]:
        return self.windows[:, :-1]

    @property
    def targets(self) -> NDArray[np.uint8]:
        return self.windows[:, 1:]

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.name.encode() + np.ascontiguousarray(self.windows).tobytes()).hexdigest()


class Transformer(Network):
    """The byte transformer: 24,576 elements in twelve matrices of two shapes, 4,096 in embedding and head.

    `square` is query, key, value and output [out, in] of each layer; `wide` is up [in, out], transposed because it is
    tall, and down [out, in] of each layer.
    """

    name = "transformer"
    shapes = {  # noqa: RUF012
        "embedding": (VOCABULARY, WIDTH),
        "square": (4 * LAYERS, WIDTH, WIDTH),
        "wide": (2 * LAYERS, WIDTH, 4 * WIDTH),
        "head": (VOCABULARY, WIDTH),
    }
    matrices = ("square", "wide")
    side = ("embedding", "head")
    batch = BATCH
    classes = VOCABULARY

    def initial_weights(self, rng: np.random.Generator) -> Weights:
        """Draw truncated normals over the root of what a matrix sums over, or an embedding is wide."""
        weights = {}
        for name, shape in self.shapes.items():
            weights[name] = truncated_normal(rng, shape) / math.sqrt(WIDTH)
        weights["wide"][1::2] /= math.sqrt(4)
        return {name: w.astype(np.float32) for name, w in weights.items()}

    def blank(self, particles: int, device: torch.device) -> tuple[Tensor, Tensor]:
        windows = torch.zeros(2, particles, BATCH, CONTEXT, dtype=torch.uint8, device=device)
        return windows[0], windows[1]

    def loss_and_gradients(self, wrap: Wrap) -> LossAndGradients:
        forward = wrap(loss)

        def run(
            weights: dict[str, Tensor], scale: Tensor, inputs: Tensor, targets: Tensor, share: Tensor | None = None
        ) -> tuple[Tensor, dict[str, Tensor]]:
            leaves = [weights[name].detach().requires_grad_() for name in self.shapes]
            # outside, so that the compiled region does not compute them for each element
            cos, sin = rope_tables(scale.dtype, scale.device)
            with torch.enable_grad():
                loss_P = forward(*leaves, scale, inputs, targets, share, cos, sin)
                # problems are independent: the gradient of the sum holds each problem's own
                gradients = torch.autograd.grad(loss_P.sum(), leaves)
            return loss_P.detach(), dict(zip(self.shapes, gradients, strict=True))

        return run

    def reference_loss(self, weights: dict[str, Tensor], scale: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        return reference_loss(weights, scale, inputs, targets)


@cache
def rope_tables(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * frequency, each [T, K / 2]; frequencies are ROPE_BASE**(-2i / K)."""
    half = HEAD_DIM // 2
    frequency = ROPE_BASE ** (-torch.arange(half, device=device, dtype=dtype) / half)
    angle = torch.arange(CONTEXT, device=device, dtype=dtype)[:, None] * frequency
    return angle.cos(), angle.sin()


def _norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def loss(
    embedding: Tensor,
    square: Tensor,
    wide: Tensor,
    head: Tensor,
    scale: Tensor,
    inputs: Tensor,
    targets: Tensor,
    share: Tensor | None,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """Return the mean cross-entropy [P] of f(scale * w) of the next byte, over all bytes of the batch.

    `inputs` and `targets` are [N, B, T] with N = P / 2, `share` [N, B] what each window weighs.
    """
    problems, (n, batch, _) = len(scale), inputs.shape
    s = scale[:, None, None]
    classes = torch.arange(VOCABULARY, device=inputs.device)
    one_hot, target = ((x.reshape(n, -1, 1) == classes).to(scale.dtype).repeat(2, 1, 1) for x in (inputs, targets))
    future = torch.full((CONTEXT, CONTEXT), -math.inf, dtype=scale.dtype, device=scale.device).triu(1)

    def heads(x_PSD: Tensor) -> Tensor:
        """[P, S, D] to [P B H, T, K]."""
        return x_PSD.view(-1, CONTEXT, HEADS, HEAD_DIM).transpose(1, 2).reshape(-1, CONTEXT, HEAD_DIM)

    x = torch.bmm(one_hot, s * embedding)  # [P, S, D]
    for layer in range(LAYERS):
        weights = s * square[:, 4 * layer : 4 * layer + 3].flatten(1, 2)  # [P, 3 D, D]
        query, key, value = (heads(part) for part in torch.bmm(_norm(x), weights.mT).chunk(3, dim=2))
        query, key = (_rotate(_norm(part), cos, sin) for part in (query, key))
        attention = torch.softmax(torch.bmm(query, key.mT) / math.sqrt(HEAD_DIM) + future, dim=2)
        y = torch.bmm(attention, value).view(-1, HEADS, CONTEXT, HEAD_DIM).transpose(1, 2).reshape(problems, -1, WIDTH)
        x = x + torch.bmm(y, (s * square[:, 4 * layer + 3]).mT)
        up, down = s * wide[:, 2 * layer], s * wide[:, 2 * layer + 1]  # [P, D, 4 D]
        x = x + torch.bmm(torch.relu(torch.bmm(_norm(x), up)).square(), down.mT)
    logits = torch.bmm(_norm(x), (s * head).mT)  # [P, S, V]
    cross_entropy = -(torch.log_softmax(logits, dim=2) * target).sum(2).view(problems, batch, -1).mean(2)
    return cross_entropy.mean(1) if share is None else (cross_entropy * share.repeat(2, 1)).sum(1)


def reference_loss(weights: dict[str, Tensor], scale: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss [P] one problem and one window after another, with PyTorch's own attention and lookups."""
    cos, sin = rope_tables(scale.dtype, scale.device)
    losses = []
    for problem, s in enumerate(scale):
        w = {name: s * tensor[problem] for name, tensor in weights.items()}
        windows = []
        for tokens, following in zip(inputs[problem % len(inputs)], targets[problem % len(inputs)], strict=True):
            x = F.embedding(tokens.long(), w["embedding"])
            for layer in range(LAYERS):
                query, key, value, out = w["square"][4 * layer : 4 * layer + 4]
                normed = F.rms_norm(x, (WIDTH,), eps=NORM_EPS)
                q, k, v = (F.linear(normed, m).view(-1, HEADS, HEAD_DIM).transpose(0, 1) for m in (query, key, value))
                q, k = (_rotate(F.rms_norm(part, (HEAD_DIM,), eps=NORM_EPS), cos, sin) for part in (q, k))
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
                x = x + F.linear(y, out)
                up, down = w["wide"][2 * layer : 2 * layer + 2]
                normed = F.rms_norm(x, (WIDTH,), eps=NORM_EPS)
                x = x + F.linear(F.relu(F.linear(normed, up.mT)).square(), down)
            logits = F.linear(F.rms_norm(x, (WIDTH,), eps=NORM_EPS), w["head"])
            windows.append(F.cross_entropy(logits, following.long()))
        losses.append(torch.stack(windows).mean())
    return torch.stack(losses)
