"""Validation loss over a fixed set of tokens, shared out among the ranks."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from celo2.pretrain.device import precision
from celo2.pretrain.interruption import Interruption
from celo2.pretrain.model import GPT
from celo2.pretrain.parallel import World


def bits_per_byte(nats: float, targets_bytes: float) -> float:
    """Summed loss in nats over the bytes of text that the target tokens stand for."""
    return nats / math.log(2) / max(targets_bytes, 1)


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: np.ndarray,
    dtype: str,
    world: World,
    interruption: Interruption,
) -> tuple[float, float] | None:
    """Validation loss in nats a token, token-weighted over all ranks, and in bits per byte; None when interrupted.

    `batches` are this rank's, inputs and targets int64 [B, T], and equally many on every rank; targets below 0 do not
    count. `dtype` is for `precision`.
    """
    model.eval()
    nats, tokens, text_bytes, stopped = 0.0, 0, 0, False
    for inputs_BT, targets_BT in batches:
        if stopped := interruption.poll():
            break
        with precision(world.device, dtype):
            nats += float(model(inputs_BT.to(world.device), targets_BT.to(world.device), reduction="sum"))
        counted = targets_BT[targets_BT >= 0]
        tokens += counted.numel()
        text_bytes += int(token_bytes[counted.numpy()].sum())
    model.train()
    if isinstance(model, FSDPModule):
        # without a backward pass the root's parameters stay gathered, and they are not those of the optimizer
        model.reshard()
    if stopped:
        return None
    nats, all_tokens, all_bytes = world.all_reduce_sum(nats, tokens, text_bytes)
    return nats / all_tokens, bits_per_byte(nats, all_bytes)
