"""The cross-entropy of a language model's head in chunks, whose logits never exist all at once.

Of each chunk the forward pass computes the logits, the loss and at once the gradients with respect to the head's input
and its weight, so that nothing is kept for a backward pass and nothing computed again. The idea is that of Liger-Kernel
(Hsu et al. 2024, arXiv 2410.10989, section 3.2) and Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009).

Shape suffixes: N tokens, D width, P rows of the head, padding included.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the target that cross_entropy leaves out
# float32 logits of a chunk, at most, where their number is automatic: matrix products stay large
CHUNK_BYTES = 512 * 2**20
# bytes of a chunk for each of its logits: bfloat16 ones, their log-probabilities and their gradient, or all float32
ELEMENT_BYTES, CAPPED_ELEMENT_BYTES = 8, 16


def automatic_chunks(tokens: int, rows: int) -> int:
    """Chunks of a loss over `tokens` with a head of `rows`, the fewest that keep a chunk's logits to CHUNK_BYTES."""
    return max(1, -(-4 * tokens * rows // CHUNK_BYTES))


def cap_logits(logits: Tensor, cap: float) -> Tensor:
    """Keep logits within `cap`, smoothly, in float32 or wider: cap * z / sqrt(z^2 + cap^2)."""
    logits = logits.to(_wide(logits.dtype))
    return cap * logits * torch.rsqrt(logits.square() + cap**2)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def loss_and_gradient(
    logits_NP: Tensor, targets_N: Tensor, scale: Tensor, vocab_size: int, cap: float | None
) -> tuple[Tensor, Tensor]:
    """Summed loss of a chunk times `scale`, and its gradient by the logits, in their dtype; overwrites the logits.

    Rows from `vocab_size` on are padding, whose gradient is exactly zero. The loss is in float32 or wider.
    """
    dtype, wide, slope_NP = logits_NP.dtype, _wide(logits_NP.dtype), None
    if cap is not None:
        root_NP = torch.rsqrt(logits_NP.to(wide).square() + cap**2)
        logits_NP = cap * logits_NP * root_NP
        # of cap * z / sqrt(z^2 + cap^2)
        slope_NP = root_NP.pow_(3).mul_(cap**3)
    columns_P = torch.arange(logits_NP.shape[-1], device=logits_NP.device)
    compiling = torch.compiler.is_compiling()
    if vocab_size != logits_NP.shape[-1] and compiling:
        # what is written in place would be written back
        logits_NP = logits_NP.masked_fill(columns_P >= vocab_size, -torch.inf)
    elif vocab_size != logits_NP.shape[-1]:
        logits_NP[:, vocab_size:] = -torch.inf
    counted_N = targets_N != IGNORED
    target_N1 = torch.where(counted_N, targets_N, 0)[:, None]
    log_odds_NP = torch.log_softmax(logits_NP, -1, dtype=wide)
    nats_N = torch.where(counted_N, -log_odds_NP.gather(1, target_N1).squeeze(1), 0.0)
    if compiling:
        # a comparison becomes part of the loop over the chunk, a scatter does not
        gradient_NP = log_odds_NP.exp() - (columns_P == target_N1).to(wide)
    else:
        gradient_NP = log_odds_NP.exp_()
        gradient_NP.scatter_add_(1, target_N1, torch.full_like(target_N1, -1, dtype=wide))
    gradient_NP *= torch.where(counted_N, scale, 0.0)[:, None]
    if slope_NP is not None:
        gradient_NP *= slope_NP
    return nats_N.sum() * scale, gradient_NP.to(dtype)


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(loss_and_gradient)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss of x_ND and a head; the gradients by x_ND, weight and bias are made in the forward pass and kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_PD: Tensor,
        bias_P: Tensor | None,
        targets_N: Tensor,
        scale: Tensor,
        chunks: int,
        chunk_loss: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        inputs = (x_ND, weight_PD, bias_P)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        kind = x_ND.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if autocast:
            dtype = torch.get_autocast_dtype(kind)
            x_ND, weight_PD, bias_P = (None if t is None else t.to(dtype) for t in inputs)  # type: ignore[assignment]
        wide = _wide(x_ND.dtype)
        total = torch.zeros((), dtype=wide, device=x_ND.device)
        x_gradient_ND = torch.empty_like(x_ND)
        # over chunks in float32, also where the head computes in bfloat16
        weight_gradient_PD = torch.zeros(weight_PD.shape, dtype=wide, device=x_ND.device)
        bias_gradient_P = None if bias_P is None else torch.zeros(bias_P.shape, dtype=wide, device=x_ND.device)
        parts = zip(*(tensor.chunk(chunks) for tensor in (x_ND, targets_N, x_gradient_ND)), strict=True)
        with torch.autocast(kind, enabled=False) if autocast else nullcontext():
            for x_nD, targets_n, x_gradient_nD in parts:
                nats, gradient_nP = chunk_loss(F.linear(x_nD, weight_PD, bias_P), targets_n, scale)
                total += nats
                x_gradient_nD.copy_(F.linear(gradient_nP, weight_PD.T))
                if gradient_nP.dtype == x_nD.dtype == wide:
                    weight_gradient_PD.addmm_(gradient_nP.T, x_nD)
                else:
                    weight_gradient_PD += F.linear(gradient_nP.T, x_nD.T)
                if bias_gradient_P is not None:
                    bias_gradient_P += gradient_nP.sum(0, dtype=wide)
                # before the next chunk's
                del gradient_nP
        ctx.save_for_backward(x_gradient_ND, weight_gradient_PD, bias_gradient_P)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # in place: the head's gradient is as large as the head
        found = (
            None if tensor is None else tensor.mul_(gradient).to(dtype)
            for tensor, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*found, None, None, None, None)


def linear_cross_entropy(
    x_ND: Tensor,
    weight_PD: Tensor,
    bias_P: Tensor | None,
    targets_N: Tensor,
    *,
    chunks: int,
    vocab_size: int,
    cap: float | None = None,
    reduction: str = "mean",
    compiled: bool = False,
) -> Tensor:
    """Cross-entropy of the logits x W^T + b in `chunks` parts, as `torch.nn.functional.cross_entropy` of all of them.

    targets_N is int64; those of IGNORED do not count. Logits are computed in the dtype of x, or in that of autocast,
    the loss and the head's gradient in float32 or wider. Rows from `vocab_size` on are padding, which the softmax
    leaves out; logits stay within `cap`, if there is one. `compiled` takes the softmax and its gradient through
    torch.compile. The gradient is there once: a second backward pass raises RuntimeError.
    """
    counted = (targets_N != IGNORED).sum()
    wide = _wide(x_ND.dtype)
    scale = 1 / counted.to(wide) if reduction == "mean" else torch.ones((), dtype=wide, device=x_ND.device)
    if torch.is_grad_enabled():
        function = _compiled() if compiled else loss_and_gradient

        def chunk_loss(logits_NP: Tensor, targets_N: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            return function(logits_NP, targets_N, scale, vocab_size, cap)

        total: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            x_ND, weight_PD, bias_P, targets_N, scale, chunks, chunk_loss
        )
        return total
    total = torch.zeros((), dtype=wide, device=x_ND.device)
    for x_nD, targets_n in zip(x_ND.chunk(chunks), targets_N.chunk(chunks), strict=True):
        logits_nP = F.linear(x_nD, weight_PD, bias_P)
        logits_nP = logits_nP if cap is None else cap_logits(logits_nP, cap)
        logits_nP[:, vocab_size:] = -torch.inf
        total += F.cross_entropy(logits_nP.to(_wide(logits_nP.dtype)), targets_n, reduction="sum")
    return total * scale
