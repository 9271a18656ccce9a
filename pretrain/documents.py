"""Causal attention, over all of a window or within its documents alone.

Each document begins with an end-of-text token, as the shards have it; what is before a window's first one is a document
too. Positions stay those of the window: RoPE depends on distances alone, so a document is then as if it stood alone;
the learned positions of `gpt2` are trained along the whole context.

Shape suffixes: B batch, T tokens, H heads, K head dim.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Mask = Tensor | BlockMask | None


def document_numbers(tokens_BT: Tensor, end_of_text: int) -> Tensor:
    """Which document of its row each token belongs to, int64 [B, T], from 0 or from 1."""
    return (tokens_BT == end_of_text).cumsum(1)


def document_mask(tokens_BT: Tensor, end_of_text: int) -> Tensor:
    """Which tokens each one attends to: its document's, up to itself; bool [B, 1, T, T] for any device."""
    document_BT = document_numbers(tokens_BT, end_of_text)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return same_BTT.tril()[:, None]


def document_blocks(tokens_BT: Tensor, end_of_text: int, create: Callable[..., BlockMask] | None = None) -> BlockMask:
    """The same for `flex_attention`, whose kernels leave out blocks that are masked altogether."""
    document_BT = document_numbers(tokens_BT, end_of_text)

    def within(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_BT[b, query] == document_BT[b, key])

    batch, length = tokens_BT.shape
    return (create or _compiled_creation())(within, batch, None, length, length, device=tokens_BT.device)


@functools.cache
def _compiled_creation() -> Callable[..., Any]:
    # without a compiler it fills a mask of all pairs
    return torch.compile(create_block_mask)


def attend(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask: Mask, scale: float | None) -> Tensor:
    """Attention under a mask, None: causal; `scale` None is over the root of K."""
    if isinstance(mask, BlockMask):
        # compiled for a CPU (PyTorch 2.13), it reads what is computed just before as if it lay contiguous
        q_BHTK, k_BHTK, v_BHTK = q_BHTK.contiguous(), k_BHTK.contiguous(), v_BHTK.contiguous()
        y_BHTK: Tensor = flex_attention(q_BHTK, k_BHTK, v_BHTK, block_mask=mask, scale=scale)
        return y_BHTK
    return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=mask, is_causal=mask is None, scale=scale)
