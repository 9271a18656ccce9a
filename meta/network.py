"""Loss and hand-written gradients of the inner network, for all particles and both signs at once.

Shapes: P = 2 N problems, the + signs first; a batch of B = 64 images of 64 pixels a particle, shared by its two signs.
Activations are [P, units, B], so that the softmax and the biases run along contiguous images.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from celo2.meta.images import CLASSES


def loss_and_gradients(
    weights: dict[str, Tensor], scale: Tensor, images: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean cross-entropy [P] of f(scale * w) and its gradients with respect to w.

    `weights` are [P, out, in] and [P, out], `scale` is [P], `images` [N, B, 64] and `labels` [N, B] with N = P / 2.
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
    loss = -(log_probability * target).sum(1).mean(1)
    g_logits = (log_probability.exp() - target) * (s / batch)
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
