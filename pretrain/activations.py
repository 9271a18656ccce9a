"""What a micro-batch leaves in memory for its backward pass, counted by running the real model on the meta device."""

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from celo2.pretrain.device import DTYPES
from celo2.pretrain.loss import CAPPED_ELEMENT_BYTES, ELEMENT_BYTES
from celo2.pretrain.model import GPT, GPTConfig

# log-probabilities, their gradient and the gradient of the logits, in float32, when the backward pass begins
LOSS_BYTES = 3 * 4


class Activations(NamedTuple):
    """Bytes of one micro-batch on a rank."""

    kept: int
    """What layers keep from their forward pass for their backward pass, but for the loss."""
    loss: int
    """Log-probabilities and gradients of the loss; of one in chunks, what a chunk has beside the head's gradient."""
    block: int
    """With recomputed blocks, what one computes again above its input; else 0."""

    @property
    def peak(self) -> int:
        """The most at a time: the loss has gone before the last block's backward pass begins."""
        return self.kept + max(self.loss, self.block)


class _OnGpu(TorchFunctionMode):
    """Operations as a GPU has them: flash attention, and Linear in the dtype of autocast, whose casts are kept."""

    def __init__(self, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.autocast = autocast
        self.casts: dict[Tensor, Tensor] = {}

    def _cast(self, tensor: Tensor | None) -> Tensor | None:
        if self.autocast is None or tensor is None or tensor.dtype == self.autocast:
            return tensor
        if not isinstance(tensor, nn.Parameter):
            return tensor.to(self.autocast)
        if tensor not in self.casts:
            self.casts[tensor] = tensor.to(self.autocast)
        return self.casts[tensor]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k, v = (self._cast(tensor) for tensor in args)
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        if func is F.linear:
            args = [self._cast(tensor) for tensor in args]
        return func(*args, **(kwargs or {}))


def _saved_bytes(
    config: GPTConfig, micro_batch: int, dtype: torch.dtype, autocast: bool, recompute: bool, loss_chunks: int
) -> int:
    """Bytes of all storages that a forward pass saves, each once, the parameters left out."""
    with torch.device("meta"):
        model = GPT(config, recompute=recompute, loss_chunks=loss_chunks)
        tokens_BT = torch.zeros(micro_batch, config.context, dtype=torch.int64)
    if not autocast:
        model.to(dtype)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with (
        _OnGpu(dtype if autocast else None),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model(tokens_BT, tokens_BT)
    return sum(storage.nbytes() for storage in saved.values())


def count_activations(
    config: GPTConfig,
    micro_batch: int,
    dtype: str = "bfloat16",
    *,
    autocast: bool = False,
    recompute: bool = False,
    loss_chunks: int = 1,
) -> Activations:
    """Count the activations of `micro_batch` sequences of the context's length.

    The model computes in `dtype` as `fully_shard` casts it, or with `autocast` from float32 parameters, whose casts
    then count too. Attention counts as a flash kernel saves it: query, key, value, output and log-sum-exp. Runs models
    of one and of two layers: all blocks are alike.
    """

    def layers(recompute: bool) -> tuple[int, int]:
        first, both = (
            _saved_bytes(
                dataclasses.replace(config, n_layer=count),
                micro_batch,
                DTYPES[dtype],
                autocast and dtype != "float32",
                recompute,
                loss_chunks,
            )
            for count in (1, 2)
        )
        return first, both - first

    first, layer = layers(recompute)
    kept = first + (config.n_layer - 1) * layer
    block = layers(False)[1] - layer if recompute else 0
    tokens = micro_batch * config.context
    if loss_chunks == 1:
        # the log-probabilities, which the loss counts
        kept -= 4 * tokens * config.padded_vocab_size
        return Activations(kept, LOSS_BYTES * tokens * config.padded_vocab_size, block)
    element = CAPPED_ELEMENT_BYTES if config.arch == "speedrun" else ELEMENT_BYTES
    loss = element * -(-tokens // loss_chunks) * config.padded_vocab_size
    if autocast and dtype != "float32":
        # the head's weight, for all chunks
        loss += 2 * config.padded_vocab_size * config.width
    return Activations(kept, loss, block)
